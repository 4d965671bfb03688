"""Where images come from: a split of a parquet folder, an image folder or a hub dataset, and its decoding."""

import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ld3m.paths import ROOT

if TYPE_CHECKING:
    import datasets  # importing it takes 1.5 s, hence inside the functions

EMBEDDED = "for the embedded data run `dvc pull data.dvc`"
CHUNK = 512  # images whose encoded bytes are in memory at once


def read_split(source: str, split: str, *, key: str) -> "datasets.Dataset":
    """One split of a folder (relative: to the repository root) or, where no such folder is, of a hub dataset.

    Local files bypass the cache of `datasets`: nothing is left behind, nothing stale is served. `key` names
    the dataset in errors: FileNotFoundError for what is not there, ValueError for broken files.
    """
    import datasets

    folder = ROOT / Path(source).expanduser()
    place = f"{split}.parquet, {split}-*.parquet or {split}/<class>/<image files>"
    if folder.is_dir():
        if files := _parquet_files(folder, split):
            return datasets.concatenate_datasets([datasets.Dataset(_read_parquet(file)) for file in files])
        if (folder / split).is_dir():
            return _read_image_folder(folder / split)
        raise FileNotFoundError(
            f"{key}: {folder} has no split {split!r}: place {place} there, or change {key}.splits in "
            f"params.yaml; {EMBEDDED}"
        )
    if _is_path(source, folder):
        raise FileNotFoundError(f"{key}.source: no folder {folder}: place {place} there; {EMBEDDED}")
    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # offline, unknown, gated and broken datasets raise about anything
        raise FileNotFoundError(
            f"{key}.source: {source!r} is no folder, and split {split!r} of the hub dataset of that name "
            f"could not be read ({type(error).__name__}: {error}). Without a network place {place} in a "
            f"folder and set {key}.source in params.yaml to that folder; {EMBEDDED}"
        ) from error


def _is_path(source: str, folder: Path) -> bool:
    # A missing `data/mnist5k` must not be asked from the hub, where anyone could own the name.
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None
    return not is_hub_id or source.startswith("data/") or ("/" in source and folder.parent.is_dir())


def _parquet_files(folder: Path, split: str) -> list[Path]:
    for place in (folder, folder / "data"):
        files = sorted([*place.glob(f"{split}.parquet"), *place.glob(f"{split}-*.parquet")])
        totals = {int(part[1]) for file in files if (part := re.search(r"-\d+-of-(\d+)$", file.stem))}
        if totals and totals != {len(files)}:
            names = [file.name for file in files]
            raise ValueError(f"{place}: split {split!r} should be {sorted(totals)} files, there are {names}")
        if files:
            return files
    return []


def _read_parquet(file: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            return opened.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no readable parquet file ({error}): fetch it again; {EMBEDDED}") from error


def _read_image_folder(folder: Path) -> "datasets.Dataset":
    import datasets

    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    names = sorted(entry.name for entry in folder.glob("[!.]*") if entry.is_dir())
    paths, labels = [], []
    for label, name in enumerate(names):
        files = [file for file in (folder / name).rglob("[!.]*") if file.suffix.lower() in suffixes]
        paths += sorted(map(str, files))
        labels += [label] * len(files)
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def decode(
    table: "datasets.Dataset", column: str, rows: np.ndarray, *, size_px: int, channels: int, where: str
) -> Tensor:
    """The images of `rows` as uint8 (n, channels, size_px, size_px); `where` names the split in errors."""
    import datasets

    try:
        encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise ValueError(f"{where}: column {column!r} holds {table.features[column]}, not images") from error
    uint8 = torch.empty(len(rows), channels, size_px, size_px, dtype=torch.uint8)

    def decode_one(row: int, item: dict | None) -> Tensor:
        try:
            if item is None:
                raise ValueError("the cell is empty")
            with Image.open(item["path"] if item["bytes"] is None else io.BytesIO(item["bytes"])) as image:
                array = np.array(to_square(image, size_px=size_px, channels=channels))
        except Exception as error:  # broken files raise about anything
            name = item["path"] if item and item["path"] else "no file name"
            raise ValueError(
                f"{where}, row {row} ({name}) is not a readable image ({type(error).__name__}: {error}): "
                f"replace or remove it"
            ) from error
        return torch.from_numpy(array.reshape(size_px, size_px, channels)).permute(2, 0, 1)

    with (
        ThreadPoolExecutor() as pool,  # PIL decodes and resizes without the GIL
        tqdm(desc=where, total=len(rows), unit="image", disable=None, delay=2) as bar,
    ):
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK].tolist()
            images = pool.map(decode_one, chunk, encoded[chunk][column])
            uint8[first : first + len(chunk)] = torch.stack(list(images))
            bar.update(len(chunk))
    return uint8


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
