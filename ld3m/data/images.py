"""Where images are: an image folder, parquet files or a Hugging Face dataset. Nothing is decoded here."""

import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ld3m.data.decoding import CHUNK, Encoded, Selection, some
from ld3m.runtime.hub import go_offline_if_unreachable
from ld3m.runtime.paths import ROOT

SKIPPED = re.compile(  # folders that systems and tools make
    r"\..*|__(MACOSX|pycache__)|@(eaDir|Recycle|Recently-Snapshot|__thumb|tmp)|#(recycle|snapshot)|\$RECYCLE\.BIN"
    r"|lost\+found|System Volume Information",
    re.IGNORECASE,
)


class Source(NamedTuple):
    """One split of a source: the names of its classes and a function that selects the images of some of them."""

    classes: list[str]
    select: Callable[[Sequence[str]], Selection]


def open_split(source: str, split: str, *, image_column: str, label_column: str, where: str) -> Source:
    """Finds a split in a folder (see `load_dataset`) or, if the source is no path, on the hub.

    `where` names the split in errors: FileNotFoundError for a missing source, ValueError for a broken one.
    """
    folder = ROOT / Path(source).expanduser()
    advice = f"place {split}.parquet, {split}-*.parquet or {split}/<class>/<image files>"
    # A missing `data/mnist5k` must not be asked from the hub, where anyone could own the name.
    is_path = source.startswith("data/") or "/" in source and folder.parent.is_dir()
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and not is_path
    if (folder / split).is_dir():
        return open_image_folder(folder / split, where=where)
    if files := _parquet_files(folder, split):
        table = _parquet_table(files, where=where)
    elif folder.is_dir():
        problem = f"{folder} has no {split!r}: {_what_is_there(folder, split)}{advice} there"
        raise FileNotFoundError(f"{where}: source={source!r}: {problem}")
    elif not is_hub_id:
        raise FileNotFoundError(
            f"{where}: source={source!r}: there is no folder {folder}: name another, or {advice} there"
        )
    else:
        table = _hub_table(source, split, advice=advice, where=where)
    return _open_table(table, image_column=image_column, label_column=label_column, where=where)


def _what_is_there(folder: Path, split: str) -> str:
    """Where a split is that a folder lacks, or what the folder has instead of it: the first words of an advice."""
    names = (split, f"{split}.parquet", f"{split}-*.parquet")
    below = sorted(found.parent for depth in ("*", "*/*") for name in names for found in folder.glob(f"{depth}/{name}"))
    if places := [folder.parent] if folder.name == split else below:
        return f"it is in {places[0]}: set source to that; else "
    entries = [entry for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".parquet"]
    present = {re.sub(r"(-\d+-of-\d+)?\.parquet$", "", entry.name) for entry in entries}
    shown = some(in_order(name for name in present if not SKIPPED.fullmatch(name)))
    return f"it has {shown}: if one of them is this split, name it in splits; else " if shown else ""


def nfc(name: str) -> str:
    """The name in the Unicode form in which equal names are equal."""
    return unicodedata.normalize("NFC", name)


def in_order(names: Iterable[str]) -> list[str]:
    """Names as text, but the numbers in them by value: class2 comes before class10."""

    def key(name: str) -> tuple[list, str]:
        text_and_numbers = re.split(r"0*(\d+)", name)  # in turn; of two numbers that with more digits is larger
        text_and_numbers[1::2] = [(len(digits), digits) for digits in text_and_numbers[1::2]]
        return text_and_numbers, name

    return sorted(names, key=key)


def open_image_folder(folder: Path, *, where: str) -> Source:
    """Opens `<class>/<image files>`, without hidden files and the folders that systems and tools leave.

    A class is the folder's name in the Unicode form NFC. ValueError where class folders hold folders of images.
    """
    folders: dict[str, list[Path]] = {}  # of each class: both forms may be there
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not SKIPPED.fullmatch(entry.name):
            folders.setdefault(nfc(entry.name), []).append(entry)
    if not folders:
        raise ValueError(f"{where}: {folder} has no class folders: place its images in <class>/<image files>")
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}

    def images_in(name: str, pattern: str) -> Iterator[Path]:
        for file in chain.from_iterable(place.glob(pattern) for place in folders[name]):
            if file.suffix.lower() in suffixes and not any(
                map(SKIPPED.fullmatch, file.relative_to(folder).parts[1:-1])
            ):
                yield file

    for name in in_order(folders):
        if (len(folders) == 1 or not any(images_in(name, "[!.]*"))) and any(images_in(name, "*/**/[!.]*")):
            above = min(images_in(name, "*/**/[!.]*")).parents[1]
            inside = in_order(entry.name for entry in above.iterdir() if entry.is_dir())
            longer = str(folder.name / above.relative_to(folder))
            raise ValueError(
                f"{where}: {above} holds folders of images, {some(inside)}. If these are the classes, write {longer!r} "
                f"in place of {folder.name!r}; else move their images up into {folder}/<class>"
            )

    def select(classes: Sequence[str]) -> Selection:
        labels, files = [], []
        for name in filter(classes.__contains__, in_order(folders)):
            found = sorted(map(str, images_in(name, "**/[!.]*")))
            labels += [classes.index(name)] * len(found)
            files += found
        labels, identity = np.array(labels, dtype=np.int64), _identity(folder, files, where=where)
        return Selection(labels, classes, identity, lambda: zip(files, files, strict=True), where)

    return Source(in_order(folders), select)


def _identity(folder: Path, files: Iterable[str | Path], *, where: str) -> str:
    """The hash (SHA-256, hex) of the names, sizes and modification times of files."""
    digest = hashlib.sha256(str(folder).encode())
    for file in files:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{where}: {file} is no regular file: remove it")
        digest.update(f"{os.path.relpath(file, folder)}\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


class Table(NamedTuple):
    schema: Any  # of pyarrow
    pieces: Callable[[str], Iterator[Any]]  # reads a column piece by piece
    identity: str
    files: str | None  # the folder whose files cells may name: a table could name any other


def _open_table(table: Table, *, image_column: str, label_column: str, where: str) -> Source:
    from pyarrow import types

    for setting, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in table.schema.names:
            raise ValueError(f"{where}: {setting}={column!r}: the columns are {table.schema.names}, name one of them")
    kind = table.schema.field(image_column).type
    names_files = f"{where}: column {image_column!r} holds file names: store the bytes, or use a folder of images"
    if types.is_string(kind) or types.is_large_string(kind):
        raise ValueError(names_files)
    if not types.is_struct(kind) or not {"bytes", "path"} <= {field.name for field in kind}:
        needed = (
            "store each image as {bytes, path}, as the library datasets does, or name another column in image_column"
        )
        raise ValueError(f"{where}: column {image_column!r} holds {kind}, not images: {needed}")
    names, labels = _labels(table, label_column, where=f"{where}, column {label_column!r}")

    def read(rows: np.ndarray) -> Iterator[tuple[str, Encoded]]:
        wanted = set(rows.tolist())
        for row, cell in enumerate(chain.from_iterable(table.pieces(image_column))):
            if row in wanted:
                path, content = map((cell.as_py() or {}).get, ("path", "bytes"))
                if path and table.files and Path(os.path.abspath(path)).is_relative_to(table.files):
                    content = content or path
                if path and not content:
                    raise ValueError(f"{names_files} (row {row}: {path!r})")
                yield f"row {row} ({path or 'no file name'})", content

    def select(classes: Sequence[str]) -> Selection:
        selected = np.array([classes.index(name) if name in classes else -1 for name in names], dtype=np.int64)[labels]
        rows = np.flatnonzero(selected >= 0)
        identity = f"{table.identity} {image_column} {hashlib.sha256(rows.tobytes()).hexdigest()}"
        return Selection(selected[rows], classes, identity, lambda: read(rows), where)

    return Source(names, select)


def _labels(table: Table, column: str, *, where: str) -> tuple[list[str], np.ndarray]:
    """Class names and indices (N,) into them of a column of class names or indices."""
    values = [value for piece in table.pieces(column) for value in piece.to_pylist()]
    kinds = set(map(type, values))
    if kinds == {str} and all(values):
        names = in_order(set(map(nfc, values)))
        index = {name: label for label, name in enumerate(names)}
        return names, np.array([index[nfc(value)] for value in values])
    try:
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        names = [nfc(str(name)) for name in features[column]["names"]]
    except Exception:  # nothing, or the words of another program: the labels have no names
        names = None
    if kinds != {int} or not 0 <= min(values) <= max(values) < len(names or range(2**20)):
        shown = some(sorted(set(map(str, values)))) or "no rows at all"
        advice = "change label_column, or remove rows without a label"
        raise ValueError(f"{where}: labels must be class names or integers from 0, not {shown}: {advice}")
    return names or [str(label) for label in range(max(values) + 1)], np.array(values, dtype=np.int64)


def _parquet_table(files: list[Path], *, where: str) -> Table:
    from pyarrow import parquet  # takes a moment that image folders do not need

    def pieces(column: str | None) -> Iterator[Any]:
        for file in files:
            try:
                with parquet.ParquetFile(file) as opened:
                    if column is None:
                        yield opened.schema_arrow
                    else:
                        yield from (batch[column] for batch in opened.iter_batches(CHUNK, columns=[column]))
            except Exception as error:  # broken files raise about anything
                raise ValueError(f"{file} is no readable parquet file ({error}): fetch it again") from error

    schemas = list(pieces(None))
    if len({(schema.metadata or {}).get(b"huggingface") for schema in schemas}) > 1:
        raise ValueError(f"{where}: {files[0]} and the files beside it have different class names: fetch them again")
    return Table(schemas[0], pieces, _identity(files[0].parent, files, where=where), None)


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """In the folder or in any one folder in it: the layouts of the hub. ValueError where some are missing."""
    present = (*folder.glob("*.parquet"), *folder.glob("[!.]*/*.parquet"))
    files = sorted(file for file in present if file.stem == split or file.stem.startswith(f"{split}-"))
    if len(places := sorted({str(file.parent) for file in files})) > 1:
        raise ValueError(f"split {split!r} is in each of the folders {some(places)}: set source to one of them")
    totals = {int(part[1]) for file in files if (part := re.search(r"-\d+-of-(\d+)$", file.stem))}
    if totals and totals != {len(files)}:
        raise ValueError(f"{folder}: split {split!r} has {len(files)} of {sorted(totals)} files: fetch the others")
    return files


def _hub_table(source: str, split: str, *, advice: str, where: str) -> Table:
    go_offline_if_unreachable()
    import datasets  # takes 1.5 s, and reads whether it is offline

    try:
        table = datasets.load_dataset(source, split=split)
    except Exception as error:  # offline, unknown, gated and broken datasets raise about anything
        problem = f"source={source!r} is no folder, and as a hub dataset not readable ({type(error).__name__}: {error})"
        raise FileNotFoundError(f"{where}: {problem}: without a network {advice} in a folder and name it") from error
    identity, files = f"hub {source} {split} {table._fingerprint}", os.path.abspath(datasets.config.HF_CACHE_HOME)
    return Table(table.data.schema, lambda column: iter(table.data.column(column).chunks), identity, files)
