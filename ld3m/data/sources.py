"""Where images come from: a split of a parquet folder, an image folder or a hub dataset, and its decoding."""

import hashlib
import inspect
import io
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ld3m.runtime.paths import ROOT

if TYPE_CHECKING:
    import datasets  # importing it takes 1.5 s, hence inside the functions

# Decoded by PIL itself: for others it may start a program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "ICO", "JPEG2000")
CHUNK = 512  # images whose encoded bytes are in memory at once
GROUP = 16  # images a thread decodes before it asks for more
SECONDS = 10  # between two lines of the log of a stage that say how far decoding is


def class_folders(source: str, split: str, *, key: str) -> list[str] | None:
    """The names of the class folders of a split, into which nothing has looked yet; None where it is no image folder.

    Raises what `read_split` raises for what is not there, ValueError for an image folder without classes.
    """
    folder = _local_folder(source, split, key=key)
    if folder is None or _parquet_files(folder, split):
        return None
    if not (names := _class_names(folder / split)):
        raise ValueError(
            f"{key}: {folder / split} has no folder for any class: place its images as "
            f"{folder.name}/{split}/<class>/<file>"
        )
    return names


def identity(source: str, split: str, *, key: str, classes: Sequence[str] | None = None) -> str | None:
    """SHA-256 (hex) of the names, sizes and modification times of a split's files, of an image folder those of
    `classes` (None: all); None for a hub dataset.

    Raises what `read_split` raises for what is not there.
    """
    folder = _local_folder(source, split, key=key)
    if folder is None:
        return None
    if files := _parquet_files(folder, split):
        names = []
    else:
        names = _class_names(folder / split) if classes is None else list(classes)
        files = [file for _, file in _image_files(folder / split, names)]
    digest = hashlib.sha256(repr((source, names)).encode())
    for file in files:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{key}: {file} is no file: remove it")
        digest.update(f"{os.path.relpath(file, folder)}\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def read_split(source: str, split: str, *, key: str, classes: Sequence[str] | None = None) -> "datasets.Dataset":
    """One split of a folder (relative: to the repository root) or, where no such folder is, of a hub dataset. Of an
    image folder `classes` are read (None: all).

    Local files bypass the cache of `datasets`: nothing is left behind, nothing stale is served. `key` names
    the dataset in errors: FileNotFoundError for what is not there, ValueError for broken files.
    """
    import datasets

    folder = _local_folder(source, split, key=key)
    if folder is not None:
        if files := _parquet_files(folder, split):
            return datasets.concatenate_datasets([datasets.Dataset(_read_parquet(file)) for file in files])
        return _read_image_folder(folder / split, classes)
    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # offline, unknown, gated and broken datasets raise about anything
        raise FileNotFoundError(
            f"{key}.source: {source!r} is no folder, and split {split!r} of the hub dataset of that name "
            f"could not be read ({type(error).__name__}: {error}). Without a network place {_place(split)} in a "
            f"folder and set {key}.source in params.yaml to that folder"
        ) from error


def _local_folder(source: str, split: str, *, key: str) -> Path | None:
    """The folder that holds a split, or None for a hub id."""
    folder = ROOT / Path(source).expanduser()
    if folder.is_dir():
        if _parquet_files(folder, split) or (folder / split).is_dir():
            return folder
        raise FileNotFoundError(
            f"{key}: {folder} has no split {split!r}: place {_place(split)} there, or change {key}.splits in "
            f"params.yaml{_embedded(folder)}"
        )
    if is_path(source, folder):
        raise FileNotFoundError(f"{key}.source: no folder {folder}: place {_place(split)} there{_embedded(folder)}")
    return None


def named_files(source: str, split: str, *, key: str) -> Path | None:
    """Where the files are that rows of a split may name; None for parquet files, which hold their images: a path in one
    could be that of any file of this machine."""
    import datasets

    folder = _local_folder(source, split, key=key)
    if folder is None:
        return Path(datasets.config.HF_CACHE_HOME)
    return None if _parquet_files(folder, split) else folder / split


def _embedded(path: Path) -> str:
    """How data that come with the repository are brought back, where they were changed too."""
    return "; `dvc pull -f data.dvc` brings the embedded data back" if path.is_relative_to(ROOT / "data") else ""


def _place(split: str) -> str:
    return f"{split}.parquet, {split}-*.parquet or {split}/<class>/<image files>"


def is_path(source: str, folder: Path) -> bool:
    # A missing `data/mnist5k` must not be asked from the hub, where anyone could own the name.
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None
    return not is_hub_id or source.startswith("data/") or ("/" in source and folder.parent.is_dir())


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """In the folder, its `data/`, or where it is no image folder any one folder in it: the hub's own layouts."""
    for place in (folder, folder / "data"):
        if files := _shards(place, split):
            return files
    below = [] if (folder / split).is_dir() else sorted(place for place in folder.glob("[!.]*") if place.is_dir())
    found = [files for place in below if (files := _shards(place, split))]
    if len(found) > 1:
        names = ", ".join(files[0].parent.name for files in found)
        raise ValueError(f"{folder} has split {split!r} in each of its folders {names}: set `source` to one of them")
    return found[0] if found else []


def _shards(place: Path, split: str) -> list[Path]:
    files = sorted([*place.glob(f"{split}.parquet"), *place.glob(f"{split}-*.parquet")])
    totals = {int(part[1]) for file in files if (part := re.search(r"-\d+-of-(\d+)$", file.stem))}
    if totals and totals != {len(files)}:
        names = [file.name for file in files]
        raise ValueError(f"{place}: split {split!r} should be {sorted(totals)} files, there are {names}")
    return files


def _read_parquet(file: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            return opened.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no readable parquet file ({error}): fetch it again{_embedded(file)}") from error


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.glob("[!.]*") if entry.is_dir())


def _image_files(folder: Path, names: Sequence[str]) -> list[tuple[int, str]]:
    """Label and path of every image file, class by class; files with the suffix of no image are left out.

    ValueError where that leaves nothing of a class.
    """
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    found = []
    for label, name in enumerate(names):
        there = list((folder / name).rglob("[!.]*"))
        files = sorted(str(file) for file in there if file.suffix.lower() in suffixes)
        if not files and (others := sorted(str(file) for file in there if file.is_file())):
            raise ValueError(
                f"{folder / name} has {len(others)} files, {others[0]} the first, but none with the suffix of a format "
                f"that is read: {', '.join(FORMATS)}"
            )
        found += [(label, file) for file in files]
    return found


def _read_image_folder(folder: Path, classes: Sequence[str] | None = None) -> "datasets.Dataset":
    import datasets

    names = _class_names(folder) if classes is None else list(classes)
    found = _image_files(folder, names)
    columns = {"image": [path for _, path in found], "label": [label for label, _ in found]}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_dict(columns, features=features)


def read_labels(
    table: "datasets.Dataset", split: str, *, image_column: str, label_column: str, key: str
) -> tuple[list[str], np.ndarray]:
    """The class names a split knows, and the index (N,) into them of each row.

    Raises ValueError for a column that is not there, and for labels that are no class names or integers from 0.
    """
    for setting, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in table.column_names:
            raise ValueError(
                f"{key}.{setting} is {column!r}, but split {split!r} has the columns {table.column_names}: "
                f"change {key}.{setting} in params.yaml"
            )
    feature, values = table.features[label_column], list(table[label_column])
    where = f"{key}: split {split!r}, column {label_column!r}"
    if absent := [row for row, value in enumerate(values) if value in (None, "", -1)]:
        raise ValueError(f"{where}: {len(absent)} rows have no label, first row {absent[0]}: remove them")
    names = getattr(feature, "names", None)  # of a ClassLabel
    if not values and not names:
        raise ValueError(f"{where}: the split is empty")
    kinds = {type(value) for value in values} or {int}
    if kinds == {str}:
        names, indices = np.unique(values, return_inverse=True)
        return names.tolist(), indices
    if kinds != {int} or min(values, default=0) < 0 or (names and max(values, default=0) >= len(names)):
        raise ValueError(
            f"{where}: labels must be class names or integers from 0, these are {feature} such as "
            f"{some(sorted(set(map(str, values))))}: change {key}.label_column in params.yaml"
        )
    return names or [str(label) for label in range(max(values) + 1)], np.array(values, dtype=np.int64)


def some(names: list[str]) -> str:
    """At most twenty names for an error message."""
    return ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def decode(
    table: "datasets.Dataset",
    column: str,
    rows: np.ndarray,
    *,
    named: Path | None,
    size_px: int,
    channels: int,
    where: str,
) -> Iterator[np.ndarray]:
    """Yields the images of `rows`, in order, as uint8 (n, channels, size_px, size_px).

    `named` is what `named_files` gives, `where` names the split in errors. Every image is looked at before the
    ValueError that names the broken ones.
    """
    import datasets

    try:
        encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise ValueError(f"{where}: column {column!r} holds {table.features[column]}, not images") from error
    broken: list[str] = []

    def decode_one(row: int, item: dict | None) -> np.ndarray:
        try:
            if item is None:
                raise ValueError("the cell is empty")
            with Image.open(_encoded(item, named), formats=FORMATS) as image:
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels")
                array = np.array(to_square(image, size_px=size_px, channels=channels))
        except Exception as error:  # broken files raise about anything
            name = item["path"] if item and item["path"] else "no file name"
            broken.append(f"row {row} ({name}): {type(error).__name__}: {error}")
            array = np.zeros((size_px, size_px, channels), np.uint8)
        return array.reshape(size_px, size_px, channels).transpose(2, 0, 1)

    def decode_group(group: list[tuple[int, dict | None]]) -> list[np.ndarray]:
        return [decode_one(row, item) for row, item in group]

    under_dvc, said = "DVC_STAGE" in os.environ, time.monotonic()
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,  # PIL decodes and resizes without the GIL
        tqdm(desc=where, total=len(rows), unit="image", disable=under_dvc, delay=2, mininterval=0.5) as bar,
    ):
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK].tolist()
            items = list(zip(chunk, encoded[chunk][column], strict=True))
            groups = [items[k : k + GROUP] for k in range(0, len(items), GROUP)]
            yield np.stack([image for images in pool.map(decode_group, groups) for image in images])
            bar.update(len(chunk))
            if under_dvc and time.monotonic() - said > SECONDS:
                print(f"{where}: {first + len(chunk):,} of {len(rows):,} images decoded, once", flush=True)
                said = time.monotonic()
    if broken:
        broken.sort(key=lambda text: int(text.split()[1]))
        raise ValueError("\n".join([f"{where}: replace or remove {len(broken)} images that cannot be read", *broken]))


def _encoded(item: dict, named: Path | None) -> io.BytesIO | str:
    """The bytes of a cell, or the path of the file below `named` that it names."""
    if item["bytes"] is not None:
        return io.BytesIO(item["bytes"])
    path = os.path.abspath(item["path"] or "")
    if named is None or not Path(path).is_relative_to(os.path.abspath(named)):
        raise ValueError("the cell names a file in the place of an image")
    return path


def square_version() -> str:
    """What stands for the code of `to_square` and of Pillow: it changes where the pixels of an image may."""
    return hashlib.sha256(inspect.getsource(to_square).encode()).hexdigest() + PIL.__version__


def to_square(image: Image.Image, *, size_px: int, channels: int) -> Image.Image:
    """Any image upright, as an RGB (3 channels) or greyscale (1) square.

    Alpha is composited onto black and 16 bits are scaled to 8. An image of the right size keeps its pixels;
    of any other the short side is resized to `size_px` (Lanczos, antialiased) and the centre is kept.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL's own conversion clips
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode!r} have no fixed range, convert them to 8 or 16 bits")
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = image.convert("RGB")
    if channels == 1:
        image = image.convert("L")
    if min(image.size) != size_px:
        scale = size_px / min(image.size)
        size = (max(size_px, round(image.width * scale)), max(size_px, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - size_px) // 2, (image.height - size_px) // 2
    return image.crop((left, top, left + size_px, top + size_px))
