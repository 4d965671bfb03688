"""A distilled set on disk: one folder with its tensors, its images as an image folder, and a card.

distilled.safetensors    images (N, C, H, W), labels (N,), and the learned codes; everything about the run as JSON
                         in the metadata
images/<class>/<k>.png   the same images, clamped to [0, 1] and rounded to 8 bit
card.md                  what it is, where it comes from, and how to train on it
"""

import hashlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ld3m.data import Normalization
from ld3m.storage import new_folder, read_tensors, write_tensors

LIBRARIES = ("torch", "diffusers", "datasets", "safetensors", "numpy")
RECIPE = """\
import torch
from safetensors.torch import load_file

distilled = load_file("distilled.safetensors")
images, labels = distilled["images"], distilled["labels"]  # normalised with the mean and std above
network = ...  # any classifier of (N, {channels}, {size_px}, {size_px}) images with {classes} outputs
optimizer = torch.optim.SGD(network.parameters(), lr={learning_rate}, momentum={momentum}, weight_decay={weight_decay})
for epoch in range({epochs}):  # the whole set is one batch
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
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
    `configuration`, `history`, `validation` and `cost`.
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
        _write_images(partial / "images", normalization.to_pixels(tensors["images"]), labels, classes)
        (partial / "card.md").write_text(_card(metadata, tensors["images"].shape))


def read_artefact(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a distilled set; ValueError where it is broken or its tensors are not those it was
    written with."""
    file = Path(folder) / "distilled.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; `dvc repro` distils it")
    tensors, metadata = read_tensors(file)
    if metadata.get("tensors_sha256") != tensors_hash(tensors):
        raise ValueError(f"{file}: the tensors do not match the hash in the metadata; run `dvc repro -f` for this cell")
    return tensors, metadata


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_images(folder: Path, pixels: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
    uint8 = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    for label, name in enumerate(classes):
        # a name comes from outside: none may leave the folder; the number keeps apart names that become the same
        safe = re.sub(r"[^\w -]", "_", name)
        place = folder / f"{label:03d} {safe}".strip()
        place.mkdir(parents=True)
        for k, image in enumerate(uint8[labels.cpu() == label]):
            array = image.movedim(0, -1).numpy()
            Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(place / f"{k}.png")


def _card(metadata: dict[str, Any], shape: torch.Size) -> str:
    configuration = metadata["configuration"]
    recipe = configuration["validation_recipe"]
    count, channels, size_px, _ = shape
    chosen = max(metadata["validation"], key=lambda record: record["accuracy"])
    mean, std = (", ".join(f"{value:.4f}" for value in metadata["normalization"][key]) for key in ("mean", "std"))
    lines = [
        f"# {metadata['name']}",
        "",
        f"{count} images, {count // len(metadata['classes'])} a class ({', '.join(metadata['classes'])}), "
        f"{channels} x {size_px} x {size_px}, normalised with mean ({mean}) and std ({std}).",
        "",
        f"Iteration {chosen['iteration']} of {configuration['iterations']}, chosen on validation data, where "
        f"{configuration['network']} reached {chosen['accuracy']:.3f} (it was chosen there, so this flatters; "
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
        "```python",
        RECIPE.format(
            channels=channels,
            size_px=size_px,
            classes=len(metadata["classes"]),
            learning_rate=recipe["learning_rate"],
            momentum=recipe["momentum"],
            weight_decay=recipe["weight_decay"],
            epochs=recipe["epochs"],
        )
        + "```",
        "",
        f"The scores add the augmentation `{configuration['augmentation']}`, a rate that rises over the first half of "
        "the epochs and then falls as a cosine, and a moving average of the weights.",
        "",
    ]
    return "\n".join(lines)
