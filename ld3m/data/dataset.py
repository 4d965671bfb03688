"""Image datasets as tensors, their normalization, and the choice of real images."""

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld3m.data import decoding, images, subsets
from ld3m.runtime import seeds


@dataclass(frozen=True)
class Normalization:
    """Convert between `x`, in [-1, 1], and normalized images; nothing else does.

    ValueError unless there is one mean and one positive std, of images in [0, 1], for each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: give one mean and one positive std a channel")

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.ndim < 3 or images.shape[-3] != len(self.mean):
            raise ValueError(f"normalization has {len(self.mean)} channels, the images are {tuple(images.shape)}")
        return images.new_tensor(self.mean)[:, None, None], images.new_tensor(self.std)[:, None, None]  # (C,1,1)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize images (..., C, H, W) in [-1, 1]."""
        mean, std = self._statistics(x)
        return ((x + 1) / 2 - mean) / std

    def normalize_uint8(self, uint8: Tensor) -> Tensor:
        """Normalize uint8 images (..., C, H, W) to float32: `normalize` of their `x` up to rounding, but faster."""
        normalized = uint8.float()
        mean, std = self._statistics(normalized)
        return normalized.sub_(255 * mean).div_(255 * std)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Invert `normalize`; does not clamp."""
        mean, std = self._statistics(normalized)
        return (normalized * std + mean) * 2 - 1


@dataclass(frozen=True, eq=False)
class Split:
    """Holds labeled images, on any device; labels and all indices into the split are on the CPU."""

    stored: Tensor  # (M, C, H, W), uint8
    labels: Tensor  # (N,), int64
    classes: tuple[str, ...]  # the name of each label
    rows: Tensor | None = None  # (N,), which of the stored images are the split's; default: all
    file: Path | None = None  # of `stored`; a pickled split holds its name alone, so that processes share memory

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"stored": None} if self.file else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.file:
            vars(self)["stored"] = decoding.open_images(self.file)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.stored.shape[1:])

    @property
    def device(self) -> torch.device:
        """The device of the images."""
        return self.stored.device

    @property
    def uint8(self) -> Tensor:
        """All images (N, C, H, W); a copy if the split has `rows`."""
        return self.stored if self.rows is None else self.stored[self.rows]

    def _at(self, index: Tensor) -> Tensor:
        return self.stored[index if self.rows is None else self.rows[index]]

    def chunks(self) -> Iterator[Tensor]:
        """Yield all images in order, uint8 (n, C, H, W) on the CPU, some at once."""
        return (self._at(index).cpu() for index in torch.arange(len(self)).split(256))

    def x(self, index: Tensor | None = None) -> Tensor:
        """Return float32 images (n, C, H, W) in [-1, 1]: those at `index` (n,), default all, on the split's device."""
        return (self.uint8 if index is None else self._at(index)).float() / 127.5 - 1

    def normalized(self, normalization: Normalization, index: Tensor) -> Tensor:
        """Return the normalized float32 images (n, C, H, W) at `index` (n,), on the split's device."""
        return normalization.normalize_uint8(self._at(index))

    def to(self, device: torch.device | str) -> "Split":
        """Return the split with its images on a device; itself if `device` is equal to its device."""
        if self.device == torch.device(device):
            return self
        return replace(self, stored=self.uint8.to(device), rows=None, file=None)

    def of_class(self, label: int) -> Tensor:
        """Return the ascending indices (n,) of the images of one class."""
        return torch.nonzero(self.labels == label).flatten()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits with the same classes, and the normalization they share."""

    name: str
    train: Split
    validation: Split
    test: Split
    normalization: Normalization

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the dataset with its images on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in ("train", "validation", "test")})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every image, label and class name of the three splits, in order."""
        digest = hashlib.sha256(repr(self.train.classes).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(repr((len(split), *split.shape)).encode())
            for chunk in split.chunks():
                digest.update(chunk.contiguous().numpy())
            digest.update(split.labels.contiguous().numpy())
        return digest.hexdigest()


def measure_normalization(split: Split) -> Normalization:
    """Measure the mean and population std of each channel on [0, 1], exactly, from the counts of the 256 values."""
    counts = sum(
        torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in chunk.unbind(1)])
        for chunk in split.chunks()
    )  # (C, 256)
    weights = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values  # (C,)
    variance = (weights * (values - mean[:, None]) ** 2).sum(dim=1)
    return Normalization(tuple(mean.tolist()), tuple(variance.sqrt().tolist()))


def initial_indices(split: Split, *, ipc: int, seed: int) -> Tensor:
    """Draw the distinct real images from which a run and its controls start.

    Returns
    -------
    Tensor
        Indices (classes * ipc,), class by class; in each class, those of a smaller `ipc` begin those of a larger one.

    Raises
    ------
    ValueError
        If a class has fewer than `ipc` images, or `ipc` is below 1.
    """
    chosen = []
    for label, name in enumerate(split.classes):
        members = split.of_class(label)
        if not 1 <= ipc <= len(members):
            raise ValueError(f"ipc={ipc}: class {name!r} has {len(members)} images, ipc must be in 1..{len(members)}")
        order = torch.randperm(len(members), generator=seeds.generator(seed, "initial", label))
        chosen.append(members[order[:ipc]])
    return torch.cat(chosen)


def class_batch(split: Split, label: int, *, count: int, generator: torch.Generator) -> Tensor:
    """Draw indices (min(count, n),) of images of one class without replacement."""
    members = split.of_class(label)
    return members[torch.randperm(len(members), generator=generator)[:count]]


def load_dataset(
    source: str | Path,
    *,
    name: str,
    size_px: int,
    channels: int,
    splits: Mapping[str, str | float],
    image_column: str = "image",
    label_column: str = "label",
    classes: str | Sequence[str | int] | None = None,
    normalization: Normalization | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Dataset:
    """Read a dataset as uint8 images; decode them once and then map them from files (see `images`).

    Raises FileNotFoundError if data are missing, ValueError if they are broken or an argument does not fit them.

    Parameters
    ----------
    source
        A folder (relative: to the repository root) of `<split>.parquet` or `<split>-*.parquet`, there or one folder
        down, or of `<split>/<class>/<image files>`; else the id of a dataset on the Hugging Face hub.
    name
        Names the dataset in errors and results; nothing else depends on it.
    size_px, channels
        Images become squares of this side, with 1 (gray) or 3 (RGB) channels: see `decoding.to_square`.
    splits
        The source's split for train, validation and test. Validation may be a share of train, in (0, 1), drawn by
        `seed` from each class.
    image_column, label_column
        The columns of parquet files and hub datasets.
    classes
        The classes to keep, in this order, by name (a number is the name where classes are named by numbers, else a
        position), or the name of a subset of ImageNet-1k (`subsets`); default: all. Classes of ImageNet-1k that the
        source names by wnid are named by words; either chooses them.
    normalization
        Default: measured on train.
    device
        Where the images are; on the CPU they stay in their files.
    """
    where = f"dataset {name!r}"
    if channels not in (1, 3):
        raise ValueError(f"{where}: channels={channels}: must be 1 (gray) or 3 (RGB)")
    if normalization and len(normalization.mean) != channels:
        given = f"normalization has {len(normalization.mean)} means, but channels={channels}"
        raise ValueError(f"{where}: {given}: give one mean and one std a channel, or leave normalization empty")
    if len(set(splits.values())) < 3:
        advice = "each needs its own; validation may be a share of train, such as 0.1"
        raise ValueError(f"{where}: splits={dict(splits)} names one split twice: {advice}")
    sources = {}
    for part in ("train", "validation", "test"):  # classes are in the order of train's
        if isinstance(split := splits[part], str):
            columns = {"image_column": image_column, "label_column": label_column}
            sources[part] = images.open_split(str(source), split, **columns, where=f"{where}, split {split!r}")
    names = list(dict.fromkeys(known for each in sources.values() for known in each.classes))
    if len(names) < 2:
        given = f"{source}, split {splits['train']!r}, has one class, {names[0]!r}; at least two are needed"
        advice = f"a folder for each class in {splits['train']}/, or in parquet files its own {label_column!r}"
        raise ValueError(f"{where}: {given}: make {advice}")
    kept = _kept(names, classes, where)
    selections = {part: each.select(kept) for part, each in sources.items()}
    for selection in selections.values():
        if empty := [kept[label] for label in sorted(set(range(len(kept))) - set(selection.labels.tolist()))]:
            advice = f"add some ({', '.join(decoding.FORMATS)}), or list only the other classes in classes"
            raise ValueError(f"{selection.where} has no images of class {decoding.some(empty)}: {advice}")
    loaded, named = {}, tuple(map(subsets.word, kept))
    for part, selection in selections.items():
        uint8, file = decoding.decoded(selection, size_px=size_px, channels=channels)
        loaded[part] = Split(uint8, torch.from_numpy(selection.labels), named, file=file)
    if "validation" not in loaded:
        loaded |= _divide(loaded["train"], splits["validation"], seed=seed, where=where)
    dataset = Dataset(name=name, normalization=normalization or measure_normalization(loaded["train"]), **loaded)
    return dataset.to(device)


def _kept(names: list[str], classes: str | Sequence[str | int] | None, where: str) -> list[str]:
    """The names that `classes` chooses out of all names."""
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(subsets.word(name.lower()).lower(), name)) != name:
            raise ValueError(f"{where}: the classes {other!r} and {name!r} are one or differ in case only: rename one")
    if isinstance(classes, str):
        classes = subsets.of_imagenet(classes, names, where=where)
    numbers = {name.lstrip("0") or "0": name for name in names if name.isdecimal()}
    positions = "" if numbers else f", or positions 0..{len(names) - 1}"
    numbers = numbers or {str(position): name for position, name in enumerate(names)}
    by_word = {subsets.word(name): name for name in names}
    kept = []
    for item in names if classes is None else classes:
        name = images.nfc(str(item))
        name = by_word.get(subsets.word(name), name)
        if name not in names and type(item) is int:
            name = numbers.get(name, name)
        if name not in names:
            near = decoding.some(difflib.get_close_matches(name, names, n=5, cutoff=0))
            raise ValueError(
                f"{where}: classes has {item!r}, which is no class: write names, such as {near}{positions}"
            )
        if name in kept:
            raise ValueError(f"{where}: classes={list(classes)} has the class {name!r} twice: remove one")
        kept.append(name)
    if not kept:
        raise ValueError(f"{where}: classes={classes} keeps no class: list some, or leave it empty for all")
    return kept


def _divide(split: Split, share: float, *, seed: int, where: str) -> dict[str, Split]:
    """Draw the share of each class that is held for validation."""
    held = torch.zeros(len(split), dtype=torch.bool)
    for label, name in enumerate(split.classes):
        members = split.of_class(label)
        count = round(share * len(members))
        if not 0 < count < len(members):
            given = f"splits.validation={share} takes {count} of the {len(members)} training images of class {name!r}"
            advice = "train and validation both need at least one: change the share, or add images of this class"
            raise ValueError(f"{where}: {given}: {advice}")
        order = torch.randperm(len(members), generator=seeds.generator(seed, "validation", name))
        held[members[order[:count]]] = True
    rows = {"train": torch.nonzero(~held).flatten(), "validation": torch.nonzero(held).flatten()}
    return {part: replace(split, labels=split.labels[chosen], rows=chosen) for part, chosen in rows.items()}
