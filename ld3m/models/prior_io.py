"""Read and write priors.

A prior is a CompVis checkpoint (`model.ckpt`), a folder or hub repository of diffusers (see `diffusers_folder`), or a
link: a folder with `source.json`, the source of the prior, the classes taken from it, and its fingerprint.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import nn

from ld3m.data.decoding import some
from ld3m.data.subsets import IMAGENET, imagenet_indices
from ld3m.models.compvis import load_checkpoint
from ld3m.models.diffusers_folder import (
    AUTOENCODERS,
    EMBEDDER,
    TAEF2_FILES,
    WEIGHTS,
    fetch,
    read_autoencoder,
    read_folder,
    read_taef2,
)
from ld3m.models.diffusion_prior import IncompatiblePrior, Prior, cin256_schedule, schedule_of
from ld3m.models.prior_variants import with_classes, with_label_tables
from ld3m.runtime import paths
from ld3m.runtime.storage import new_folder, write_json

LINK_FILE = "source.json"
OWN = {"unet", "transformer", "vqvae", "scheduler", "class_embedder", LINK_FILE}  # what this module writes


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
    return read_folder(fetch(source) if _is_hub_id(source) else path)


def load_autoencoder(source: str) -> nn.Module:
    """Load an autoencoder for a prior that is trained here, in float32 on the CPU.

    `source` is a diffusers folder or hub id of one of `AUTOENCODERS`, or of a prior with such a part, or a folder with
    the two files of TAEF2 as released. Raises the errors of `load_prior`.
    """
    folder = fetch(source) if _is_hub_id(source) else paths.ROOT / Path(source).expanduser()
    if any((folder / name).exists() for name in TAEF2_FILES):
        return read_taef2(folder)
    for place in (folder, folder / "vqvae", folder / "vae"):
        if (place / "config.json").is_file():
            return read_autoencoder(place)
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
    is_dit = type(prior.unet).__name__ == "DiTTransformer2DModel"
    denoiser = ("transformer", with_label_tables(prior.unet, prior.embedding)) if is_dit else ("unet", prior.unet)
    with new_folder(folder) as partial:
        for name, module in (denoiser, ("vqvae", prior.autoencoder)):
            stored = nn.Module.to(deepcopy(module), dtype)  # diffusers' own `to` warns without need
            stored.save_pretrained(partial / name)
        cin256_schedule().save_pretrained(partial / "scheduler")
        if not is_dit:
            (partial / "class_embedder").mkdir()
            save_file({"weight": prior.embedding.weight.detach().to(dtype).contiguous()}, partial / EMBEDDER)
