"""A distilled set in the formats of others.

    python -m ld3m.reporting.export runs/mnist5k/main/distilled/dm-ld3m-1/run-0 ddranking TARGET

ddranking    images.pt, labels.pt and, where a rate was learned, lr.pt: what DD-Ranking's quick start loads and passes
             to `compute_metrics` (README of NUS-HPC-AI-Lab/DD-Ranking); normalization.json has the mean and std of the
             images. DD-Ranking trains on the images as they are and normalizes test images itself (its
             ddranking/utils/data.py): CIFAR with mean 0.4914 0.4822 0.4465 and std 0.2023 0.1994 0.2010, ImageNet with
             0.485 0.456 0.406 and 0.229 0.224 0.225. Distill with these as `normalization` in params.yaml.
folder       <class>/<k>.png, 8 bit
huggingface  data/train-00000-of-00001.parquet, 8 bit, and a card: `datasets.load_dataset(TARGET)` reads it

TARGET is a new folder; one that is there is not overwritten.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld3m.data.dataset import Normalization
from ld3m.evaluation.artefact import read_artefact, to_pil, write_images
from ld3m.runtime.storage import new_folder, write_json


def export(folder: Path, form: str, target: Path) -> None:
    """Write the distilled set in `folder` as `target`, a new folder, whole or not at all."""
    if form not in FORMATS:
        raise ValueError(f"format is {form!r}; there are {', '.join(FORMATS)}")
    if target.exists():
        raise ValueError(f"{target} is there already: remove it, or name another")
    tensors, metadata = read_artefact(folder)
    with new_folder(target) as partial:
        FORMATS[form](partial, tensors, metadata)


def _ddranking(target: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    torch.save(tensors["images"].clone(), target / "images.pt")
    torch.save(tensors["labels"].clone(), target / "labels.pt")
    write_json(target / "normalization.json", metadata["normalization"])
    if "student_lr" in tensors:
        torch.save(tensors["student_lr"].clone(), target / "lr.pt")


def _folder(target: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    write_images(target, _pixels(tensors, metadata), tensors["labels"], tuple(metadata["classes"]))


def _huggingface(target: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    from datasets import ClassLabel, Dataset, Features, Image

    encoded = []
    for image in to_pil(_pixels(tensors, metadata)):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = Features(image=Image(), label=ClassLabel(names=metadata["classes"]))
    table = Dataset.from_dict({"image": encoded, "label": tensors["labels"].tolist()}, features=features)
    (target / "data").mkdir()
    table.to_parquet(target / "data/train-00000-of-00001.parquet")
    (target / "README.md").write_text(
        f"# {metadata['name']}\n\nA distilled set of {len(encoded)} images, clamped to [0, 1] and rounded to 8 bit; "
        f"the tensors it is made from have the sha256 {metadata['tensors_sha256']}.\n\n"
        f"Normalize with mean {metadata['normalization']['mean']} and std {metadata['normalization']['std']}.\n"
    )


def _pixels(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Tensor:
    return Normalization(**metadata["normalization"]).denormalize(tensors["images"])


FORMATS: dict[str, Callable[[Path, dict[str, Tensor], dict[str, Any]], None]] = {
    "ddranking": _ddranking,
    "folder": _folder,
    "huggingface": _huggingface,
}


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case [folder, form, target]:
                export(Path(folder), form, Path(target))
                print(target)
            case _:
                sys.exit(__doc__)
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
