"""Decoded images on disk: one memory-mapped uint8 array for a split and a choice of its rows, made once.

Its name stands for all that its bytes depend on, so that a changed source or setting is another file. Every process
that reads it shares its pages. `make clean` removes what has gathered; what is missing or cut short is made again.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ld3m.data import sources
from ld3m.runtime import paths
from ld3m.runtime.storage import require_space, write_parts

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class StoredSplit:
    """A split of a source, of which nothing is read that is on disk already; `key` names the dataset in errors."""

    source: str
    split: str
    key: str
    classes: tuple[str, ...] | None = None  # of an image folder, those whose folders are looked into; None: all

    @cached_property
    def table(self) -> "datasets.Dataset":
        return sources.read_split(self.source, self.split, key=self.key, classes=self.classes)

    @cached_property
    def identity(self) -> str:
        """What changes when the source does."""
        local = sources.identity(self.source, self.split, key=self.key, classes=self.classes)
        return local or f"hub {self.source} {self.split} {self.table._fingerprint}"

    def names(self, **columns: str) -> list[str]:
        """The class names that the split knows; of an image folder without a look into the folders of its classes."""
        found = sources.class_folders(self.source, self.split, key=self.key)
        return self.labels(**columns)[0] if found is None else found

    def of_classes(self, kept: Sequence[str]) -> "StoredSplit":
        """The split for what needs these classes alone: of an image folder the others' folders may be slow to list."""
        there = sources.class_folders(self.source, self.split, key=self.key)
        if there is None or set(there) <= set(kept):
            return self
        return replace(self, classes=tuple(name for name in there if name in kept))

    def labels(self, *, image_column: str, label_column: str) -> tuple[list[str], np.ndarray]:
        """What `sources.read_labels` gives for the split."""
        columns = {"image_column": image_column, "label_column": label_column}
        file = self._file("json", "labels", columns)
        try:
            stored = json.loads(file.read_bytes())
        except (FileNotFoundError, ValueError):
            names, values = sources.read_labels(self.table, self.split, key=self.key, **columns)
            stored = {"names": names, "labels": values.tolist()}
            write_parts(file, [json.dumps(stored).encode()])
        return stored["names"], np.array(stored["labels"], dtype=np.int64)

    def images(
        self, rows: np.ndarray, *, count: int, image_column: str, size_px: int, channels: int
    ) -> tuple[Tensor, Path, Tensor | None]:
        """Images uint8 (M, channels, size_px, size_px), their file, and where in them `rows` (n,) are: None for all.

        `count` is the number of rows of the split. Where the whole split is on disk, rows are found in it; else they
        are decoded, and no other rows are. OSError, before decoding, where the disk is too full for them.
        """
        shape = {"size_px": size_px, "channels": channels}
        settings = shape | {"image_column": image_column, "code": sources.square_version()}
        every = len(rows) == count
        whole = self._file("npy", "all", settings)
        chosen = whole if every else self._file("npy", hashlib.sha256(rows.tobytes()).hexdigest(), settings)
        needed = (len(rows), channels, size_px, size_px)
        for file, index in {chosen: None, whole: None if every else torch.from_numpy(rows)}.items():
            with suppress(FileNotFoundError, ValueError):
                return open_images(file, shape=needed if index is None else (count, *needed[1:])), file, index
        require_space(chosen.parent, int(np.prod(needed)))
        shared = shape | {"where": f"{self.key}, split {self.split!r}"}
        named = sources.named_files(self.source, self.split, key=self.key)
        write_parts(chosen, _npy(needed, sources.decode(self.table, image_column, rows, named=named, **shared)))
        return open_images(chosen, shape=needed), chosen, None

    def _file(self, suffix: str, *parts: Any) -> Path:
        digest = hashlib.sha256(repr((self.identity, *parts)).encode()).hexdigest()
        name = re.sub(r"\W+", "-", f"{Path(self.source).name}-{self.split}").strip("-")
        return paths.DECODED / f"{name}-{digest[:20]}.{suffix}"


def open_images(file: Path, *, shape: tuple[int, ...] | None = None) -> Tensor:
    """The images of a file as a tensor over its pages, which are read when they are looked at.

    FileNotFoundError or ValueError where the file is absent or not whole. What is written into the tensor does not
    reach the file.
    """
    try:
        array = np.load(file, mmap_mode="c")
        if array.dtype != np.uint8 or shape not in (None, array.shape):
            raise ValueError(f"it holds {array.dtype} {array.shape}, not uint8 {shape}")
    except OSError:
        raise
    except Exception as error:  # what another program wrote raises about anything
        raise ValueError(f"{file} is not whole ({error}): delete it") from error
    return torch.from_numpy(array)


def _npy(shape: tuple[int, ...], chunks: Iterator[np.ndarray]) -> Iterator[bytes]:
    """The parts of an .npy file with the uint8 `chunks`, which are `shape` together."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    yield header.getvalue()
    for chunk in chunks:
        yield chunk.tobytes()
