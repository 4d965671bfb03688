"""Reading images: an image folder, parquet files or a Hugging Face dataset, decoded once into memory-mapped files.

The name of a decoded file is a hash of all that its bytes depend on, so a changed source or setting gives another file.
All processes share its pages. A missing or damaged file is decoded again.
"""

import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ld3m.runtime import paths
from ld3m.runtime.paths import ROOT
from ld3m.runtime.progress import progress
from ld3m.runtime.storage import locked, require_space, write_bytes

# Formats that Pillow decodes itself: for others it may start a program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "ICO", "JPEG2000")
CHUNK = 512  # images whose encoded bytes are in memory at once
SQUARE_VERSION = 1  # raise it when `to_square` changes a pixel: images are then decoded again

Encoded = bytes | str | None  # the bytes of an image file, or its path; None where there is neither


@dataclass(frozen=True)
class Selection:
    """The images of the selected classes of a split, in the order of the source, not yet decoded."""

    labels: np.ndarray  # (n,) int64, indices into the selected classes
    identity: str  # changes when the images do
    read: Callable[[], Iterator[tuple[str, Encoded]]]  # yields the name of each image, for errors, and its content


@dataclass(frozen=True)
class Source:
    """One split of a source: the names of its classes and a function that selects the images of some of them."""

    classes: list[str]
    select: Callable[[Sequence[str]], Selection]


def open_split(source: str, split: str, *, image_column: str, label_column: str, where: str) -> Source:
    """Finds a split in a folder (relative: to the repository root) or, if the source is no path, on the hub.

    A folder holds `<split>/<class>/<image files>`, or `<split>.parquet` or `<split>-*.parquet`, also in any one folder
    inside it. Only the folders of selected classes are listed. `where` names the split in errors: FileNotFoundError for
    a missing source, ValueError for a broken one.
    """
    folder = ROOT / Path(source).expanduser()
    advice = f"place {split}.parquet, {split}-*.parquet or {split}/<class>/<image files>"
    if (folder / split).is_dir():
        return open_image_folder(folder / split, where=where)
    files = _parquet_files(folder, split)
    if not files and folder.is_dir():
        raise FileNotFoundError(f"{where}: {folder} has no such split: {advice} there, or change splits")
    if not files and is_path(source, folder):
        raise FileNotFoundError(f"{where}: source={source!r}: no folder {folder}: {advice} there")
    table = _parquet_table(files, where=where) if files else _hub_table(source, split, advice=advice, where=where)
    return _open_table(table, image_column=image_column, label_column=label_column, where=where)


def is_path(source: str, folder: Path) -> bool:
    """Whether a source that is no folder was meant to be one."""
    # A missing `data/mnist5k` must not be asked from the hub, where anyone could own the name.
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None
    return not is_hub_id or source.startswith("data/") or ("/" in source and folder.parent.is_dir())


def some(names: Sequence[str]) -> str:
    """At most twenty names for an error message."""
    return ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# Image folders


def open_image_folder(folder: Path, *, where: str) -> Source:
    """An image folder `<class>/<image files>`; files with the suffix of no image are left out."""
    names = sorted(entry.name for entry in folder.glob("[!.]*") if entry.is_dir())
    if not names:
        raise ValueError(
            f"{where}: {folder} has no class folders: place its images as {folder.name}/<class>/<image files>"
        )

    def select(classes: Sequence[str]) -> Selection:
        found = {name: _image_files(folder / name) for name in names if name in classes}
        labels = np.array([classes.index(name) for name in found for _ in found[name]], dtype=np.int64)
        files = [file for listed in found.values() for file in listed]
        return Selection(labels, _identity(folder, files, where=where), lambda: ((file, file) for file in files))

    return Source(names, select)


def _image_files(folder: Path) -> list[str]:
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    present = list(folder.rglob("[!.]*"))
    files = sorted(str(file) for file in present if file.suffix.lower() in suffixes)
    if not files and (others := sorted(str(file) for file in present if file.is_file())):
        known = ", ".join(FORMATS)
        raise ValueError(f"{folder} has {len(others)} files ({others[0]} ...), but none with the suffix of {known}")
    return files


def _identity(folder: Path, files: Iterable[str | Path], *, where: str) -> str:
    """The hash (SHA-256, hex) of the names, sizes and modification times of files."""
    digest = hashlib.sha256(str(folder).encode())
    for file in files:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{where}: {file} is no regular file: remove it")
        digest.update(f"{os.path.relpath(file, folder)}\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


# Tables: parquet files and datasets of the hub


class Table(NamedTuple):
    schema: Any  # of pyarrow
    names: dict[str, list[str]]  # the class names of columns
    pieces: Callable[[str], Iterator[Any]]  # reads a column piece by piece
    identity: str
    files: Path | None  # the folder whose files cells may name


def _open_table(table: Table, *, image_column: str, label_column: str, where: str) -> Source:
    from pyarrow import types

    for setting, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in table.schema.names:
            raise ValueError(f"{where}: {setting}={column!r}: the columns are {table.schema.names}, name one of them")
    kind = table.schema.field(image_column).type
    if not (types.is_binary(kind) or (types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind})):
        raise ValueError(f"{where}: column {image_column!r} holds {kind}, not images")
    values = [value for piece in table.pieces(label_column) for value in piece.to_pylist()]
    names, labels = _labels(values, table.names.get(label_column), where=f"{where}, column {label_column!r}")

    def read(rows: np.ndarray) -> Iterator[tuple[str, Encoded]]:
        first = 0
        for piece in table.pieces(image_column):
            wanted = rows[(first <= rows) & (rows < first + len(piece))]
            for row, cell in zip(wanted, piece.take(wanted - first).to_pylist(), strict=True):
                yield _content(f"row {row}", cell, table.files)
            first += len(piece)

    def select(classes: Sequence[str]) -> Selection:
        index = {name: label for label, name in enumerate(classes)}
        selected = np.array([index.get(name, -1) for name in names], dtype=np.int64)[labels]
        rows = np.flatnonzero(selected >= 0)
        identity = f"{table.identity} {image_column} {hashlib.sha256(rows.tobytes()).hexdigest()}"
        return Selection(selected[rows], identity, lambda: read(rows))

    return Source(names, select)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """What `datasets` writes into the metadata."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", "{}")).get("info", {}).get("features", {})
    return {column: list(map(str, feature["names"])) for column, feature in features.items() if "names" in feature}


def _labels(values: list[Any], names: list[str] | None, *, where: str) -> tuple[list[str], np.ndarray]:
    """Class names and indices (N,) into them of labels that are class names or indices."""
    if absent := [row for row, value in enumerate(values) if value in (None, "", -1)]:
        raise ValueError(f"{where}: {len(absent)} rows have no label, first row {absent[0]}: remove them")
    if not values:
        raise ValueError(f"{where}: the split is empty")
    kinds = {type(value) for value in values}
    if kinds == {str}:
        names, labels = np.unique(values, return_inverse=True)
        return names.tolist(), labels
    if kinds != {int} or not 0 <= min(values) <= max(values) < len(names or range(2**20)):
        shown = some(sorted(set(map(str, values))))
        raise ValueError(f"{where}: labels must be class names or integers from 0, not {shown}: change label_column")
    return names or [str(label) for label in range(max(values) + 1)], np.array(values, dtype=np.int64)


def _content(name: str, cell: dict | bytes | None, files: Path | None) -> tuple[str, Encoded]:
    """The name and content of a cell. Only files below `files` are opened: a table could name any other."""
    cell = cell if isinstance(cell, dict) else {"bytes": cell, "path": None}
    path, content = cell["path"], cell["bytes"]
    if content is None and path and files and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(files)):
        content = path
    return f"{name} ({path or 'no file name'})", content


def _parquet_table(files: list[Path], *, where: str) -> Table:
    from pyarrow import parquet  # takes a moment that image folders do not need

    def each(read: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        for file in files:
            try:
                with parquet.ParquetFile(file) as opened:
                    yield from read(opened)
            except Exception as error:  # broken files raise about anything
                raise ValueError(f"{file} is no readable parquet file ({error}): fetch it again") from error

    def pieces(column: str) -> Iterator[Any]:  # a row group is in memory at once
        return each(lambda opened: (opened.read_row_group(k, [column])[column] for k in range(opened.num_row_groups)))

    (schema, names), *others = each(lambda opened: [(opened.schema_arrow, _class_names(opened.schema_arrow))])
    if any(other != names for _, other in others):
        raise ValueError(f"{where}: {files[0]} and the files beside it have different class names: fetch them again")
    return Table(schema, names, pieces, _identity(files[0].parent, files, where=where), None)


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """In the folder or in any one folder in it: the layouts of the hub."""
    found = [files for place in (folder, *sorted(folder.glob("[!.]*/"))) if (files := _shards(place, split))]
    if len(found) > 1:
        names = ", ".join(str(files[0].parent) for files in found)
        raise ValueError(f"split {split!r} is in each of the folders {names}: set source to one of them")
    return found[0] if found else []


def _shards(place: Path, split: str) -> list[Path]:
    files = sorted([*place.glob(f"{split}.parquet"), *place.glob(f"{split}-*.parquet")])
    totals = {int(part[1]) for file in files if (part := re.search(r"-\d+-of-(\d+)$", file.stem))}
    if totals and totals != {len(files)}:
        names = [file.name for file in files]
        raise ValueError(f"{place}: split {split!r} should be {sorted(totals)} files, but they are {names}")
    return files


def _hub_table(source: str, split: str, *, advice: str, where: str) -> Table:
    import datasets  # takes 1.5 s

    try:
        table = datasets.load_dataset(source, split=split)
    except Exception as error:  # offline, unknown, gated and broken datasets raise about anything
        raise FileNotFoundError(
            f"{where}: source={source!r} is no folder, and the hub dataset of that name could not be read "
            f"({type(error).__name__}: {error}). Without a network {advice} in a folder and set source to that folder"
        ) from error
    identity, files = f"hub {source} {split} {table._fingerprint}", Path(datasets.config.HF_CACHE_HOME)
    schema, pieces = table.data.schema, lambda column: iter(table.data.column(column).chunks)
    return Table(schema, _class_names(schema), pieces, identity, files)


# Decoding


@contextmanager
def open_image(content: Encoded) -> Iterator[Image.Image]:
    """Opens an image safely; ValueError where it is none or has too many pixels."""
    if content is None:
        raise ValueError("there are no bytes of an image, at most the name of a file")
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        yield image


def decoded(selection: Selection, *, name: str, size_px: int, channels: int, where: str) -> tuple[Tensor, Path]:
    """Images uint8 (n, channels, size_px, size_px) and their file, whose name begins with `name`; decodes them only if
    they are not in the cache. OSError, before decoding, where the disk is too full."""
    shape = (len(selection.labels), channels, size_px, size_px)
    digest = hashlib.sha256(repr((selection.identity, shape, SQUARE_VERSION, PIL.__version__)).encode()).hexdigest()
    stem = re.sub(r"\W+", "-", name).strip("-")
    file = paths.DECODED / f"{stem}-{digest[:20]}.npy"
    with suppress(FileNotFoundError, ValueError):
        return open_images(file, shape=shape), file
    with locked(file, wait=True):  # another process may decode the same images
        with suppress(FileNotFoundError, ValueError):
            return open_images(file, shape=shape), file
        require_space(file.parent, math.prod(shape))
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        chunks = _decode(selection, size_px=size_px, channels=channels, where=where)
        write_bytes(file, chain([header.getvalue()], chunks))
    return open_images(file, shape=shape), file


def _decode(selection: Selection, *, size_px: int, channels: int, where: str) -> Iterator[bytes]:
    """Yields the bytes of decoded images, in order. Looks at every image before it raises the ValueError that names all
    broken ones."""
    broken: list[str] = []

    def decode(named: tuple[str, Encoded]) -> bytes | str:  # or what is wrong with the image
        try:
            with open_image(named[1]) as image:
                square = np.array(to_square(image, size_px=size_px, channels=channels))
        except Exception as error:  # broken files raise about anything
            return f"{named[0]}: {type(error).__name__}: {error}"
        return square.reshape(size_px, size_px, channels).transpose(2, 0, 1).tobytes()

    images, count = selection.read(), math.ceil(len(selection.labels) / CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes without the GIL
        for _ in progress(count, label=f"{where}: decoding {CHUNK} images"):
            done = list(pool.map(decode, islice(images, CHUNK)))
            broken += [text for text in done if isinstance(text, str)]
            if not broken:
                yield b"".join(done)
    if broken:
        raise ValueError("\n".join([f"{where}: replace or remove {len(broken)} images that cannot be read", *broken]))


def open_images(file: Path, *, shape: tuple[int, ...] | None = None) -> Tensor:
    """Maps the images of a decoded file into memory, uint8 (N, C, H, W). Writing into the tensor does not change the
    file. FileNotFoundError or ValueError where the file is missing or damaged."""
    try:
        array = np.load(file, mmap_mode="c")
        if array.dtype != np.uint8 or shape not in (None, array.shape):
            raise ValueError(f"it holds {array.dtype} {array.shape}, not uint8 {shape}")
    except OSError:
        raise
    except Exception as error:  # what another program wrote raises about anything
        raise ValueError(f"{file} is damaged ({error}): delete it") from error
    return torch.from_numpy(array)


def to_square(image: Image.Image, *, size_px: int, channels: int) -> Image.Image:
    """Turns any image upright and into an RGB (3 channels) or greyscale (1) square.

    Alpha is composited onto black and 16 bits are scaled to 8. An image of the right size keeps its pixels; for others
    the short side is resized to `size_px` (Lanczos, antialiased) and the centre is cropped.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips
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
