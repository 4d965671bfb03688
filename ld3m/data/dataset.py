"""Image datasets as tensors, the one Normalization, and the choice of real images."""

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ld3m.data import decoded, sources, subsets
from ld3m.runtime import seeds


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and std on [0, 1]; the only conversion between pixels ([-1, 1]) and images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(
                f"normalization needs one mean and one positive std a channel, got mean {self.mean} and "
                f"std {self.std}: change datasets.<name>.normalization in params.yaml"
            )

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim < 3 or x.shape[-3] != len(self.mean):
            raise ValueError(f"normalization has {len(self.mean)} channels, the tensor is {tuple(x.shape)}")
        return x.new_tensor(self.mean)[:, None, None], x.new_tensor(self.std)[:, None, None]  # (C,1,1)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Images (..., C, H, W) of pixels in [-1, 1] of the same shape."""
        mean, std = self._statistics(pixels)
        return ((pixels + 1) / 2 - mean) / std

    def normalize_uint8(self, uint8: Tensor) -> Tensor:
        """Images, float32, of stored ones (..., C, H, W): those that `normalize` makes of their pixels, up to rounding,
        in a third of the time."""
        images = uint8.float()
        mean, std = self._statistics(images)
        return images.sub_(255 * mean).div_(255 * std)

    def denormalize(self, images: Tensor) -> Tensor:
        """Pixels (..., C, H, W) of images of the same shape; the inverse of `normalize`, not clamped."""
        mean, std = self._statistics(images)
        return (images * std + mean) * 2 - 1


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images: `stored` uint8 (M, C, H, W) in 0..255, of which those at `rows` (N,) are the split's, or all
    (None); `labels` (N,) int64; and the name of each label.

    Images may lie on any device; labels, rows and indices stay on the CPU, where choosing among them waits for nothing.
    Where `stored` is mapped from a `file`, a pickled split holds its name instead: other processes share the pages.
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
            vars(self)["stored"] = decoded.open_images(self.file)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.stored.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.stored.device

    @property
    def uint8(self) -> Tensor:
        """All images (N, C, H, W), copied where they are a choice of those stored."""
        return self.stored if self.rows is None else self.stored[self.rows]

    def chunks(self, count: int) -> Iterator[Tensor]:
        """All images in order, uint8 (n, C, H, W) on the CPU, at most `count` at once."""
        for index in torch.arange(len(self)).split(count):
            yield self.stored[index if self.rows is None else self.rows[index]].cpu()

    def x(self, index: Tensor | None = None) -> Tensor:
        """Float32 pixels (n, C, H, W) in [-1, 1] of the images at `index` (n,), or of all, where the images are."""
        if index is None:
            return self.uint8.float() / 127.5 - 1
        return self.stored[index if self.rows is None else self.rows[index]].float() / 127.5 - 1

    def normalized(self, normalization: Normalization, index: Tensor) -> Tensor:
        """Float32 images (n, C, H, W) of those at `index` (n,), where they are."""
        return normalization.normalize_uint8(self.stored[index if self.rows is None else self.rows[index]])

    def to(self, device: torch.device | str) -> "Split":
        """The same split with its images on a device: this one, where they are there already."""
        if self.device == torch.device(device):
            return self
        return replace(self, stored=self.uint8.to(device), rows=None, file=None)

    @cached_property
    def _members(self) -> tuple[Tensor, ...]:
        return tuple(torch.nonzero(self.labels == label).flatten() for label in range(len(self.classes)))

    def of_class(self, label: int) -> Tensor:
        """Ascending indices (n,) of the images of one class."""
        if not 0 <= label < len(self.classes):
            raise ValueError(f"label is {label}, allowed are 0..{len(self.classes) - 1}")
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
        """The same dataset with its images on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in ("train", "validation", "test")})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every array, label and class name of the three splits, in order."""
        digest = hashlib.sha256(repr(self.train.classes).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(repr((len(split), *split.shape)).encode())
            for chunk in split.chunks(4096):
                digest.update(chunk.contiguous().numpy())
            digest.update(split.labels.contiguous().numpy())
        return digest.hexdigest()


def measure_normalization(split: Split) -> Normalization:
    """Per-channel mean and population std on [0, 1], in float64 from the exact counts of the 256 values."""
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
    """Indices (classes * ipc,) of the distinct real images that every run and control starts from.

    Classes are contiguous. The choice for a smaller `ipc` begins, class by class, that for a larger one.
    """
    chosen = []
    for label, name in enumerate(split.classes):
        members = split.of_class(label)
        if not 1 <= ipc <= len(members):
            raise ValueError(
                f"ipc is {ipc}, but class {name!r} has {len(members)} images: choose ipc in 1..{len(members)}"
            )
        order = torch.randperm(len(members), generator=seeds.generator(seed, "initial", label))
        chosen.append(members[order[:ipc]])
    return torch.cat(chosen)


def class_batch(split: Split, label: int, *, count: int, generator: torch.Generator) -> Tensor:
    """Indices (min(count, n),) of images of one class, drawn without replacement."""
    if count < 1:
        raise ValueError(f"count is {count}: a batch needs at least one image")
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
    """Reads a dataset as uint8 images of `channels` (1 or 3) and `size_px` x `size_px` on `device`.

    What is decoded is kept in files, which on the CPU are mapped, not read: see `decoded`.

    `source` is a folder (relative: to the repository root) of `<split>.parquet` or `<split>-*.parquet`, there or one
    folder down, or of `<split>/<class>/<image files>`, or else a Hugging Face hub id. `splits` names the
    source's split for train, validation and test; validation may be a fraction, taken by `seed` from each
    class of train. `classes` keeps these names or indices, relabelled in this order, or those of a subset of
    ImageNet-1k by its name (`subsets`). Without `normalization` train is measured. Images are made square by
    `sources.to_square`.
    Raises FileNotFoundError for missing data, ValueError for data or settings that cannot be used.
    """
    key = f"datasets.{name}"
    if channels not in (1, 3) or size_px < 1:
        raise ValueError(f"{key}: channels is {channels} (allowed: 1, 3), size_px {size_px} (allowed: from 1)")
    if normalization and len(normalization.mean) != channels:
        raise ValueError(
            f"{key}.normalization has {len(normalization.mean)} channels, but {key}.channels is {channels}: "
            f"change one of them in params.yaml"
        )
    _check_splits(splits, key)
    parts = ("train", "validation", "test")
    stored = {part: splits[part] for part in parts if isinstance(splits[part], str)}
    opened = {part: decoded.StoredSplit(str(source), split, key) for part, split in stored.items()}
    columns = {"image_column": image_column, "label_column": label_column}
    names = {part: split.names(**columns) for part, split in opened.items()}
    known = dict.fromkeys(class_name for each in names.values() for class_name in each)  # train's first
    kept = _kept(list(known), classes, key)
    for part, there in names.items():
        _require(kept, set(there), stored[part], key)
    opened = {part: split.of_classes(kept) for part, split in opened.items()}
    labels = {part: split.labels(**columns) for part, split in opened.items()}
    relabel = {class_name: label for label, class_name in enumerate(kept)}
    chosen = {}
    for part, (there, values) in labels.items():
        new = np.array([relabel.get(class_name, -1) for class_name in there])[values]
        _require(kept, {kept[label] for label in np.unique(new) if label >= 0}, stored[part], key)
        rows = np.flatnonzero(new >= 0)
        chosen[part] = rows, torch.from_numpy(new[rows])
    divided = {}
    if "validation" not in chosen:
        divided = _divide(chosen["train"][1], kept, float(splits["validation"]), name=name, seed=seed)
    loaded = {}
    for part, (rows, new) in chosen.items():
        images, file, index = opened[part].images(
            rows, count=len(labels[part][1]), image_column=image_column, size_px=size_px, channels=channels
        )
        loaded[part] = Split(images, new, tuple(kept), rows=index, file=file)
    whole = loaded["train"]
    for part, index in divided.items():
        rows = index if whole.rows is None else whole.rows[index]
        loaded[part] = replace(whole, labels=whole.labels[index], rows=rows)
    measured = normalization or measure_normalization(loaded["train"])
    return Dataset(name=name, normalization=measured, **loaded).to(device)


def _check_splits(splits: Mapping[str, str | float], key: str) -> None:
    if set(splits) != {"train", "validation", "test"}:
        raise ValueError(f"{key}.splits has the keys {sorted(splits)}: set train, validation and test")
    names = [split for split in splits.values() if isinstance(split, str)]
    if len(set(names)) != len(names) or not {splits["train"], splits["test"]} <= set(names):
        raise ValueError(f"{key}.splits is {dict(splits)}: name three different splits, or a fraction as validation")
    fraction = splits["validation"]
    if fraction not in names and not 0 < fraction < 1:
        raise ValueError(f"{key}.splits.validation is {fraction}: a fraction must be between 0 and 1")


def _kept(names: list[str], classes: str | Sequence[str | int] | None, key: str) -> list[str]:
    if classes is None:
        return names
    if isinstance(classes, str):
        classes = subsets.of_imagenet(classes, classes_there=names, key=f"{key}.classes")
    kept = [names[item] if type(item) is int and 0 <= item < len(names) else str(item) for item in classes]
    for item in kept:
        if item not in names:
            near = [known for known in names if item.lower() in known.lower()]
            near = near or difflib.get_close_matches(item, names) or names
            raise ValueError(
                f"{key}.classes: there is no class {item!r}; indices are 0..{len(names) - 1}, near or allowed names "
                f"are {sources.some(near)}"
            )
    if not kept or len(set(kept)) != len(kept):
        raise ValueError(f"{key}.classes is {list(classes)}: name each class to keep once")
    return kept


def _require(kept: list[str], there: set[str], split: str, key: str) -> None:
    """Every class has images."""
    if empty := [class_name for class_name in kept if class_name not in there]:
        raise ValueError(
            f"{key}: split {split!r} has no images of class {sources.some(empty)}: add them, or name the classes to "
            f"keep in {key}.classes in params.yaml"
        )


def _divide(labels: Tensor, classes: list[str], fraction: float, *, name: str, seed: int) -> dict[str, Tensor]:
    """Ascending indices of the training images and of the share of each class that is held for validation."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, class_name in enumerate(classes):
        members = torch.nonzero(labels == label).flatten()
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise ValueError(
                f"datasets.{name}.splits.validation is {fraction}, {count} of the {len(members)} training "
                f"images of class {class_name!r}: change it so that both sides have some"
            )
        order = torch.randperm(len(members), generator=seeds.generator(seed, "validation", class_name))
        held[members[order[:count]]] = True
    return {"train": torch.nonzero(~held).flatten(), "validation": torch.nonzero(held).flatten()}
