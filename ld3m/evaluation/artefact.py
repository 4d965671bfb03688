"""A distilled set on disk: one folder with its tensors, its images as an image folder, and a card.

distilled.safetensors    images (N, C, H, W), labels (N,), and the learned codes; everything about the run as JSON
                         in the metadata
images/<class>/<k>.png   the same images, clamped to [0, 1] and rounded to 8 bit
card.md                  what it is, where it comes from, and how to train on it
"""

import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ld3m.data.dataset import Normalization
from ld3m.evaluation.statistics import interval
from ld3m.runtime.storage import new_folder, read_tensors, tensors_hash, write_tensors

LIBRARIES = ("torch", "diffusers", "datasets", "safetensors", "numpy")
RECIPE = """\
import ld3m
from ld3m.pipeline.profiles import load_params
from ld3m.pipeline.experiment import Experiment
from ld3m.models.networks import build
from ld3m.runtime.seeds import derive
from ld3m.evaluation.training import accuracy, train

images, labels = ld3m.load(".")  # this folder; normalised with the mean and std above
dataset = Experiment(load_params()).dataset
real = dataset.normalization.normalize(dataset.{split}.x())
recipe = {recipe}
scores = []
for k in range({n}):
    seed = derive({seed}, "judge", "{network}", k)
    network = build("{network}", {size}, seed=seed)
    network = train(network, images.__getitem__, labels, seed=seed, **recipe)
    scores.append(accuracy(network, real.__getitem__, dataset.{split}.labels))
"""


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
    """Writes the folder whole or not at all.

    `tensors["images"]` are normalised images (N, C, H, W). `record` is kept in the metadata (plain JSON values):
    `configuration`, `history`, `validation`, `cost`, and `score`: the accuracies of the chosen iteration, which the
    recipe on the card reproduces.
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
    """Tensors and metadata of a distilled set; ValueError where it is broken, or its tensors are not those that the
    metadata and the card were written for."""
    file, card = Path(folder) / "distilled.safetensors", Path(folder) / "card.md"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; `dvc repro` distils it")
    tensors, metadata = read_tensors(file)
    digest = tensors_hash(tensors)
    if not isinstance(metadata, dict) or metadata.get("tensors_sha256") != digest:
        raise ValueError(f"{file}: the tensors do not match the hash in the metadata; run `dvc repro -f` for this cell")
    if card.exists() and digest not in card.read_text(errors="replace"):
        raise ValueError(f"{card} is of other tensors: their hash is {digest}; run `dvc repro -f` for this cell")
    if not _fits(metadata, tensors):
        raise ValueError(f"{file}: the classes or the normalization in the metadata do not fit the images and labels")
    return tensors, metadata


def _fits(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    try:
        images, labels, classes = tensors["images"], tensors["labels"], metadata["classes"]
        normalization = Normalization(**metadata["normalization"])
        is_named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        numbers = (*normalization.mean, *normalization.std)
        is_measured = len(normalization.mean) == images.shape[1] and all(map(math.isfinite, numbers))
        shapes_fit = images.ndim == 4 and labels.shape == images.shape[:1] and not labels.is_floating_point()
        return is_named and is_measured and shapes_fit and set(labels.tolist()) <= set(range(len(classes)))
    except (KeyError, TypeError, ValueError, IndexError):
        return False


def write_images(folder: Path, pixels: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
    """<class>/<k>.png of pixels (N, C, H, W) as `to_pil` makes them."""
    for label, name in enumerate(classes):
        place = folder / class_folder(label, name)
        place.mkdir(parents=True)
        for k, image in enumerate(to_pil(pixels[labels == label])):
            image.save(place / f"{k}.png")


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Greyscale or RGB images of pixels (N, C, H, W), clamped to [-1, 1] and rounded to 8 bit."""
    uint8 = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in uint8]


def class_folder(label: int, name: str) -> str:
    """A name comes from outside: none may leave the folder; the number keeps apart names that become the same."""
    safe = re.sub(r"[^\w -]", "_", name)
    return f"{label:03d} {safe}".strip()


def _card(metadata: dict[str, Any], shape: torch.Size) -> str:
    configuration = metadata["configuration"]
    network, score = configuration["network"], metadata["score"]
    accuracies = score["accuracy"]
    reached = f"{sum(accuracies) / len(accuracies):.3f}"
    if len(accuracies) > 1:
        reached += " (95 % t interval {1:.3f} to {2:.3f})".format(*interval(accuracies))
    count, channels, size_px, _ = shape
    size = {"channels": channels, "size_px": size_px, "classes": len(metadata["classes"])}
    chosen = max(metadata["validation"], key=lambda record: record["accuracy"])
    mean, std = (", ".join(f"{value:.4f}" for value in metadata["normalization"][key]) for key in ("mean", "std"))
    lines = [
        f"# {metadata['name']}",
        "",
        f"{count} images, {count // len(metadata['classes'])} a class ({', '.join(metadata['classes'])}), "
        f"{channels} x {size_px} x {size_px}, normalised with mean ({mean}) and std ({std}).",
        "",
        f"Iteration {chosen['iteration']} of {configuration['iterations']}, chosen on validation data, where "
        f"{network} reached {chosen['accuracy']:.3f} (it was chosen there, so this flatters; "
        "scores on test data are in reports/tables).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in metadata["cost"].items()),
        f"| data, sha256 | {configuration['data_sha256']} |",
        f"| prior, sha256 | {configuration['prior_sha256'] or 'none used'} |",
        f"| tensors, sha256 | {metadata['tensors_sha256']} |",
        "",
        "The whole configuration is in the metadata of distilled.safetensors; images/ holds the same images "
        "clamped and rounded to 8 bit.",
        "",
        "## Train on it",
        "",
        f"{network} reaches {reached} on {score['split']} data, n = {len(accuracies)} networks, with:",
        "",
        "```python",
        RECIPE.format(
            split=score["split"],
            recipe=configuration["validation_recipe"] | {"strategy": configuration["augmentation"]},
            n=len(accuracies),
            seed=configuration["seed"],
            network=network,
            size=", ".join(f"{key}={value}" for key, value in (size | configuration["network_size"]).items()),
        )
        + "```",
        "",
    ]
    return "\n".join(lines)
