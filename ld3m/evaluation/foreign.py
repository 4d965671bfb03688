"""Reads distilled sets that were made elsewhere; executes, resizes, clamps and guesses nothing of them.

- a folder with `distilled.safetensors`: an artefact of ours
- `images_best.pt` with `labels_best.pt` (MTT), `images.pt` with `labels.pt` (DD-Ranking): tensors (N, C, H, W), (N,)
- a `.pt` file of [images, labels], of {"images": ..., "labels": ...}, or of a dict whose `data` is
  [[images, labels], ...], one pair an experiment (DC, DSA, DM)
- a folder of `train.parquet` or `train-*.parquet`, there or one folder down: a Hugging Face dataset
- a folder `<class>/<image files>`, its folders named by class, by index, or by both ("003 truck")

Sets in ZCA space are no images and are refused.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from ld3m.data import decoding
from ld3m.data import images as files
from ld3m.data.dataset import Dataset, Normalization
from ld3m.data.subsets import word
from ld3m.evaluation.artefact import class_folder, read_artefact
from ld3m.runtime.paths import ROOT

RANGES = {"unit": (0, 1), "signed": (-1, 1), "uint8": (0, 255), "normalized": (-torch.inf, torch.inf)}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # 8 bit a channel or fewer


def read_set(
    path: str | Path,
    *,
    dataset: Dataset,
    form: Literal["unit", "signed", "uint8", "normalized"] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    experiment: int = 0,
    factor: int = 1,
) -> tuple[Tensor, Tensor]:
    """Read a distilled set for evaluation on a dataset, and print which of its classes is which of the dataset's.

    An error names a set that does not fit or cannot be read.

    Parameters
    ----------
    path
        The set, relative to the repository root.
    form, mean, std
        The values of a `.pt` file, which does not say them: "unit" for [0, 1], "signed" for [-1, 1], "uint8" for
        [0, 255], or "normalized" for (unit - mean) / std with one number a channel. Left out, they are those of
        `normalization.json` beside the file, where there is one.
    experiment
        The pair to take from a DC file.
    factor
        Cut every image of a `.pt` file into `factor` x `factor` images of its class, enlarged bilinearly (IDC).

    Returns
    -------
    Images (N, C, H, W), normalized as those of `dataset` and on their device; labels (N,), ascending, on the CPU.
    """
    path = ROOT / Path(path).expanduser()
    if not path.is_dir() and not (path.is_file() and path.suffix in (".pt", ".pth")):
        raise FileNotFoundError(f"{path} is neither a folder of images or of a distilled set nor a .pt file: give one")
    classes, pair_file = dataset.train.classes, _pair_file(path)
    label_of = {str(label): label for label in range(len(classes))}
    if pair_file:
        images, labels = _load_pair(pair_file, experiment)
    elif (form, mean, std, experiment, factor) != (None, None, None, 0, 1):
        of_file = "form, mean, std, experiment and factor are for .pt files"
        raise ValueError(f"{of_file}: name one instead of {path}, or leave them out")
    elif (path / "distilled.safetensors").is_file():
        tensors, metadata = read_artefact(path)
        label_of = _labels_of(path, metadata["classes"], classes)
        images = Normalization(**metadata["normalization"]).denormalize(tensors["images"])
        labels = torch.tensor(list(label_of.values()))[tensors["labels"].long()]
    else:
        images, labels, label_of = _read_images(path, dataset)
    _check(path, images, labels, dataset)
    if pair_file:
        beside = pair_file.with_name("normalization.json")
        if form is None and beside.is_file():
            form, (mean, std) = "normalized", _read_normalization(beside, images.shape[1])
        images = _to_x(path, images, form, mean, std)
    if factor != 1:
        images, labels = _cut(images, labels, factor)
    channels = dataset.train.shape[0]
    if channels == 1 and not torch.equal(images, images[:, :1].expand_as(images)):
        raise ValueError(f"{path}: the images are colored, {dataset.name} is not: convert them first")
    normalized = dataset.normalization.normalize(images[:, :1] if channels == 1 else images.expand(-1, 3, -1, -1))
    shown = [f"{name} -> {classes[label]}" for name, label in label_of.items()]
    shown[10:] = [f"{len(shown) - 10} more"] if len(shown) > 10 else []
    print(f"{'label of the file' if pair_file else 'class of the set'} -> class of {dataset.name}:", ", ".join(shown))
    order = labels.argsort(stable=True)
    return normalized[order].to(dataset.train.device), labels[order].long()


def _pair_file(path: Path) -> Path | None:
    """The .pt file of images that is meant, or None where `path` is a folder without one."""
    usual = (path / "images_best.pt", path / "images.pt")
    found = [path] if path.is_file() else list(filter(Path.is_file, usual))[:1] or sorted(path.glob("images*.pt"))
    for file in found:  # where MTT has written images_zca_5.pt, which is mapped back, images_5.pt is whitened
        twin = file.with_name(file.name.replace("images_", "images_zca_"))
        if "zca" in file.name.lower() or (twin != file and twin.is_file()):
            raise ValueError(
                f"{file}: by the file names the set was distilled on whitened images (ZCA), and cannot be judged as it "
                "is on images that are not whitened: give another"
            )
    if len(found) > 1:
        raise ValueError(f"{path} holds {files.some([file.name for file in found])}: name one of these files")
    return found[0] if found else None


def _load_pair(file: Path, experiment: int) -> tuple[Any, Any]:
    """The images and labels as they are stored."""
    match _load(file):
        case Tensor() as images if "images" in file.name:
            entries = [[images, _load(file.with_name(file.name.replace("images", "labels")))]]
        case {"images": images, "labels": labels} | [images, labels]:
            entries = [[images, labels]]
        case {"data": [*entries]}:
            pass
        case found:
            of = f" of {files.some(list(found))}" if isinstance(found, dict) else ""
            of = f" of {len(found)}" if isinstance(found, list | tuple) else of
            raise ValueError(
                f"{file} holds a {type(found).__name__}{of}: save [images, labels], {{'images': images, 'labels': "
                "labels}, or two files images.pt and labels.pt; DC's {'data': [[images, labels], ...]} is read too"
            )
    match entries[experiment : experiment + 1]:
        case [[images, labels]]:
            return images, labels
    held = f"{len(entries)}, counted from 0, each of which must be [images, labels]"
    raise ValueError(f"experiment={experiment}: {file} holds {held}")


def _load(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: place it beside the file of images")
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
            f"({found[0] if found else type(error).__name__}). Nothing of it was run: save plain tensors, of a numpy "
            "array torch.from_numpy(array)"
        ) from None


def _check(path: Path, images: Any, labels: Any, dataset: Dataset) -> None:
    """Check shapes and labels before anything is computed: a small file can claim a tensor that no memory holds."""
    for tensor in (images, labels):
        is_dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not is_dense or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"{path}: images and labels must be dense real tensors, not {type(tensor).__name__}")
    size_px, classes, most = dataset.train.shape[-1], len(dataset.train.classes), len(dataset.train)
    count, *shape = images.shape or (0,)
    if shape not in ([1, size_px, size_px], [3, size_px, size_px]) or not classes <= count <= most:
        is_last = shape in ([size_px, size_px, 1], [size_px, size_px, 3])
        advice = ". The channels are last: save images.movedim(-1, 1)" if is_last else ""
        raise ValueError(
            f"{path}: the images have the shape {tuple(images.shape)}, {dataset.name} needs (N, 1 or 3, {size_px}, "
            f"{size_px}) with N from {classes} (one a class) to {most} (real images){advice}"
        )
    if labels.shape != (count,):
        is_soft = labels.shape == (count, classes)
        advice = ". Soft labels are not used: save labels.argmax(1) to judge the images alone" if is_soft else ""
        raise ValueError(f"{path}: the labels must be a class an image, ({count},), not {tuple(labels.shape)}{advice}")
    present = labels.unique().tolist()
    if present != list(range(classes)):
        advice = "; they count from 1: subtract 1" if present == list(range(1, classes + 1)) else ""
        raise ValueError(f"{path}: the labels are {files.some(present)}, not all of 0..{classes - 1}{advice}")
    if not images.float().isfinite().all():
        raise ValueError(f"{path}: the images have values that are not finite")


def _read_normalization(file: Path, channels: int) -> list[list[float]]:
    """Mean and std of images in [0, 1], one a channel."""
    try:
        given = json.loads(file.read_text())
        mean, std = ([float(value) for value in given[key]] for key in ("mean", "std"))
        if len(Normalization(mean, std).mean) == channels and math.isfinite(sum(mean + std)):
            return [mean, std]
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(
        f'{file} must hold {{"mean": [...], "std": [...]}} with {channels} numbers each, std above 0: correct it, or '
        "remove it and give form"
    )


def _to_x(path: Path, images: Tensor, form: str | None, mean: Any, std: Any) -> Tensor:
    """Convert images of a stated form to [-1, 1]; ValueError where their values cannot have that form."""
    images = images.detach().float()
    low, high = images.min().item(), images.max().item()
    fitting = [name for name, (least, most) in RANGES.items() if least - 1e-3 <= low and high <= most + 1e-3]
    if form not in fitting or (fitting[0] == "unit" and form != "unit"):
        raise ValueError(
            f"{'form is not given' if form is None else f'form={form!r}'}: the values of {path} are {low:.3g} to "
            f"{high:.3g}, which looks like form={fitting[0]!r}; forms are unit [0, 1], signed [-1, 1], uint8 [0, 255], "
            "and normalized, which needs mean and std"
        )
    count = images.shape[1] if form == "normalized" else 0
    if not len(mean or ()) == len(std or ()) == count:
        raise ValueError(f"form={form!r} needs {count} numbers as mean and as std, not mean={mean} and std={std}")
    if form != "normalized":
        return images * 2 - 1 if form == "unit" else images / 127.5 - 1 if form == "uint8" else images
    x = Normalization(tuple(mean), tuple(std)).denormalize(images)
    if (x.abs() > 2).float().mean() > 0.5:
        raise ValueError(
            f"{path}: with mean={list(mean)} and std={list(std)} most values are far outside of [-1, 1]: they have "
            "another mean and std, or are no images (ZCA)"
        )
    return x


def _cut(x: Tensor, labels: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    count, channels, size_px, _ = x.shape
    if factor < 1 or size_px % factor:
        raise ValueError(f"factor={factor}: must divide the side of the images, {size_px}")
    side_px = size_px // factor
    parts = x.view(count, channels, factor, side_px, factor, side_px).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return interpolate(parts, size=(size_px, size_px), mode="bilinear"), labels.repeat_interleave(factor**2)


def _matched(names: Sequence[str], classes: Sequence[str]) -> dict[int, str]:
    """The class of a set that each label has, all read in the way that fits most of them: as names, as
    "<index> <name>", or as indices."""
    named = {name: label for label, name in enumerate(classes)}
    folders = {class_folder(label, name): label for label, name in enumerate(classes)}
    indices = {name: int(name) for name in names if re.fullmatch(r"\d{1,9}", name) and int(name) < len(classes)}
    readings = (named, folders, indices)
    return max(
        ({reading[word(name)]: name for name in names if word(name) in reading} for reading in readings), key=len
    )


def _labels_of(path: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """The label of each class of a set; ValueError where they are not those of the data set."""
    found = _matched(names, classes)
    if len(found) == len(classes) == len(names):
        return {name: label for label, name in found.items()}
    missing = [name for label, name in enumerate(classes) if label not in found]
    further = [name for name in files.in_order(names) if name not in found.values()]
    numbers = sorted(int(number[0]) for name in names if (number := re.match(r"\d{1,9}", name)))
    counted = ". They count from 1, labels from 0" if numbers == list(range(1, len(classes) + 1)) else ""
    differing = [f"; {kind}: {files.some(of)}" for kind, of in (("missing", missing), ("further", further)) if of]
    raise ValueError(
        f"{path}: its classes are not those of the data set{''.join(differing)}{counted}. Needed is each class once, "
        f"by name, by index from 0, or by both as in {class_folder(0, classes[0])!r}"
    )


def _is_set(folder: Path, classes: Sequence[str]) -> bool:
    names = [entry.name for entry in folder.glob("[!.@]*/")]
    return (folder / "distilled.safetensors").is_file() or len(_matched(names, classes)) == len(classes) == len(names)


def _read_images(folder: Path, dataset: Dataset) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Images (N, 3, H, W) in [-1, 1] and labels of a folder of parquet files or an image folder, and `_labels_of`."""
    where, classes = str(folder), dataset.train.classes
    if [*folder.glob("train*.parquet"), *folder.glob("*/train*.parquet")]:
        source = files.open_split(where, "train", image_column="image", label_column="label", where=where)
    else:
        fitting = [place for place in (folder, *folder.glob("*/"), *folder.glob("*/*/")) if _is_set(place, classes)]
        if fitting and fitting[0] != folder:
            outermost = [place for place in fitting if place.parent not in fitting]
            inside = files.some(sorted(str(place.relative_to(folder)) for place in outermost))
            raise ValueError(
                f"{folder} does not hold the classes of {dataset.name}, but {inside} in it: give the folder of the "
                "distilled set, never one of test images"
            )
        source = files.open_image_folder(folder, where=where)
    selection = source.select(source.classes)
    count, most = len(selection.labels), len(dataset.train)
    if count > most:
        raise ValueError(f"{folder} has {count} images, {dataset.name} no more than {most}")
    label_of = _labels_of(folder, source.classes, classes)
    named = [(label_of[source.classes[k]], *image) for k, image in zip(selection.labels, selection.read(), strict=True)]
    named.sort(key=lambda entry: (entry[0], len(entry[1]), entry[1]))  # "10.png" comes after "9.png"
    uint8 = np.stack([_rgb(f"{folder}, {name}", content, dataset.train.shape[-1]) for _, name, content in named])
    x = torch.from_numpy(uint8).movedim(-1, 1).float() / 127.5 - 1
    return x, torch.tensor([label for label, *_ in named]), label_of


def _rgb(name: str, content: decoding.Encoded, size_px: int) -> np.ndarray:
    """(H, W, 3) uint8; ValueError where that loses something."""
    try:
        with decoding.open_image(content) as image:
            fits = image.size == (size_px, size_px) and image.mode in MODES and getattr(image, "n_frames", 1) == 1
            rgba = np.asarray(ImageOps.exif_transpose(image).convert("RGBA")) if fits else None
            if rgba is None or (rgba[..., 3] < 255).any():
                raise ValueError(
                    f"it has {image.width} x {image.height} px and mode {image.mode}: save it as one opaque 8 bit RGB "
                    f"or grayscale image of {size_px} x {size_px} px"
                )
    except Exception as error:  # broken files raise about anything
        raise ValueError(f"{name} cannot be used as an image ({type(error).__name__}: {error})") from error
    return rgba[..., :3]
