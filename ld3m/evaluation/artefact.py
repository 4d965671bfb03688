"""A distilled set on disk: one folder with its tensors, its images as an image folder, and a card.

distilled.safetensors    images (N, C, H, W), labels (N,), and the learned codes; everything about the run as JSON
                         in the metadata
images/<class>/<k>.png   the same images, clamped to [0, 1] and rounded to 8 bit
card.md                  what it is, where it comes from, and how to train on it
"""

import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ld3m.data.dataset import Normalization
from ld3m.evaluation.statistics import interval
from ld3m.runtime.storage import new_folder, read_tensors, tensors_hash, write_tensors

TEMPLATE = Path(__file__).with_name("card.md")
LIBRARIES = ("torch", "diffusers", "datasets", "safetensors", "numpy")


def write_artefact(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    labels: Tensor,
    classes: tuple[str, ...],
    normalization: Normalization,
    name: str,
    record: dict[str, Any],
) -> None:
    """Write the folder whole or not at all.

    Parameters
    ----------
    tensors
        `images`, normalized (N, C, H, W), and all that they are rendered from.
    record
        Plain JSON values for the metadata: `configuration`, `history`, `validation`, `cost`, and `score`: accuracies of
        the chosen iteration, which the recipe on the card reproduces.
    """
    tensors = tensors | {"labels": labels}
    metadata = record | {
        "name": name,
        "classes": list(classes),
        "normalization": {"mean": list(normalization.mean), "std": list(normalization.std)},
        "tensors_sha256": tensors_hash(tensors),
        "libraries": {library: version(library) for library in LIBRARIES},
    }
    with new_folder(folder) as partial:
        write_tensors(partial / "distilled.safetensors", tensors, metadata)
        write_images(partial / "images", normalization.denormalize(tensors["images"]), labels, classes)
        (partial / "card.md").write_text(_card(metadata, tensors["images"].shape))


def read_artefact(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a distilled set from its folder.

    Returns
    -------
    tuple of dict
        The tensors, among them `images`, normalized (N, C, H, W), and `labels` (N,); and the metadata.

    Raises
    ------
    FileNotFoundError, ValueError
        Where the file is missing; where it is broken, or its tensors are not those that were written.
    """
    file = Path(folder) / "distilled.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: distill it first, or give the folder of a distilled set")
    tensors, metadata = read_tensors(file)
    with suppress(Exception):  # what another program wrote raises about anything
        images, labels, classes = tensors["images"], tensors["labels"], metadata["classes"]
        pixels = Normalization(**metadata["normalization"]).denormalize(images)
        has_shapes = pixels.ndim == 4 and labels.shape == images.shape[:1] and not labels.is_floating_point()
        is_named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        is_labeled = set(labels.tolist()) <= set(range(len(classes)))
        is_whole = metadata["tensors_sha256"] == tensors_hash(tensors) and bool(pixels.isfinite().all())
        if has_shapes and is_named and is_labeled and is_whole:
            return tensors, metadata
    raise ValueError(f"{file}: the tensors do not fit the hash, classes or normalization beside them: distill it again")


def write_images(folder: Path, pixels: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
    """Write pixels (N, C, H, W) in [-1, 1] as <class>/<k>.png."""
    for label, name in enumerate(classes):
        place = folder / class_folder(label, name)
        place.mkdir(parents=True)
        for k, image in enumerate(to_pil(pixels[labels == label])):
            image.save(place / f"{k}.png")


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (N, C, H, W) to grayscale or RGB images, clamped to [-1, 1] and rounded to 8 bit."""
    uint8 = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in uint8]


def class_folder(label: int, name: str) -> str:
    """Name the folder of a class so that no name leaves the parent folder or equals another."""
    safe = re.sub(r"[^\w -]", "_", name)
    return f"{label:03d} {safe}".strip()


def _card(metadata: dict[str, Any], shape: torch.Size) -> str:
    configuration, classes, accuracies = metadata["configuration"], metadata["classes"], metadata["score"]["accuracy"]
    reached = f"{sum(accuracies) / len(accuracies):.3f}"
    if len(accuracies) > 1:
        reached += " (95 % t interval {1:.3f} to {2:.3f})".format(*interval(accuracies))
    size = {"channels": shape[1], "size_px": shape[2], "classes": len(classes)} | configuration["network_size"]
    mean, std = (", ".join(f"{value:.4f}" for value in metadata["normalization"][key]) for key in ("mean", "std"))
    return TEMPLATE.read_text().format(
        **metadata,
        shape=shape,
        ipc=shape[0] // len(classes),
        class_names=", ".join(classes),
        mean=mean,
        std=std,
        chosen=max(metadata["validation"], key=lambda record: record["accuracy"]),
        costs="".join(f"| {key} | {value} |\n" for key, value in metadata["cost"].items()),
        prior=configuration["prior_sha256"] or "none used",
        reached=reached,
        n=len(accuracies),
        recipe=configuration["validation_recipe"] | {"strategy": configuration["augmentation"]},
        size=", ".join(f"{key}={value}" for key, value in size.items()),
    )
