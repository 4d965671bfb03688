"""One distilled cell looked at closely: its images and their start, what is near them, how they are drawn, and what a
network trained on them confuses. Every figure takes the experiment and a cell, so that a widget can draw it again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor, nn

from ld3m.data.dataset import Split
from ld3m.evaluation.artefact import read_artefact
from ld3m.evaluation.training import train
from ld3m.method.sampler import timesteps
from ld3m.method.spaces import LatentCodes
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.params import Params
from ld3m.reporting import figures
from ld3m.reporting.tables import NAMES, Cell, cells
from ld3m.runtime import paths
from ld3m.runtime.seeds import derive

SHOWN_PER_CLASS = 3


def chooser(params: Params) -> widgets.Dropdown:
    """A menu of the distilled cells that are on disk; an LD3M cell is chosen first where there is one."""
    found = {
        f"{NAMES[objective]} {NAMES[space]}, IPC {ipc}": (objective, space, ipc)
        for objective, space, ipc in cells(params, more=True)
        if objective != "none" and _folder(params, (objective, space, ipc)).exists()
    }
    if not found:
        raise FileNotFoundError(
            f"no cell of `grid` is distilled on {params.dataset} yet: `dvc repro distill` makes them"
        )
    first = max(found.values(), key=lambda cell: cell[1] == "ld3m")
    return widgets.Dropdown(options=found, value=first, description="Cell")


def follow(choice: widgets.Dropdown, draw: Callable[[Experiment, Cell], Figure], experiment: Experiment) -> None:
    """Displays the figure of the chosen cell, and in its place that of every cell chosen later."""
    shown = display(draw(experiment, choice.value), display_id=True)
    choice.observe(lambda change: shown.update(draw(experiment, change["new"])), names="value")


def images(experiment: Experiment, cell: Cell) -> Figure:
    """What a set started from in its space and what that became, one column a class, at most three images a class."""
    pixels = _pixels(experiment, cell)
    start = experiment.dataset.normalization.denormalize(experiment.synthetic(*cell[1:]).render().detach())
    rows = {}
    for k in range(min(cell[2], SHOWN_PER_CLASS)):
        rows |= {f"start {k + 1}": start[k :: cell[2]], f"distilled {k + 1}": pixels[k :: cell[2]]}
    return figures.image_rows(rows, columns=_classes(experiment))


def neighbours(experiment: Experiment, cell: Cell, *, count: int = 4) -> Figure:
    """The first image of every class above the real training images that are nearest to it, and how many of these
    have its class."""
    train_split = experiment.dataset.train
    pixels = _pixels(experiment, cell)[:: cell[2]]
    index = nearest(pixels, train_split, count=count)
    rows = {"distilled": pixels}
    for k in range(count):
        same = int((train_split.labels[index[:, k]] == torch.arange(len(pixels))).sum())
        rows[f"neighbour {k + 1}: {same} of {len(pixels)}\nof its class"] = train_split.x(index[:, k])
    return figures.image_rows(rows, columns=_classes(experiment))


def denoising_path(experiment: Experiment, cell: Cell) -> Figure:
    """What the decoder makes of z_T and of the state after every reverse step, for the first image of every class."""
    if cell[1] != "ld3m":
        return figures.words(f"The space {NAMES[cell[1]]} has no reverse process, so nothing is denoised.")
    codes = restored(experiment, cell)
    path = codes.path(torch.arange(0, len(codes.labels), cell[2]))
    ts = timesteps(codes.steps, total=len(codes.prior.alpha_bar), spacing=codes.prior.spacing)[::-1]
    names = ["z_T, noised", *(f"after t = {t}" for t in ts)]
    pixels = experiment.dataset.normalization.denormalize(path)
    return figures.image_rows(dict(zip(names, pixels, strict=True)), columns=_classes(experiment))


def confused(experiment: Experiment, cell: Cell) -> Figure:
    """Where a network of the distilling architecture, trained on the set, errs on validation images."""
    given, validation = experiment.params, experiment.dataset.validation
    set_images, labels = experiment.images_of(*cell)
    seed = derive(given.seed, "explore")
    network = train(
        experiment.new_network(given.distill.network)(seed=seed),
        set_images.__getitem__,
        labels,
        seed=seed,
        **given.recipe(given.distill.network, cell[2]),
    )
    fetch = partial(validation.normalized, experiment.dataset.normalization)
    counts = confusion(network, fetch, validation.labels)
    return figures.confusion(counts, _classes(experiment))


def restored(experiment: Experiment, cell: Cell) -> LatentCodes:
    """The codes of an LD3M cell as they were kept; they render the images of its artefact."""
    name = "{}-{}-{}".format(*cell)
    tensors, metadata = read_artefact(_folder(experiment.params, cell))
    if metadata["configuration"]["space_parameters"] != experiment.params.spaces.ld3m.model_dump():
        raise ValueError(f"{name} was distilled with other values of spaces.ld3m: `dvc repro distill@{name}`")
    codes = experiment.synthetic("ld3m", cell[2])
    with torch.no_grad():
        for key, tensor in codes.tensors().items():
            tensor.copy_(tensors[key])
    return codes


def nearest(pixels: Tensor, split: Split, *, count: int) -> Tensor:
    """Indices (n, count) of the images of a split nearest to pixels (n, C, H, W), by Euclidean distance, in order."""
    parts = torch.arange(len(split)).split(1000)
    distances = torch.cat([torch.cdist(pixels.flatten(1), split.x(part).flatten(1)) for part in parts], dim=1)
    return distances.topk(count, largest=False).indices


@torch.no_grad()
def confusion(network: nn.Module, fetch: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Counts (K, K): how many images `fetch(index)` of class i (row) the network calls class j (column)."""
    parts = torch.arange(len(labels)).split(500)
    logits = torch.cat([network(fetch(index)) for index in parts])  # (N, K)
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def _folder(params: Params, cell: Cell) -> Path:
    """Of run 0 of a distilled cell."""
    return paths.distilled_folder(params.place(*cell, 0), "-".join(map(str, cell)), 0)


def _pixels(experiment: Experiment, cell: Cell) -> Tensor:
    return experiment.dataset.normalization.denormalize(experiment.images_of(*cell)[0])


def _classes(experiment: Experiment) -> list[str]:
    return list(experiment.dataset.train.classes)
