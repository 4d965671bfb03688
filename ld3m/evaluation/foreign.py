"""Anybody's distilled set, read for judging: nothing in it is executed, resized, clamped or guessed.

- a folder with `distilled.safetensors`: our artefact
- a folder with `images_best.pt` and `labels_best.pt` (MTT) or `images.pt` and `labels.pt` (DD-Ranking), or such a file
  of images beside its file of labels: tensors (N, C, H, W) and (N,)
- a `.pt` file of a dict whose `data` is [[images, labels], ...], one pair an experiment (DC, DSA, DM)
- a folder with `train.parquet` or `train-*.parquet`, there or under `data/`: a Hugging Face dataset
- a folder `<class>/<files>`, its folders named by class, by index, or by both ("003 truck")

Sets in ZCA space are no images and cannot be judged.
"""

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ld3m.data.dataset import Dataset, Normalization
from ld3m.data.sources import FORMATS, read_split
from ld3m.evaluation.artefact import class_folder, read_artefact
from ld3m.runtime.paths import ROOT

Form = Literal["unit", "normalised"]
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # 8 bit a channel or fewer
ROUNDING = 1e-3  # by which values in [0, 1] may leave it
FAR = 0.5  # by which values leave [0, 1] that can hardly be an image's


def read_set(
    path: str | Path,
    *,
    dataset: Dataset,
    form: Form | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    experiment: int = 0,
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W), normalised as those of `dataset`, on their device, and labels (N,), ascending, on the CPU.

    `path` is relative to the repository root. A `.pt` file does not say what its values are, so `form` must:
    "unit" for [0, 1], "normalised" for (unit - mean) / std with `mean` and `std`, one a channel. `experiment` picks the
    pair of a DC file. FileNotFoundError for what is not there; ValueError, with the reason, for what does not fit
    `dataset` or cannot be read safely.
    """
    path = ROOT / Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: give an image folder, a .pt file or the folder of a distilled set")
    if files := _tensor_files(path):
        tensors = _load_pair(*files, experiment=experiment)
        _check_shapes(path, *tensors, dataset)
        pixels, labels = _to_pixels(path, tensors[0], form, mean, std), tensors[1].long()
    elif not path.is_dir():
        raise ValueError(f"{path} is neither a folder nor a .pt file: see ld3m/evaluation/foreign.py")
    elif (form, mean, std) != (None, None, None):
        raise ValueError(f"form, mean and std are for .pt files, {path} says what its values are: leave them out")
    elif (path / "distilled.safetensors").is_file():
        pixels, labels = _read_artefact(path, dataset)
    else:
        pixels, labels = _read_files(path, dataset)
    _check_shapes(path, pixels, labels, dataset)
    if (given := set(labels.tolist())) != set(range(len(dataset.train.classes))):
        raise ValueError(
            f"{path}: the labels are {sorted(given)[:20]}, but {dataset.name} has the classes "
            f"0..{len(dataset.train.classes) - 1}, and each needs an image"
        )
    if not pixels.isfinite().all():
        raise ValueError(f"{path}: the images have values that are not finite")
    images = dataset.normalization.normalize(_channels(path, pixels, dataset.train.shape[0]))
    order = labels.argsort(stable=True)
    return images[order].to(dataset.train.device), labels[order]


def _read_artefact(folder: Path, dataset: Dataset) -> tuple[Tensor, Tensor]:
    tensors, metadata = read_artefact(folder)
    known = {name: label for label, name in enumerate(dataset.train.classes)}
    if set(metadata["classes"]) != set(known):
        raise ValueError(f"{folder} has the classes {metadata['classes']}, {dataset.name} has {list(known)}")
    relabel = torch.tensor([known[name] for name in metadata["classes"]])
    return Normalization(**metadata["normalization"]).denormalize(tensors["images"]), relabel[tensors["labels"].long()]


# tensors


def _tensor_files(path: Path) -> list[Path]:
    """[images, labels], [a DC file], or nothing where `path` holds no .pt files."""
    if path.is_dir():
        found = [path / name for name in ("images_best.pt", "images.pt") if (path / name).is_file()]
        if not found:
            return []
        path = found[0]
    if path.suffix not in (".pt", ".pth"):
        return []
    labels = path.with_name(path.name.replace("images", "labels"))
    if labels == path:
        return [path]
    if not labels.is_file():
        raise FileNotFoundError(f"{labels} is missing: place the labels of {path.name} there")
    return [path, labels]


def _load_pair(images_file: Path, labels_file: Path | None = None, *, experiment: int) -> tuple[Any, Any]:
    loaded = _load(images_file)
    if labels_file is not None:
        return loaded, _load(labels_file)
    pairs = loaded.get("data") if isinstance(loaded, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            f"{images_file} has no 'data' of [images, labels] pairs; tensors are images*.pt with labels*.pt"
        )
    if not 0 <= experiment < len(pairs):
        raise ValueError(f"{images_file} has {len(pairs)} experiments, experiment is {experiment}: count from 0")
    return tuple(pairs[experiment])


def _load(file: Path) -> Any:
    scalar = np.float64(0).__reduce__()[0]
    harmless = [np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64"))]  # DC stores its accuracies so
    harmless += [scalar, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # broken files raise about anything; torch's own message proposes to run the code
        found = re.search(r"GLOBAL \S+|<class '[^']*'>", str(error))
        raise ValueError(
            f"{file} was not read: it is broken, or holds more than tensors, lists and numbers, which could run code "
            f"({found[0] if found else type(error).__name__}). Nothing of it was run; ask its author for plain tensors"
        ) from None


def _check_shapes(path: Path, images: Any, labels: Any, dataset: Dataset) -> None:
    """Before anything is computed: a small file can claim a tensor that no memory holds."""
    for name, tensor in {"images": images, "labels": labels}.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, not a dense tensor")
    size_px, most = dataset.train.shape[-1], len(dataset.train)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2:] != (size_px, size_px):
        raise ValueError(
            f"{path}: images have the shape {tuple(images.shape)}, {dataset.name} needs (N, 1 or 3, {size_px}, "
            f"{size_px}): sets are not resized"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: {len(images)} images need as many labels, one class each, but the labels have the shape "
            f"{tuple(labels.shape)} (soft labels are not judged)"
        )
    if not len(dataset.train.classes) <= len(images) <= most:
        raise ValueError(
            f"{path} has {len(images)} images; allowed are {len(dataset.train.classes)} (one a class) to {most} (the "
            f"training images of {dataset.name})"
        )
    if labels.is_complex() or not torch.equal(labels, labels.long().to(labels.dtype)):
        raise ValueError(f"{path}: labels must be whole numbers, these are {labels.dtype}, such as {labels[0].item()}")


def _to_pixels(
    path: Path, images: Tensor, form: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """Pixels, about [-1, 1], of images in a stated form; ValueError where the values cannot be in that form."""
    if not images.is_floating_point():
        raise ValueError(f"{path}: images are {images.dtype}: save them as floating point in [0, 1]")
    images = images.detach().float()
    low, high = images.min().item(), images.max().item()
    values = f"{path}: the values are {low:.3g} to {high:.3g}"
    if form == "unit":
        if (mean, std) != (None, None):
            raise ValueError("mean and std are for form='normalised': leave them out, or change form")
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(f"{values}, which is not form='unit', [0, 1]: see form='normalised'")
        return images * 2 - 1
    if form != "normalised":
        raise ValueError(
            f"form is {form!r}: say what the values of {path} are, 'unit' for [0, 1] or 'normalised' for "
            f"(unit - mean) / std; they are {low:.3g} to {high:.3g}"
        )
    if mean is None or std is None or len(mean) != images.shape[1] or len(std) != images.shape[1]:
        raise ValueError(f"form='normalised' needs mean and std of {images.shape[1]} channels, got {mean} and {std}")
    pixels = Normalization(tuple(mean), tuple(std)).denormalize(images)
    if low >= 0 and high <= 1 + ROUNDING and max(mean) > 0:
        raise ValueError(f"{values}, no pixel is below the mean: this looks like form='unit'")
    if (outside := (pixels.abs() > 1 + 2 * FAR).float().mean().item()) > 0.5:
        raise ValueError(
            f"{values}; with mean {list(mean)} and std {list(std)} {outside:.0%} of the pixels are far outside of "
            f"[0, 1]: another mean and std, or no images (ZCA)"
        )
    return pixels


def _channels(path: Path, pixels: Tensor, channels: int) -> Tensor:
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    if not torch.equal(pixels, pixels[:, :1].expand_as(pixels)):
        raise ValueError(f"{path}: the images are coloured, the data set is not: convert them first")
    return pixels[:, :1]


# files


def _read_files(folder: Path, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, H, W) and labels of an image folder or a parquet folder."""
    parquet = [*folder.glob("train*.parquet"), *folder.glob("data/train*.parquet")]
    entries = _parquet_entries(folder) if parquet else _folder_entries(folder)
    if not entries:
        raise ValueError(f"{folder} has no images: it needs <class>/<image files>")
    if len(entries) > len(dataset.train):
        raise ValueError(f"{folder} has {len(entries)} images, {dataset.name} no more than {len(dataset.train)}")
    label_of = _label_of(folder, {name for name, _, _ in entries}, dataset.train.classes)
    size = (dataset.train.shape[-1],) * 2
    sizes = {_open(where, source, lambda image: image.size) for _, where, source in entries}
    if sizes != {size}:
        found = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:10])
        raise ValueError(
            f"{folder} has images of {found} px, {dataset.name} of {size[0]} x {size[0]}: sets are not resized"
        )
    uint8 = np.stack([_open(where, source, _rgb) for _, where, source in entries])
    labels = torch.tensor([label_of[name] for name, _, _ in entries])
    return torch.from_numpy(uint8).movedim(-1, 1).float() / 127.5 - 1, labels


def _folder_entries(folder: Path) -> list[tuple[str, str, Any]]:
    """(class, name for errors, file) of every file of an image folder; "10.png" comes after "9.png"."""
    inside = sorted(folder.glob("[!.]*"))
    if beside := [file.name for file in inside if file.suffix.lower() in Image.registered_extensions()]:
        raise ValueError(f"{folder}: {beside[0]} is in no class: place it in <class>/")
    return [
        (place.name, str(file), file)
        for place in inside
        if place.is_dir()
        for file in sorted(place.glob("[!.]*"), key=lambda file: (len(file.stem), file.name))
    ]


def _parquet_entries(folder: Path) -> list[tuple[str, str, Any]]:
    import datasets

    table = read_split(str(folder), "train", key="the set")
    names = getattr(table.features.get("label"), "names", None)
    if names is None or "image" not in table.features:
        raise ValueError(f"{folder}: the columns are {table.features}; needed are image, and label with class names")
    if any(label is None or not 0 <= label < len(names) for label in table["label"]):
        raise ValueError(f"{folder}: labels must be in 0..{len(names) - 1}")
    encoded = table.cast_column("image", datasets.Image(decode=False))
    return [
        (names[row["label"]], f"{folder}, row {k}", io.BytesIO((row["image"] or {}).get("bytes") or b""))
        for k, row in enumerate(encoded)
    ]


def _label_of(folder: Path, names: set[str], classes: tuple[str, ...]) -> dict[str, int]:
    """The label of every class folder, all read in one way: as names, as "<index> <class>", or as indices."""
    readings = (
        {name: label for label, name in enumerate(classes)},
        {class_folder(label, name): label for label, name in enumerate(classes)},
        {name: int(name) for name in names if re.fullmatch(r"\d{1,9}", name)},
    )
    for reading in readings:
        if sorted(reading.get(name, -1) for name in names) == list(range(len(classes))):
            return reading
    raise ValueError(
        f"{folder} has the classes {sorted(names)[:20]}; needed are all of {list(classes)[:20]}, by name, by index "
        f"from 0, or both as in {class_folder(0, classes[0])!r}, and no other"
    )


def _open(where: str, source: Path | io.BytesIO, read: Any) -> Any:
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"{where} is no file: images are <class>/<file>")
    try:
        with warnings.catch_warnings(), Image.open(source, formats=FORMATS) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return read(image)
    except Exception as error:  # broken files raise about anything
        raise ValueError(f"{where} cannot be used as an image ({type(error).__name__}: {error})") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, where that loses nothing."""
    if image.mode not in MODES or getattr(image, "n_frames", 1) > 1:
        raise ValueError(
            f"mode {image.mode}, {getattr(image, 'n_frames', 1)} frames: save it as 8 bit RGB or greyscale"
        )
    rgba = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    if (rgba[..., 3] < 255).any():
        raise ValueError("it is partly transparent: put it onto a background first")
    return rgba[..., :3]
