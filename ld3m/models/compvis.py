"""Read `model.ckpt` of CompVis's class-conditional latent diffusion model (`cin256-v2`) as a prior.

Nothing in the file is executed: objects of the training program (PyTorch Lightning, omegaconf, numpy) become inert
placeholders, any other object is an error. diffusers renames the tensors of the U-Net and of the autoencoder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ld3m.models.diffusion_prior import Prior, cin256_alpha_bar
from ld3m.models.networks import require_finite_weights
from ld3m.runtime.seeds import forked

UNET, AUTOENCODER, EMBEDDER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
LOSS = f"{AUTOENCODER}loss."  # the discriminator and LPIPS, which trained the autoencoder
HARMLESS = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.")  # become placeholders, nothing is imported


@dataclass(frozen=True)
class Kind:
    """Sizes of a class-conditional latent diffusion model with a VQ autoencoder; by default those of `cin256-v2`."""

    unet_widths: tuple[int, ...] = (192, 384, 576, 960)  # model_channels times channel_mult
    classes: int = 1000  # without the null class
    conditioning_width: int = 512
    autoencoder_widths: tuple[int, ...] = (128, 256, 512)  # ch times ch_mult
    codebook: int = 8192


CIN256 = Kind()


def build(kind: Kind = CIN256, *, seed: int) -> Prior:
    """Build a frozen prior with random weights in float32; that of `CIN256` takes 1.8 GB."""
    with forked(seed, "compvis"):
        prior = Prior(*_modules(kind, scale=1.0), cin256_alpha_bar()).freeze_()
        # latents of unit variance: from codes near zero, the gradient of many steps leaves the range of float32
        prior.autoencoder.quantize.embedding.weight.normal_()
    return prior


def load_checkpoint(file: Path, *, kind: Kind = CIN256) -> Prior:
    """Load a CompVis checkpoint, saved by PyTorch 1.6 or later: a frozen prior, in float32 on the CPU.

    The U-Net is the moving average (`model_ema`) where the file has one, as in CompVis's own sampling. ValueError where
    the file is broken, holds code, another model, another noise schedule, or a weight that is not finite.
    """
    state = _read(Path(file))
    try:
        return _convert(state, kind)
    except Exception as error:  # diffusers' converters raise errors of many kinds for missing and misshapen tensors
        raise ValueError(f"{file} cannot be used as a latent diffusion model: {error}") from error


def _convert(state: dict[str, Tensor], kind: Kind) -> Prior:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    if f"{UNET}input_blocks.0.0.weight" not in state:
        raise ValueError(f"no U-Net of latent diffusion; its tensors are {', '.join(sorted(state)[:5])} ...")
    scale = state.get("scale_factor", torch.ones(()))
    if scale.numel() != 1 or not 0 < scale.item() < float("inf"):
        raise ValueError(f"scale_factor={scale.tolist()}: must be one positive number")
    ours = cin256_alpha_bar()
    given = state.get("alphas_cumprod", ours).double()
    if given.shape != ours.shape or not torch.allclose(given, ours, rtol=1e-3):
        raise ValueError("another noise schedule than 1000 steps, linear_start 0.0015, linear_end 0.0195")
    if any(key.startswith("model_ema.diffusion_model") for key in state):
        names = [key for key in state if key.startswith(UNET)]
        averages = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in names}
        if missing := sorted(set(averages.values()) - state.keys()):
            raise ValueError(f"no moving average of the whole U-Net; missing: {', '.join(missing[:5])}")
        state = state | {key: state[average] for key, average in averages.items()}
    with torch.device("meta"):  # nothing is allocated before the shapes of the file fit
        unet, autoencoder, embedding = _modules(kind, scale=scale.item())
    of_unet, of_autoencoder, of_embedder = (_part(state, prefix) for prefix in (UNET, AUTOENCODER, EMBEDDER))
    _fill(unet, of_unet, convert_ldm_unet_checkpoint(of_unet, unet.config))
    codes = {"quantize.embedding.weight": of_autoencoder[f"{AUTOENCODER}quantize.embedding.weight"]}  # no VAE has them
    _fill(autoencoder, of_autoencoder, convert_ldm_vae_checkpoint(of_autoencoder, autoencoder.config) | codes)
    _fill(embedding, of_embedder, {"weight": of_embedder[f"{EMBEDDER}embedding.weight"]})
    return Prior(unet, autoencoder, embedding, ours).freeze_()


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The finite tensors of one module, without the losses that trained it."""
    part = {key: tensor for key, tensor in state.items() if key.startswith(prefix) and not key.startswith(LOSS)}
    require_finite_weights(part)
    return part


def _fill(module: nn.Module, part: dict[str, Tensor], converted: dict[str, Tensor]) -> None:
    """Give a module on the device `meta` the tensors of its part of a checkpoint: each of them, and no other."""
    used = {tensor.data_ptr() for tensor in converted.values()}  # the converters give views
    if unknown := [key for key, tensor in part.items() if tensor.data_ptr() not in used]:
        raise ValueError(f"{len(unknown)} tensors unknown: {', '.join(unknown[:5])}")
    module.load_state_dict({key: tensor.float().clone() for key, tensor in converted.items()}, assign=True)


def _modules(kind: Kind, *, scale: float) -> tuple[nn.Module, nn.Module, nn.Embedding]:
    """U-Net, autoencoder and class embeddings, with the modules' own initialization."""
    from diffusers import UNet2DConditionModel, VQModel

    lower = len(kind.unet_widths) - 1  # levels with attention
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
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
        latent_channels=3,
        sample_size=256,
        num_vq_embeddings=kind.codebook,
        norm_num_groups=32,
        scaling_factor=scale,
    )
    return unet, autoencoder, nn.Embedding(kind.classes + 1, kind.conditioning_width)


class _Placeholder:
    """Stand for an object of the training program: take any argument, do nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    __setstate__ = __init__


def read_pickled(file: Path) -> Any:
    """What torch saved to a file, memory-mapped, without executing what is in it; ValueError where that is not
    possible."""
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in objects if not name.startswith(HARMLESS))
        if not refused:
            with torch.serialization.safe_globals([(_Placeholder, name) for name in objects]):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken file raises errors of many kinds; torch's message proposes to run the code
        raise ValueError(
            f"{file} is broken or no checkpoint of PyTorch 1.6 or later ({type(error).__name__}): download it again"
        ) from error
    raise ValueError(
        f"{file} holds {', '.join(refused)}, which could run code; nothing of it was run. If you trust the file, "
        "save its weights alone: torch.save({'state_dict': weights}, 'model.ckpt')"
    )


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's `state_dict`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: place the model.ckpt of a released latent diffusion model there")
    loaded = read_pickled(file)
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} has no 'state_dict' of tensors: it is not a checkpoint of latent diffusion")
    return state
