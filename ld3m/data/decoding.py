"""Images decoded once, to squares, into memory-mapped files.

The name of a decoded file is a hash of all that its bytes depend on, so a changed source or setting gives another file.
All processes share its pages. A missing or damaged file is decoded again.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ld3m.runtime import paths
from ld3m.runtime.progress import progress
from ld3m.runtime.storage import locked, require_space, write_bytes

# Formats that Pillow decodes itself: for others it may start a program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "ICO", "JPEG2000")
FLAT_RANGE = 16  # of 255: an image whose values span no more shows nothing
CHUNK = 512  # images whose encoded bytes are in memory at once
SQUARE_VERSION = 1  # raise it when `to_square` changes a pixel: images are then decoded again

Encoded = bytes | str | None  # the bytes of an image file, or its path; None where there is neither


class Selection(NamedTuple):
    """The images of the selected classes of a split, in the order of the source, not yet decoded."""

    labels: np.ndarray  # (n,) int64, indices into the selected classes
    classes: Sequence[str]  # the selected ones
    identity: str  # changes when the images do
    read: Callable[[], Iterator[tuple[str, Encoded]]]  # yields the name of each image, for errors, and its content
    where: str  # names the split in errors


def some(names: Sequence[str]) -> str:
    """At most five names for an error message."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def open_image(content: Encoded) -> Image.Image:
    """Opens an image safely; ValueError where it is none or has too many pixels."""
    if content is None:
        raise ValueError("it has no bytes of an image")
    try:
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)
    except PIL.UnidentifiedImageError:  # in whose words the file has no name
        raise ValueError(f"it is damaged, or in none of the formats {', '.join(FORMATS)}") from None
    if image.width * image.height > (most := Image.MAX_IMAGE_PIXELS):
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {most} in all: make it smaller")
    return image


def decoded(selection: Selection, *, size_px: int, channels: int) -> tuple[Tensor, Path]:
    """Images uint8 (n, channels, size_px, size_px) and their file; decodes them only if they are not in the cache.

    Prints, every time, which of them have almost one color. OSError, before decoding, where the disk is too full.
    """
    shape = (len(selection.labels), channels, size_px, size_px)
    digest = hashlib.sha256(repr((selection.identity, shape, SQUARE_VERSION, PIL.__version__)).encode()).hexdigest()
    file, note = (paths.DECODED / f"{digest[:20]}{suffix}" for suffix in (".npy", ".txt"))

    def opened() -> tuple[Tensor, Path]:
        images = open_images(file)
        if note.exists():
            print(f"{selection.where}: {note.read_text()}", flush=True)
        return images, file

    with suppress(Exception):  # missing or damaged
        return opened()
    with locked(file, wait=True):  # another process may decode the same images
        with suppress(Exception):
            return opened()
        require_space(file.parent, math.prod(shape))
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        write_bytes(file, chain([header.getvalue()], _decode(selection, note, size_px=size_px, channels=channels)))
    return opened()


def _decode(selection: Selection, note: Path, *, size_px: int, channels: int) -> Iterator[bytes]:
    """Yields the bytes of decoded images, in order. Looks at every image before it raises the ValueError that names all
    broken ones, or those of a class in which at least half have almost one color; fewer of these go into the note."""
    broken, flat = [], []

    def decode(content: Encoded) -> np.ndarray | Exception:
        try:
            with open_image(content) as image:
                return np.array(to_square(image, size_px=size_px, channels=channels))
        except Exception as error:  # broken files raise about anything
            return error

    images, labels = selection.read(), selection.labels.tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes without the GIL
        for k in progress(math.ceil(len(labels) / CHUNK), label=f"{selection.where}: decoding {CHUNK} images"):
            names, contents = zip(*islice(images, CHUNK), strict=True)
            squares = list(pool.map(decode, contents))
            for label, name, square in zip(labels[k * CHUNK : (k + 1) * CHUNK], names, squares, strict=True):
                if isinstance(square, Exception):
                    broken.append(f"{name}: {type(square).__name__}: {square}")
                elif np.ptp(square) <= FLAT_RANGE:
                    flat.append((label, name))
            if not broken:
                yield np.stack(squares).reshape(-1, size_px, size_px, channels).transpose(0, 3, 1, 2).tobytes()
    if broken:
        shown = [*broken[:5], *([f"and {len(broken) - 5} more"] if len(broken) > 5 else [])]
        counted = f"{len(broken)} of {len(labels)} images cannot be read: replace or remove"
        raise ValueError("\n".join([f"{selection.where}: {counted}", *shown]))
    if flat:
        write_bytes(note, _flat_images(selection, flat).encode())


def _flat_images(selection: Selection, flat: list[tuple[int, str]]) -> str:
    """Says which images, given by label and name, have almost one color; ValueError if half of a class has."""
    have = f"have almost one color (values within {FLAT_RANGE} of 255)"
    advice = "remove blank and transparent images, and scale 12 bits in 16-bit files to the full range"
    for label, total in enumerate(np.bincount(selection.labels)):
        names = [name for other, name in flat if other == label]
        if 2 * len(names) >= total > 0:
            of_class = f"{len(names)} of {total} images of class {selection.classes[label]!r}"
            raise ValueError(f"{selection.where}: {of_class} {have}: {some(names)}: {advice}")
    counted = f"{len(flat)} of {len(selection.labels)} images {have} and are used as they are"
    return f"{counted}: {some([name for _, name in flat])}: {advice}"


def open_images(file: Path) -> Tensor:
    """Maps the images of a decoded file, uint8 (N, C, H, W). Writing into the tensor does not change the file."""
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def to_square(image: Image.Image, *, size_px: int, channels: int) -> Image.Image:
    """Turns any image upright and into an RGB (3 channels) or grayscale (1) square.

    Alpha is composited onto black and 16 bits are scaled to 8. The short side is resized to `size_px` (Lanczos,
    antialiased), unless it has that size, and the center is cropped.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode!r} have no fixed range, convert them to 8 or 16 bits")
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = image.convert("RGB").convert("L" if channels == 1 else "RGB")
    if min(image.size) != size_px:
        scale = size_px / min(image.size)
        size = (max(size_px, round(image.width * scale)), max(size_px, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - size_px) // 2, (image.height - size_px) // 2
    return image.crop((left, top, left + size_px, top + size_px))
