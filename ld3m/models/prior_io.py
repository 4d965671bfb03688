"""Read and write priors.

A prior is a CompVis checkpoint (`model.ckpt`), a folder or hub repository of diffusers, laid out as `LAYOUT` says, or a
link: a folder with `source.json`, the source of the prior, the classes taken from it, and its fingerprint.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import nn

from ld3m.data.images import some
from ld3m.data.subsets import IMAGENET, imagenet_indices
from ld3m.models.compvis import load_checkpoint, read_pickled
from ld3m.models.diffusion_prior import (
    DENOISERS,
    IncompatiblePrior,
    Prior,
    channels_of_latents,
    cin256_schedule,
    schedule_of,
)
from ld3m.models.networks import require_finite_weights
from ld3m.models.prior_variants import take_label_table, with_classes
from ld3m.runtime import paths
from ld3m.runtime.hub import go_offline_if_unreachable
from ld3m.runtime.storage import new_folder, write_json

LINK_FILE = "source.json"
WEIGHTS = "diffusion_pytorch_model"
EMBEDDER = "class_embedder/model.safetensors"
UNSUPPORTED = ("num_class_embeds", "class_embed_type", "addition_embed_type", "encoder_hid_dim")
AUTOENCODERS = ("VQModel", "AutoencoderKL", "AutoencoderTiny", "TAEF2")
TAEF2_FILES = ("taef2_encoder.pth", "taef2_decoder.pth")
OWN = {"unet", "vqvae", "scheduler", "class_embedder", LINK_FILE}  # what `save_prior` and `link_prior` write
LAYOUT = (
    f"a diffusers folder has unet/ or transformer/, vqvae/ or vae/ (each with config.json and {WEIGHTS}.safetensors), "
    "scheduler/scheduler_config.json and, for a U-Net with classes, "
    f"{EMBEDDER} with `weight` (classes + 1, D): the token of each class, last that of none; of a CompVis checkpoint, "
    "name the file"
)


class Link(BaseModel):
    """The content of `source.json`; `sha256` is the fingerprint of the prior with these classes."""

    source: str
    classes: tuple[int, ...]
    sha256: str


def load_prior(source: str | Path) -> Prior:
    """Load a prior, frozen, in float32 on the CPU.

    `source` is a CompVis checkpoint, a diffusers folder, a link (paths relative to the repository), or a hub id.
    FileNotFoundError for a missing file or folder, or where the hub cannot be reached; ValueError for a broken file, or
    parts that are no prior which can be used.
    """
    path = paths.ROOT / Path(source).expanduser()
    if path.is_file() or path.suffix == ".ckpt":
        return load_checkpoint(path)
    if (path / LINK_FILE).is_file():
        return _load_linked(path)
    return _read_folder(_fetch(source) if _is_hub_id(source) else path)


def load_autoencoder(source: str) -> nn.Module:
    """Load an autoencoder for a prior that is trained here, in float32 on the CPU.

    `source` is a diffusers folder or hub id of one of `AUTOENCODERS`, or of a prior with such a part, or a folder with
    the two files of TAEF2 as released. Raises the errors of `load_prior`.
    """
    folder = _fetch(source) if _is_hub_id(source) else paths.ROOT / Path(source).expanduser()
    if any((folder / name).exists() for name in TAEF2_FILES):
        return _read_taef2(folder)
    for place in (folder, folder / "vqvae", folder / "vae"):
        if (place / "config.json").is_file():
            return _read_autoencoder(place)
    raise FileNotFoundError(
        f"no autoencoder in {folder}: it must have config.json and {WEIGHTS}.safetensors of a "
        f"{', '.join(AUTOENCODERS)}, alone or in vqvae/ or vae/, or {' and '.join(TAEF2_FILES)}"
    )


def _is_hub_id(source: str | Path) -> bool:
    """Tell hub ids from folders: below one that exists, where anyone could own the name on the hub, all are folders."""
    is_folder = (paths.ROOT / Path(source).expanduser()).parent.is_dir()
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source))) and not is_folder


def fitted(
    prior: Prior,
    *,
    source: str,
    size_px: int,
    channels: int,
    names: Sequence[str],
    classes: Sequence[int] | None,
    subset: str | None,
) -> tuple[Prior, tuple[int, ...]]:
    """Restrict the prior of `source` to the classes of a data set, and return their indices in it.

    `classes` lists the prior's class of each class of the data set, whose names are `names`. A prior with 1000 classes
    is taken for one of ImageNet-1k: its classes are those of `subset`, or those with the wnids or words `names`, and
    `classes`, if given, must be the same. Without `classes`, any other prior must have as many classes as the data set,
    in the same order. ValueError where they do not fit.
    """
    of_imagenet = None
    if prior.classes == 1000:
        of_imagenet = imagenet_indices(names) if subset is None else IMAGENET[subset]
    if not prior.is_conditional:
        if classes is not None:
            raise ValueError(f"prior.classes={list(classes)}, but {source} has no classes: leave it empty")
        classes = ()
    elif classes is None:
        classes = of_imagenet or range(prior.classes)
        if len(classes) != len(names):
            unknown = [name for name in names if imagenet_indices([name]) is None]
            reason = f": {some(unknown)} are neither wnid nor word of ImageNet-1k" if prior.classes == 1000 else ""
            raise ValueError(
                f"{source} has {prior.classes} classes, the data set {len(names)}{reason}: list in prior.classes, for "
                "each class of the data set, which of the prior's it is, counted from 0"
            )
    elif len(classes) != len(names):
        raise ValueError(f"prior.classes has {len(classes)} entries: must have one for each of {len(names)} classes")
    elif len(set(classes)) < len(names):
        raise ValueError(f"prior.classes={list(classes)} repeats a class of the prior: each class needs its own")
    elif of_imagenet and tuple(classes) != of_imagenet:
        raise ValueError(
            f"prior.classes={list(classes)} is not the order of the data set, whose classes {names[0]}, {names[1]} ... "
            f"are {list(of_imagenet)} of ImageNet-1k: write these, or leave prior.classes empty"
        )
    prior = with_classes(prior, classes)
    prior.check(size_px=size_px, channels=channels, classes=len(names))
    return prior, tuple(classes)


def link_prior(folder: Path, *, source: str, **fitting: Any) -> tuple[int, ...]:
    """Write a link to the prior of `source`, with the further arguments of `fitted`, and return the classes taken.

    Nothing is copied, and `load_prior(folder)` refuses a source that has changed since.
    """
    _require_own(folder)
    prior, classes = fitted(load_prior(source), source=source, **fitting)
    with new_folder(folder) as partial:
        write_json(partial / LINK_FILE, {"source": source, "classes": classes, "sha256": prior.fingerprint()})
    return classes


def linked_source(folder: Path) -> str | None:
    """The source of a link; None for a folder that is none, or is missing."""
    return _read_link(folder).source if (folder / LINK_FILE).is_file() else None


def _read_link(folder: Path) -> Link:
    try:
        return Link.model_validate_json((folder / LINK_FILE).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / LINK_FILE} is broken ({error}): `dvc repro -f prior` writes it again") from error


def _load_linked(folder: Path) -> Prior:
    link = _read_link(folder)
    if (paths.ROOT / link.source / LINK_FILE).is_file():
        raise ValueError(f"{folder} links to {link.source}, which is a link itself: give prior.source its source")
    prior = with_classes(load_prior(link.source), link.classes)
    if prior.fingerprint() != link.sha256:
        raise IncompatiblePrior(
            f"{link.source} has changed since {folder} linked to it: restore it, or dvc repro -f prior"
        )
    return prior


def _require_own(folder: Path) -> None:
    """Raise FileExistsError where writing a prior to a folder would delete what is of another origin."""
    if others := folder.exists() and {path.name for path in folder.iterdir()} - OWN:
        raise FileExistsError(
            f"{folder} has {', '.join(sorted(others)[:5])}, of no prior written here, which would be lost: name a new "
            "folder"
        )


def save_prior(prior: Prior, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a prior with the noise schedule of cin256-v2 as a diffusers folder, whole or not at all.

    `folder` is new or empty, or has an earlier prior, which is replaced; `dtype` is that of the stored weights.
    """
    _require_own(folder)
    alpha_bar, *sampling = schedule_of(cin256_schedule())
    if [prior.prediction, prior.spacing] != sampling or not prior.alpha_bar.equal(alpha_bar):
        raise ValueError("only priors with the noise schedule of cin256-v2 are written; link to the folders of others")
    with new_folder(folder) as partial:
        for module, name in ((prior.unet, "unet"), (prior.autoencoder, "vqvae")):
            stored = nn.Module.to(deepcopy(module), dtype)  # diffusers' own `to` warns without need
            stored.save_pretrained(partial / name)
        cin256_schedule().save_pretrained(partial / "scheduler")
        (partial / "class_embedder").mkdir()
        save_file({"weight": prior.embedding.weight.detach().to(dtype).contiguous()}, partial / EMBEDDER)


def _fetch(hub_id: str) -> Path:
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
            f"prior.source={hub_id} is no folder, and the hub did not give it ({type(error).__name__}: {error}). "
            f"Correct the name, log in to the hub, or without a network name a folder of its parts: {LAYOUT}"
        ) from error
    return folder


def _read_folder(folder: Path) -> Prior:
    from diffusers import DDIMScheduler

    if not folder.is_dir():
        raise FileNotFoundError(f"no prior in {folder}: there is no such folder")
    unet, vae = _part(folder, "unet", "transformer"), _part(folder, "vqvae", "vae")
    file = _part(folder, "scheduler") / "scheduler_config.json"
    denoiser, autoencoder = _read_model(unet, DENOISERS), _read_autoencoder(vae)
    embedding = _read_embedding(denoiser, unet)
    with _named(file):
        config = json.loads(file.read_text())
        if "beta_start" not in config:
            raise ValueError(f"{config['_class_name']} has no beta_start: must be a schedule of betas")
        prior = Prior(denoiser, autoencoder, embedding, *schedule_of(DDIMScheduler.from_config(config)))
    inputs, outputs, latent = (
        denoiser.config.in_channels,
        denoiser.config.out_channels,
        channels_of_latents(autoencoder),
    )
    if inputs != latent or (outputs or latent) not in (latent, 2 * latent):
        raise ValueError(f"{unet} takes {inputs} channels and gives {outputs}, but latents of {vae} have {latent}")
    return prior.freeze_()


def _read_autoencoder(folder: Path) -> nn.Module:
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


def _read_taef2(folder: Path) -> nn.Module:
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
