"""Read the parts of a prior from a folder or a hub repository of diffusers: files from elsewhere, checked."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ld3m.models.compvis import read_pickled
from ld3m.models.diffusion_prior import DENOISERS, Prior, channels_of_latents, schedule_of
from ld3m.models.networks import require_finite_weights
from ld3m.models.prior_variants import take_label_table
from ld3m.runtime.hub import go_offline_if_unreachable

WEIGHTS = "diffusion_pytorch_model"
EMBEDDER = "class_embedder/model.safetensors"
UNSUPPORTED = ("num_class_embeds", "class_embed_type", "addition_embed_type", "encoder_hid_dim")
AUTOENCODERS = ("VQModel", "AutoencoderKL", "AutoencoderTiny", "TAEF2")
TAEF2_FILES = ("taef2_encoder.pth", "taef2_decoder.pth")
LAYOUT = (
    f"a diffusers folder has unet/ or transformer/, vqvae/ or vae/ (each with config.json and {WEIGHTS}.safetensors), "
    "scheduler/scheduler_config.json and, for a U-Net with classes, "
    f"{EMBEDDER} with `weight` (classes + 1, D): the token of each class, last that of none; of a CompVis checkpoint, "
    "name the file"
)


def fetch(hub_id: str) -> Path:
    """The local copy of the parts of a hub repository; downloads only what it lacks."""
    from huggingface_hub import snapshot_download

    go_offline_if_unreachable()
    files = ("config.json", f"{WEIGHTS}.safetensors*", f"{WEIGHTS}-*.safetensors")
    patterns = [f"{model}{file}" for model in ("unet/", "transformer/", "vqvae/", "vae/", "") for file in files]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["scheduler/*.json", EMBEDDER, *patterns]))
        configs = [*folder.glob("config.json"), *folder.glob("*/config.json")]
        pickled = [file.parent for file in configs if not [*file.parent.glob("*.safetensors*")]]
        if pickled:
            files = [(model / f"{WEIGHTS}.bin").relative_to(folder).as_posix() for model in pickled]
            snapshot_download(hub_id, allow_patterns=files)
    except Exception as error:  # offline, unknown and gated repositories raise errors of many kinds
        raise FileNotFoundError(
            f"{hub_id} is no folder, and the hub did not give it ({type(error).__name__}: {error}). "
            f"Correct the name, log in to the hub, or without a network name a folder of its parts: {LAYOUT}"
        ) from error
    return folder


def read_folder(folder: Path) -> Prior:
    """The prior in a folder that is laid out as `LAYOUT` says; its parts must fit each other."""
    from diffusers import DDIMScheduler

    if not folder.is_dir():
        raise FileNotFoundError(f"no prior in {folder}: there is no such folder")
    unet, vae = _part(folder, "unet", "transformer"), _part(folder, "vqvae", "vae")
    file = _part(folder, "scheduler") / "scheduler_config.json"
    denoiser, autoencoder = _read_model(unet, DENOISERS), read_autoencoder(vae)
    embedding = _read_embedding(denoiser, unet)
    with _named(file):
        config = json.loads(file.read_text())
        if "beta_start" not in config:
            raise ValueError(f"{config['_class_name']} has no beta_start: must be a schedule of betas")
        prior = Prior(denoiser, autoencoder, embedding, *schedule_of(DDIMScheduler.from_config(config)))
    given, latent = denoiser.config, channels_of_latents(autoencoder)
    inputs, outputs = given.in_channels, given.out_channels
    if inputs != latent or (outputs or latent) not in (latent, 2 * latent):
        raise ValueError(f"{unet} takes {inputs} channels and gives {outputs}, but latents of {vae} have {latent}")
    return prior.freeze_()


def read_autoencoder(folder: Path) -> nn.Module:
    """The autoencoder in a folder, of one of `AUTOENCODERS`."""
    model = _read_model(folder, AUTOENCODERS)
    with _named(folder / "config.json"):
        given, channels = model.config, channels_of_latents(model)
        scale, shift = given.scaling_factor, given.get("shift_factor") or 0.0
        if not 0 < scale < math.inf or not math.isfinite(shift):
            raise ValueError(f"scaling_factor={scale} and shift_factor={shift} must be finite, the first above 0")
        mean, std = given.get("latents_mean"), given.get("latents_std")
        are_numbers = mean and std and len(mean) == len(std) == channels and all(map(math.isfinite, mean + std))
        if not (mean is std is None) and not (are_numbers and min(std) > 0):
            raise ValueError(f"latents_mean and latents_std must have {channels} finite values, those of std above 0")
    return model


def read_taef2(folder: Path) -> nn.Module:
    """TAEF2 from the two files that its authors release, read without executing what is in them."""
    from ld3m.models.tiny_autoencoder import TAEF2, of_released

    with _named(folder):
        model = TAEF2()
        model.load_state_dict(of_released(*[read_pickled(folder / name) for name in TAEF2_FILES]))
        require_finite_weights(model.state_dict())
    return model.eval().requires_grad_(False)


def _part(folder: Path, *names: str) -> Path:
    """The first of these folders that is there."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise FileNotFoundError(f"no prior in {folder}: {' or '.join(names)} missing; {LAYOUT}")


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Raise a ValueError that names the file where reading it fails."""
    try:
        yield
    except Exception as error:  # diffusers and safetensors raise errors of many kinds for a broken or foreign file
        advice = "replace the file, or name another prior" if file.exists() else LAYOUT
        raise ValueError(f"{file} cannot be used: {type(error).__name__}: {error}; {advice}") from error


def _read_model(folder: Path, allowed: Sequence[str]) -> nn.Module:
    """A model of diffusers with every tensor of its file and no other; pickles are read without executing them."""
    import diffusers

    from ld3m.models.tiny_autoencoder import TAEF2

    diffusers.logging.get_logger("diffusers.configuration_utils").setLevel("ERROR")  # it knows no latents_mean
    with _named(folder / "config.json"):
        config = json.loads((folder / "config.json").read_text())
        name = config["_class_name"]
        name = "DiTTransformer2DModel" if name == "Transformer2DModel" else name  # in released DiTs
        if name not in allowed:
            raise ValueError(f"it is of {name}, which must be {' or '.join(allowed)}")
        if further := [key for key in UNSUPPORTED if config.get(key) is not None]:
            raise ValueError(
                f"{', '.join(further)} is not supported: a U-Net has no classes, or attends to one vector of it, "
                "and latents are scaled by one factor"
            )
    kind = TAEF2 if name == "TAEF2" else getattr(diffusers, name)
    is_safe = any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))
    options = {"local_files_only": True, "torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    options |= {"use_safetensors": is_safe, "output_loading_info": True}
    with _named(folder / f"{WEIGHTS}.{'safetensors' if is_safe else 'bin'}"):
        model, read = kind.from_pretrained(folder, **options)
        missing, unknown = sorted(read["missing_keys"]), sorted(read["unexpected_keys"])
        if missing or unknown:
            raise ValueError(f"not the {name} of config.json: missing {missing[:5]}, unknown {unknown[:5]}")
        require_finite_weights(model.state_dict())
    return model


def _read_embedding(denoiser: nn.Module, folder: Path) -> nn.Embedding:
    """The class embeddings of a denoiser in `folder`: for a UNet2DConditionModel, those of a file beside it."""
    kind, file = type(denoiser).__name__, folder.parent / EMBEDDER
    if kind == "UNet2DModel":
        return nn.Embedding.from_pretrained(torch.zeros(1, 1))
    if kind == "DiTTransformer2DModel":
        with _named(folder):
            return take_label_table(denoiser)
    with _named(file):
        weight, width = load_file(file)["weight"].float(), denoiser.config.cross_attention_dim
        if weight.ndim != 2 or len(weight) < 2 or weight.shape[1] != width:
            raise ValueError(f"weight has the shape {tuple(weight.shape)}, which must be (classes + 1, {width})")
        require_finite_weights({"weight": weight})
        return nn.Embedding.from_pretrained(weight)
