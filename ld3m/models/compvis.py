"""Read `model.ckpt` of CompVis's class-conditional latent diffusion model (`cin256-v2`) as a prior.

Nothing in the file is executed: objects of the training program (PyTorch Lightning, omegaconf, numpy) become inert
placeholders, any other object is an error. diffusers renames the tensors of the U-Net and of the autoencoder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ld3m.models.diffusion_prior import Prior, cin256_alpha_bar
from ld3m.models.prior_variants import spread_codes
from ld3m.runtime.seeds import forked

Weights = Literal["auto", "ema", "model"]

UNET, AUTOENCODER, EMBEDDER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
LOSS = f"{AUTOENCODER}loss."  # the discriminator and LPIPS, which trained the autoencoder
HARMLESS = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.")  # become placeholders, nothing is imported


@dataclass(frozen=True)
class Kind:
    """Sizes of a class-conditional latent diffusion model with a VQ autoencoder; the defaults are those of
    `cin256-v2`."""

    unet_widths: tuple[int, ...] = (192, 384, 576, 960)  # model_channels times channel_mult
    classes: int = 1000  # without the null class
    conditioning_width: int = 512
    autoencoder_widths: tuple[int, ...] = (128, 256, 512)  # ch times ch_mult
    latent_channels: int = 3
    codebook: int = 8192


CIN256 = Kind()


def build(kind: Kind = CIN256, *, seed: int) -> Prior:
    """Build a frozen prior with random weights in float32; that of `CIN256` takes 1.8 GB."""
    with forked(seed, "compvis"):
        prior = Prior(*_modules(kind, scale=1.0), cin256_alpha_bar()).freeze_()
        spread_codes(prior.autoencoder)
    return prior


def load_checkpoint(file: Path, *, kind: Kind = CIN256, weights: Weights = "auto") -> Prior:
    """Load a CompVis checkpoint.

    Parameters
    ----------
    file : path of `model.ckpt`, saved by PyTorch 1.6 or later
    kind : the sizes of the model in it
    weights : which U-Net to take. "auto": the moving average (`model_ema`) where the file has one, as CompVis's own
        sampling does; "ema": the moving average; "model": the weights of the last training step

    Returns
    -------
    The prior, frozen, in float32 on the CPU.

    Raises
    ------
    ValueError : the file is broken, holds code, another model, another noise schedule, or a weight that is not finite
    """
    if weights not in ("auto", "ema", "model"):
        raise ValueError(f"weights={weights!r}: must be 'auto', 'ema' or 'model'")
    state = _read(Path(file))
    if f"{UNET}input_blocks.0.0.weight" not in state:
        raise ValueError(f"{file} has no U-Net of latent diffusion; its tensors are {', '.join(sorted(state)[:20])}")
    scale = state.get("scale_factor", torch.ones(()))
    if scale.numel() != 1 or not 0 < scale.item() < float("inf"):
        raise ValueError(f"{file} has scale_factor={scale.tolist()}: must be one positive number")
    given, ours = state.get("alphas_cumprod"), cin256_alpha_bar()
    if given is not None and (given.shape != ours.shape or not torch.allclose(given.double(), ours, rtol=1e-3)):
        raise ValueError(
            f"{file} was trained with another noise schedule than 1000 steps, linear_start 0.0015, linear_end 0.0195: "
            "it cannot be used"
        )
    if weights == "ema" or weights == "auto" and any(key.startswith("model_ema.diffusion_model") for key in state):
        averages = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in _part(state, UNET)}
        if missing := sorted(set(averages.values()) - state.keys()):
            raise ValueError(f"{file} has no moving average of the whole U-Net; missing: {', '.join(missing)}")
        state = state | {key: state[average] for key, average in averages.items()}
    with torch.device("meta"):  # nothing is allocated before the shapes of the file fit
        unet, autoencoder, embedding = _modules(kind, scale=scale.item())
    try:
        _fill(unet, _part(state, UNET), _convert_unet)
        _fill(autoencoder, {k: t for k, t in _part(state, AUTOENCODER).items() if not k.startswith(LOSS)}, _convert_vq)
        _fill(embedding, _part(state, EMBEDDER), lambda part, _: {"weight": part[f"{EMBEDDER}embedding.weight"]})
    except Exception as error:  # diffusers' converters raise errors of many kinds for missing and misshapen tensors
        raise ValueError(f"{file} is not the latent diffusion model it should be: {error}") from error
    return Prior(unet, autoencoder, embedding, ours).freeze_()


def _fill(module: nn.Module, part: dict[str, Tensor], convert: Any) -> None:
    """Gives a module on the device `meta` the tensors of its part of a checkpoint: each of them, and no other."""
    if broken := [key for key, tensor in part.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{len(broken)} tensors not finite: {', '.join(broken)}")
    converted = convert(part, getattr(module, "config", None))
    used = {tensor.data_ptr() for tensor in converted.values()}  # the converters give views
    if unknown := [key for key, tensor in part.items() if tensor.data_ptr() not in used]:
        raise ValueError(f"{len(unknown)} tensors unknown: {', '.join(unknown)}")
    module.load_state_dict({key: tensor.float().clone() for key, tensor in converted.items()}, assign=True)


def _convert_unet(part: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint(part, config)


def _convert_vq(part: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    codes = f"{AUTOENCODER}quantize.embedding.weight"  # which a VAE has not
    return convert_ldm_vae_checkpoint(part, config) | {"quantize.embedding.weight": part[codes]}


def _modules(kind: Kind, *, scale: float) -> tuple[nn.Module, nn.Module, nn.Embedding]:
    """U-Net, autoencoder and class embeddings, with the modules' own initialisation."""
    from diffusers import UNet2DConditionModel, VQModel

    lower = len(kind.unet_widths) - 1  # levels with attention
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=kind.latent_channels,
        out_channels=kind.latent_channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
        block_out_channels=kind.unet_widths,
        layers_per_block=2,
        norm_num_groups=32,
        cross_attention_dim=kind.conditioning_width,
        attention_head_dim=1,  # the number of heads, under the name of their width
    )
    levels = len(kind.autoencoder_widths)
    autoencoder = VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=kind.autoencoder_widths,
        layers_per_block=2,
        latent_channels=kind.latent_channels,
        sample_size=256,
        num_vq_embeddings=kind.codebook,
        norm_num_groups=32,
        scaling_factor=scale,
    )
    return unet, autoencoder, nn.Embedding(kind.classes + 1, kind.conditioning_width)


class _Placeholder:
    """Stands for an object of the training program: takes any argument, does nothing."""

    def __new__(cls, *args: Any, **options: Any) -> "_Placeholder":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's `state_dict`, without executing what is in the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: place the model.ckpt of a released latent diffusion model there")
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in objects if not name.startswith(HARMLESS))
        if not refused:
            placeholders = [(type("Placeholder", (_Placeholder,), {}), name) for name in objects]
            with torch.serialization.safe_globals(placeholders):
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken file raises errors of many kinds; torch's message proposes to run the code
        raise ValueError(
            f"{file} is broken or no checkpoint of PyTorch 1.6 or later ({type(error).__name__}): download it again"
        ) from error
    if refused:
        raise ValueError(
            f"{file} holds {', '.join(refused)}, which could run code; nothing of it was run. If you trust the file, "
            "save its weights alone: torch.save({'state_dict': weights}, 'model.ckpt')"
        )
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) and _has_numbers(tensor) for key, tensor in state.items()
    ):
        raise ValueError(f"{file} has no 'state_dict' of tensors: it is not a checkpoint of latent diffusion")
    return state


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
