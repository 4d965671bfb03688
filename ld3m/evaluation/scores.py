"""The file of a cell's scores, its one writer and its one reader.

    {"cell": name, "networks": {architecture: {"accuracy": {"<run>": [one a network]}, "recipe": {...}}}}

Accuracies are fractions in [0, 1] on test images. `recipe` holds what two scores must share to be compared.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ld3m.evaluation.statistics import Accuracies
from ld3m.runtime.storage import write_json


class Scores(NamedTuple):
    """The scores of one cell: `runs` {run: {architecture: one accuracy a network}}, `recipes` {architecture: {...}}."""

    cell: str
    runs: dict[int, Accuracies]
    recipes: dict[str, dict[str, Any]]


def write_scores(file: Path, scores: Scores) -> None:
    """Write the scores of a cell."""
    networks = {
        architecture: {"accuracy": {str(run): of[architecture] for run, of in scores.runs.items()}, "recipe": recipe}
        for architecture, recipe in scores.recipes.items()
    }
    write_json(file, {"cell": scores.cell, "networks": networks})


def read_scores(file: Path) -> Scores:
    """Read the scores of a cell; FileNotFoundError or ValueError names the file where it is missing or broken."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: evaluate {file.parent.name} first")
    try:
        record = json.loads(file.read_text())
        networks, runs = record["networks"], {}
        for architecture, of in networks.items():
            for run, accuracies in of["accuracy"].items():
                runs.setdefault(int(run), {})[architecture] = [float(value) for value in accuracies]
        return Scores(record["cell"], runs, {architecture: of["recipe"] for architecture, of in networks.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no file of scores ({error!r}): evaluate {file.parent.name} again") from error
