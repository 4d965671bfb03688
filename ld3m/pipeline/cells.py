"""Cells of the tables, and where the files of a cell and of a data set lie."""

import re
from dataclasses import dataclass
from pathlib import Path

from ld3m.pipeline.params import Params
from ld3m.runtime import paths

TABLES = ("main", "report")  # the main table, and what the report adds to it
UNSEEN = "unseen"  # the mean over the architectures that were not used to distill


class Names(dict[str, str]):
    """Names to print; one of your own prints as it is."""

    def __missing__(self, name: str) -> str:
        return name


NAMES = Names({
    "convnet": "ConvNet", "alexnet": "AlexNet", "vgg11": "VGG11", "resnet18": "ResNet18", "vit": "ViT",
    "none": "-", "random_real": "Random real", "herding": "Herding", "k_center": "k-center",
    "iteration0": "Iteration 0", "iteration0_herding": "Iteration 0 from herding", "prior_samples": "Prior samples",
    "dc": "DC", "dm": "DM", "mtt": "MTT", "pixel": "Pixel", "glad": "GLaD", "ld3m": "LD3M",
    "full_data": "Full data", UNSEEN: "Unseen mean",
})  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One entry of `cells` or `controls` in params.yaml: the sets of some runs of one row of a table."""

    dataset: str
    key: str  # the entry's, in params.yaml
    table: str  # "main" or "report": the table that the entry first appears in
    objective: str  # "none" for a control
    space: str  # or the name of the control
    ipc: int  # images per class; 0 for all real images
    runs: tuple[int, ...] = (0,)  # everything random is drawn anew in each run
    prior: str = "data"  # the folder under runs/<dataset> that the cell reads: "data" where it needs none
    experts: str = "data"  # likewise
    iterations: int | None = None  # replaces that of `distill`

    @property
    def row(self) -> tuple[str, str, int]:
        """(objective, space, ipc): entries with the same row are runs of one cell."""
        return self.objective, self.space, self.ipc

    @property
    def name(self) -> str:
        return "-".join(map(str, self.row))

    @property
    def title(self) -> str:
        """ "DM LD3M", or the control's name."""
        return f"{NAMES[self.objective]} {NAMES[self.space]}".removeprefix("- ")

    def artefact(self, run: int) -> Path:
        """The folder of the distilled set of a run."""
        return runs_path(self.dataset, self.table, "distilled", self.key, f"run-{run}")

    @property
    def scores(self) -> Path:
        """The folder of the test accuracies of all runs."""
        return runs_path(self.dataset, self.table, "scores", self.key)

    def cost_file(self, run: int) -> Path:
        """Seconds and memory of distilling the set of a run."""
        return costs_path(self.dataset, self.table, self.key, f"run-{run}.json")


def cells(params: Params, table: str = "report") -> list[Cell]:
    """Return every entry of a table by images per class, controls first; full data last. The report has those of the
    main table too."""
    found = [_cell(params, key) for key in (*params.controls, *params.cells)]
    order = list(NAMES)

    def rank(cell: Cell) -> tuple:
        places = [order.index(name) if name in order else len(order) for name in cell.row[:2]]
        return cell.ipc == 0, cell.ipc, cell.objective != "none", *places, cell.runs

    tables = TABLES[: TABLES.index(table) + 1]
    return sorted((cell for cell in found if cell.table in tables), key=rank)


def first_runs(params: Params, table: str = "report") -> list[Cell]:
    """The entries that hold run 0, one for every row of a table."""
    return [cell for cell in cells(params, table) if 0 in cell.runs]


def cell_of(params: Params, key: str, *, controls: bool = True) -> Cell:
    """The cell of a key of `cells`, or of `controls` unless these are left out; ValueError for any other key."""
    known = (*params.cells, *(params.controls if controls else ()))
    if key not in known:
        where = "cells or controls" if controls else "cells"
        raise ValueError(f"cell = {key!r}: must be a key of {where} in params.yaml: {', '.join(known)}")
    return _cell(params, key)


def _cell(params: Params, key: str) -> Cell:
    if key in params.cells:
        return Cell(params.dataset, key, **params.cells[key].model_dump())
    given = params.controls[key].model_dump()
    name = given.pop("control").rpartition(":")[2]  # of one named by its import path
    return Cell(params.dataset, key, objective="none", space=name, **given)


def runs_path(dataset: str, *parts: str) -> Path:
    """What stages make of a data set and DVC keeps: `runs_path(dataset, "prior")`, say. The same parameters give the
    same bytes."""
    return paths.ROOT.joinpath("runs", dataset, *parts)


def costs_path(dataset: str, *parts: str) -> Path:
    """Seconds and memory of the stages, which vary: apart from what repeats byte for byte."""
    return paths.ROOT.joinpath("costs", dataset, *parts)


def reports_path(dataset: str, *parts: str) -> Path:
    """What Git keeps of a data set: <tables, figures or costs>/<table>, and index.html."""
    return paths.ROOT.joinpath("reports", dataset, *parts)


def evaluated_folder(dataset: str, name: str) -> Path:
    """Scores of a set that no stage made, under a name of the user's choice."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise ValueError(f"name is {name!r}: a set is named by letters, digits, '_', '-' and '.'")
    return runs_path(dataset, "evaluated", name)
