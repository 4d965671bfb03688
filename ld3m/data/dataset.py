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

from ld3m.data import images, subsets
from ld3m.runtime import seeds


@dataclass(frozen=True)
class Normalization:
    """Converts between `x`, in [-1, 1], and normalized images; nothing else does.

    Parameters
    ----------
    mean, std : tuple of float
        One number a channel, of images in [0, 1]. ValueError unless each std is positive.
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
        """Normalizes images (..., C, H, W) in [-1, 1]."""
        mean, std = self._statistics(x)
        return ((x + 1) / 2 - mean) / std

    def normalize_uint8(self, uint8: Tensor) -> Tensor:
        """Normalizes uint8 images (..., C, H, W) to float32: `normalize` of their `x` up to rounding, in a third of the
        time."""
        normalized = uint8.float()
        mean, std = self._statistics(normalized)
        return normalized.sub_(255 * mean).div_(255 * std)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Inverts `normalize`; does not clamp."""
        mean, std = self._statistics(normalized)
        return (normalized * std + mean) * 2 - 1


@dataclass(frozen=True, eq=False)
class Split:
    """Holds labelled images.

    Parameters
    ----------
    stored : Tensor
        uint8 images (M, C, H, W) in 0..255, on any device.
    labels : Tensor
        int64 (N,), on the CPU, as are all indices into the split.
    classes : tuple of str
        The name of each label.
    rows : Tensor, optional
        (N,) which of the stored images are the split's; default: all.
    file : Path, optional
        The file from which `stored` is mapped. A pickled split then holds its name, so that processes share memory.
    """

    stored: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    rows: Tensor | None = None
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if self.file is None or name != "stored"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.file is not None:
            vars(self)["stored"] = images.open_images(self.file)

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

    def chunks(self, count: int) -> Iterator[Tensor]:
        """Yields all images in order, uint8 (n, C, H, W) on the CPU, at most `count` at once."""
        for index in torch.arange(len(self)).split(count):
            yield self._at(index).cpu()

    def x(self, index: Tensor | None = None) -> Tensor:
        """Returns float32 images (n, C, H, W) in [-1, 1]: those at `index` (n,), default all, on the split's device."""
        return (self.uint8 if index is None else self._at(index)).float() / 127.5 - 1

    def normalized(self, normalization: Normalization, index: Tensor) -> Tensor:
        """Returns the normalized float32 images (n, C, H, W) at `index` (n,), on the split's device."""
        return normalization.normalize_uint8(self._at(index))

    def to(self, device: torch.device | str) -> "Split":
        """Returns the split with its images on a device; itself if `device` is equal to its device."""
        if self.device == torch.device(device):
            return self
        return replace(self, stored=self.uint8.to(device), rows=None, file=None)

    @cached_property
    def _members(self) -> tuple[Tensor, ...]:
        return tuple(torch.nonzero(self.labels == label).flatten() for label in range(len(self.classes)))

    def of_class(self, label: int) -> Tensor:
        """Returns the ascending indices (n,) of the images of one class."""
        if not 0 <= label < len(self.classes):
            raise ValueError(f"label={label}: must be in 0..{len(self.classes) - 1}")
        return self._members[label]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits with the same classes, and the normalization they share."""

    name: str
    train: Split
    validation: Split
    test: Split
    normalization: Normalization

    def to(self, device: torch.device | str) -> "Dataset":
        """Returns the dataset with its images on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in ("train", "validation", "test")})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every image, label and class name of the three splits, in order."""
        digest = hashlib.sha256(repr(self.train.classes).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(repr((len(split), *split.shape)).encode())
            for chunk in split.chunks(4096):
                digest.update(chunk.contiguous().numpy())
            digest.update(split.labels.contiguous().numpy())
        return digest.hexdigest()


def measure_normalization(split: Split) -> Normalization:
    """Measures the mean and population std of each channel on [0, 1], exactly, from the counts of the 256 values."""
    counts = torch.zeros(split.shape[0], 256, dtype=torch.int64)  # (C,256)
    for chunk in split.chunks(256):
        for channel in range(len(counts)):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    weights = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values  # (C,)
    variance = (weights * (values - mean[:, None]) ** 2).sum(dim=1)
    return Normalization(tuple(mean.tolist()), tuple(variance.sqrt().tolist()))


def initial_indices(split: Split, *, ipc: int, seed: int) -> Tensor:
    """Draws the distinct real images from which a run and its controls start.

    Parameters
    ----------
    ipc : int
        Images per class. The choice for a smaller `ipc` begins, class by class, that for a larger one.

    Returns
    -------
    Tensor
        Indices (classes * ipc,), class by class.

    Raises
    ------
    ValueError
        If a class has fewer than `ipc` images.
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
    """Draws indices (min(count, n),) of images of one class without replacement."""
    if count < 1:
        raise ValueError(f"count={count}: must be at least 1")
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
    """Reads a dataset as uint8 images; decodes them once and then maps them from files (see `images`).

    Parameters
    ----------
    source : str or Path
        A folder (relative: to the repository root) of `<split>.parquet` or `<split>-*.parquet`, there or one folder
        down, or of `<split>/<class>/<image files>`; else the id of a dataset on the Hugging Face hub.
    name : str
        Names the dataset in errors and results; nothing else depends on it.
    size_px, channels : int
        Images become squares of this side, with 1 (grey) or 3 (RGB) channels: see `images.to_square`.
    splits : mapping
        The source's split for train, validation and test. Validation may be a share of train, in (0, 1), drawn by
        `seed` from each class.
    image_column, label_column : str
        The columns of parquet files and hub datasets.
    classes : str or sequence, optional
        The names or indices of the classes to keep, in this order, or the name of a subset of ImageNet-1k (`subsets`);
        default: all.
    normalization : Normalization, optional
        Default: measured on train.
    device : str
        Where the images are; on the CPU they stay in their files.

    Raises
    ------
    FileNotFoundError
        If data are missing; the message says what to place where.
    ValueError
        If data are broken, or an argument does not fit them.
    """
    where = f"dataset {name!r}"
    if channels not in (1, 3) or size_px < 1:
        raise ValueError(
            f"{where}: channels={channels}, size_px={size_px}: channels must be 1 or 3, size_px at least 1"
        )
    if normalization and len(normalization.mean) != channels:
        raise ValueError(f"{where}: normalization has {len(normalization.mean)} channels, channels={channels}")
    _check_splits(splits, where)
    stored = {part: splits[part] for part in ("train", "validation", "test") if isinstance(splits[part], str)}
    names = {part: f"{where}, split {split!r}" for part, split in stored.items()}
    columns = {"image_column": image_column, "label_column": label_column}
    sources = {
        part: images.open_split(str(source), split, where=names[part], **columns) for part, split in stored.items()
    }
    known = dict.fromkeys(class_name for each in sources.values() for class_name in each.classes)  # train's first
    kept = _kept(list(known), classes, where)
    selections = {part: each.select(kept) for part, each in sources.items()}
    for part, selection in selections.items():
        if empty := sorted(set(range(len(kept))) - set(selection.labels.tolist())):
            without = images.some([kept[label] for label in empty])
            raise ValueError(f"{names[part]} has no images of class {without}: add them, or leave it out of classes")
    divided = {}
    if "validation" not in selections:
        labels = torch.from_numpy(selections["train"].labels)
        divided = _divide(labels, kept, float(splits["validation"]), seed=seed, where=where)
    loaded = {}
    for part, selection in selections.items():
        file_name = f"{Path(source).name}-{stored[part]}"
        uint8, file = images.decoded(selection, name=file_name, size_px=size_px, channels=channels, where=names[part])
        loaded[part] = Split(uint8, torch.from_numpy(selection.labels), tuple(kept), file=file)
    whole = loaded["train"]
    loaded |= {part: replace(whole, labels=whole.labels[rows], rows=rows) for part, rows in divided.items()}
    return Dataset(name=name, normalization=normalization or measure_normalization(loaded["train"]), **loaded).to(
        device
    )


def _check_splits(splits: Mapping[str, str | float], where: str) -> None:
    if set(splits) != {"train", "validation", "test"}:
        raise ValueError(f"{where}: splits has the keys {sorted(splits)}: give train, validation and test")
    names = [split for split in splits.values() if isinstance(split, str)]
    share = splits["validation"]
    if len(set(names)) != len(names) or not {splits["train"], splits["test"]} <= set(names):
        raise ValueError(f"{where}: splits={dict(splits)}: name three different splits, or a share as validation")
    if share not in names and not 0 < share < 1:
        raise ValueError(f"{where}: splits.validation={share}: a share must be between 0 and 1")


def _kept(names: list[str], classes: str | Sequence[str | int] | None, where: str) -> list[str]:
    if classes is None:
        return names
    if isinstance(classes, str):
        classes = subsets.of_imagenet(classes, names, where=where)
    kept = [names[item] if type(item) is int and 0 <= item < len(names) else str(item) for item in classes]
    for item in kept:
        if item not in names:
            near = [known for known in names if item.lower() in known.lower()]
            near = images.some(near or difflib.get_close_matches(item, names) or names)
            raise ValueError(
                f"{where}: classes has {item!r}: allowed are 0..{len(names) - 1} and class names, such as {near}"
            )
    if not kept or len(set(kept)) != len(kept):
        raise ValueError(f"{where}: classes={list(classes)}: name each class to keep once")
    return kept


def _divide(labels: Tensor, classes: list[str], share: float, *, seed: int, where: str) -> dict[str, Tensor]:
    """Draws the share of each class that is held for validation; ascending indices for each split."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, class_name in enumerate(classes):
        members = torch.nonzero(labels == label).flatten()
        count = round(share * len(members))
        if not 0 < count < len(members):
            raise ValueError(
                f"{where}: splits.validation={share} is {count} of the {len(members)} training images of class "
                f"{class_name!r}: train and validation both need some"
            )
        order = torch.randperm(len(members), generator=seeds.generator(seed, "validation", class_name))
        held[members[order[:count]]] = True
    return {"train": torch.nonzero(~held).flatten(), "validation": torch.nonzero(held).flatten()}
