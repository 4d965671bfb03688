"""Reads distilled sets that were made elsewhere; executes, resizes, clamps and guesses nothing of them.

- a folder with `distilled.safetensors`: an artefact of ours
- `images_best.pt` with `labels_best.pt` (MTT), `images.pt` with `labels.pt` (DD-Ranking): tensors (N, C, H, W), (N,)
- a `.pt` file of a dict whose `data` is [[images, labels], ...], one pair an experiment (DC, DSA, DM)
- a folder of `train.parquet` or `train-*.parquet`, there or one folder down: a Hugging Face dataset
- a folder `<class>/<image files>`, its folders named by class, by index, or by both ("003 truck")

Sets in ZCA space are no images and are refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from ld3m.data import images as files
from ld3m.data.dataset import Dataset, Normalization
from ld3m.evaluation.artefact import class_folder, read_artefact
from ld3m.runtime.paths import ROOT

Form = Literal["uint8", "unit", "signed", "normalized"]
RANGES = {"uint8": (0, 255), "unit": (0, 1), "signed": (-1, 1), "normalized": (-torch.inf, torch.inf)}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # 8 bit a channel or fewer


def read_set(
    path: str | Path,
    *,
    dataset: Dataset,
    form: Form | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    experiment: int = 0,
) -> tuple[Tensor, Tensor]:
    """Reads a distilled set for evaluation on a dataset.

    Parameters
    ----------
    path : str or Path
        The set, relative to the repository root.
    form : str, optional
        The values of a `.pt` file, which does not say it: "uint8" for [0, 255], "unit" for [0, 1], "signed" for
        [-1, 1], or "normalized" for (unit - mean) / std.
    mean, std : sequence of float, optional
        Of the form "normalized": one number a channel.
    experiment : int
        The pair to take from a DC file.

    Returns
    -------
    Tensor
        Images (N, C, H, W), normalized as those of `dataset` and on their device.
    Tensor
        Labels (N,), ascending, on the CPU.

    Raises
    ------
    FileNotFoundError
        If the set is missing.
    ValueError
        If the set does not fit `dataset` or cannot be read safely.
    """
    path = ROOT / Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: give an image folder, a .pt file or the folder of a distilled set")
    pair = _tensor_files(path)
    if not pair and (form, mean, std) != (None, None, None):
        raise ValueError(f"form, mean and std are for .pt files, {path} says what its values are: leave them out")
    if pair:
        values, labels = _load_pair(*pair, experiment=experiment)
        _check(path, values, labels, dataset)
        x = _to_x(path, values, form, mean, std)
    elif (path / "distilled.safetensors").is_file():
        tensors, metadata = read_artefact(path)
        label_of = _labels_of(path, metadata["classes"], dataset.train.classes)
        labels = torch.tensor(label_of)[tensors["labels"].long()]
        x = Normalization(**metadata["normalization"]).denormalize(tensors["images"])
    elif path.is_dir():
        x, labels = _read_images(path, dataset)
    else:
        raise ValueError(f"{path} is neither a folder nor a .pt file: see ld3m/evaluation/foreign.py")
    _check(path, x, labels, dataset)
    channels = dataset.train.shape[0]
    if channels == 1 and not torch.equal(x, x[:, :1].expand_as(x)):
        raise ValueError(f"{path}: the images are coloured, {dataset.name} is not: convert them first")
    normalized = dataset.normalization.normalize(x[:, :1] if channels == 1 else x.expand(-1, 3, -1, -1))
    order = labels.argsort(stable=True)
    return normalized[order].to(dataset.train.device), labels[order].long()


def _check(path: Path, images: Any, labels: Any, dataset: Dataset) -> None:
    """Checks shapes and labels before anything is computed: a small file can claim a tensor that no memory holds."""
    for name, tensor in {"images": images, "labels": labels}.items():
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.is_complex()
        ):
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, not a dense tensor of real numbers")
    size_px, classes, most = dataset.train.shape[-1], len(dataset.train.classes), len(dataset.train)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2:] != (size_px, size_px):
        raise ValueError(
            f"{path}: the images have the shape {tuple(images.shape)}, {dataset.name} needs (N, 1 or 3, {size_px}, "
            f"{size_px}): resize them first"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: {len(images)} images need one class each, the labels are {tuple(labels.shape)}")
    if not classes <= len(images) <= most:
        raise ValueError(
            f"{path} has {len(images)} images: allowed are {classes} (one a class) to {most} (real images)"
        )
    if set(labels.tolist()) != set(range(classes)):
        raise ValueError(f"{path}: the labels are {files.some(labels.unique().tolist())}, not all of 0..{classes - 1}")
    if not images.isfinite().all():
        raise ValueError(f"{path}: the images have values that are not finite")


def _tensor_files(path: Path) -> list[Path]:
    """[images, labels], [a DC file], or nothing where `path` holds no .pt files."""
    if path.is_dir():
        path = next((path / name for name in ("images_best.pt", "images.pt") if (path / name).is_file()), path)
    if path.suffix not in (".pt", ".pth") or path.is_dir():
        return []
    labels = path.with_name(path.name.replace("images", "labels"))
    if not labels.is_file():
        raise FileNotFoundError(f"{labels} is missing: place the labels of {path.name} there")
    return [path] if labels == path else [path, labels]


def _load_pair(images_file: Path, labels_file: Path | None = None, *, experiment: int) -> Sequence[Any]:
    loaded = _load(images_file)
    if labels_file is not None:
        return loaded, _load(labels_file)
    pairs = loaded.get("data") if isinstance(loaded, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            f"{images_file} has no 'data' of [images, labels] pairs; others are images*.pt with labels*.pt"
        )
    if not 0 <= experiment < len(pairs):
        raise ValueError(f"experiment={experiment}: {images_file} has {len(pairs)}, counted from 0")
    return pairs[experiment]


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


def _to_x(path: Path, images: Tensor, form: str | None, mean: Any, std: Any) -> Tensor:
    """Converts images of a stated form to [-1, 1]; ValueError where their values cannot have that form."""
    images = images.detach().float()
    low, high = images.min().item(), images.max().item()
    fitting = [name for name, (least, most) in RANGES.items() if least - 1e-3 <= low and high <= most + 1e-3]
    likely = "unit" if "unit" in fitting else next(iter(fitting), "normalized")
    if form not in fitting or (likely == "unit" and form != "unit"):
        raise ValueError(
            f"form={form!r}: the values of {path} are {low:.3g} to {high:.3g}, which looks like form={likely!r}; forms "
            f"are {', '.join(RANGES)}"
        )
    if form != "normalized":
        if (mean, std) != (None, None):
            raise ValueError(f"form={form!r}: mean and std are for form='normalized', leave them out")
        return images * 2 - 1 if form == "unit" else images / 127.5 - 1 if form == "uint8" else images
    if mean is None or std is None or not len(mean) == len(std) == images.shape[1]:
        raise ValueError(f"form='normalized' needs mean and std of {images.shape[1]} channels, not {mean} and {std}")
    x = Normalization(tuple(mean), tuple(std)).denormalize(images)
    if (x.abs() > 2).float().mean() > 0.5:
        raise ValueError(
            f"{path}: with mean={list(mean)} and std={list(std)} most values are far outside of [-1, 1]: they have "
            f"another mean and std, or are no images (ZCA)"
        )
    return x


def _labels_of(path: Path, names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The label of each class of a set, all read in one way: as names, as "<index> <name>", or as indices."""
    indices = {name: int(name) for name in names if re.fullmatch(r"\d{1,9}", name)}
    folders = {class_folder(label, name): label for label, name in enumerate(classes)}
    for reading in ({name: label for label, name in enumerate(classes)}, folders, indices):
        labels = [reading.get(name, -1) for name in names]
        if sorted(labels) == list(range(len(classes))):
            return labels
    raise ValueError(
        f"{path} has the classes {files.some(sorted(names))}; needed are {files.some(classes)}, by name, by index from "
        f"0, or by both as in {class_folder(0, classes[0])!r}, and no other"
    )


def _read_images(folder: Path, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) in [-1, 1] and labels of a folder of parquet files or an image folder."""
    if [*folder.glob("train*.parquet"), *folder.glob("*/train*.parquet")]:
        source = files.open_split(str(folder), "train", image_column="image", label_column="label", where=str(folder))
    else:
        source = files.open_image_folder(folder, where=str(folder))
    selection = source.select(source.classes)
    if len(selection.labels) > len(dataset.train):
        raise ValueError(
            f"{folder} has {len(selection.labels)} images, {dataset.name} no more than {len(dataset.train)}"
        )
    labels = np.array(_labels_of(folder, source.classes, dataset.train.classes))[selection.labels]
    named = list(zip(labels.tolist(), selection.read(), strict=True))
    named.sort(key=lambda entry: (entry[0], len(entry[1][0]), entry[1][0]))  # "10.png" comes after "9.png"
    uint8 = np.stack([_rgb(f"{folder}, {name}", content, dataset.train.shape[-1]) for _, (name, content) in named])
    return torch.from_numpy(uint8).movedim(-1, 1).float() / 127.5 - 1, torch.tensor([label for label, _ in named])


def _rgb(name: str, content: files.Encoded, size_px: int) -> np.ndarray:
    """(H, W, 3) uint8; ValueError where that loses something."""
    try:
        with files.open_image(content) as image:
            if image.size != (size_px, size_px):
                raise ValueError(
                    f"it has {image.width} x {image.height} px, not {size_px} x {size_px}: resize it first"
                )
            if image.mode not in MODES or getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has mode {image.mode}: save it as one 8 bit RGB or greyscale image")
            rgba = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    except Exception as error:  # broken files raise about anything
        raise ValueError(f"{name} cannot be used as an image ({type(error).__name__}: {error})") from error
    if (rgba[..., 3] < 255).any():
        raise ValueError(f"{name} is partly transparent: put it onto a background first")
    return rgba[..., :3]
