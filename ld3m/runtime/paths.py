"""Every path of the project, from one root."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARAMS = ROOT / "params.yaml"
PROFILES = ROOT / "profiles"
DECODED = ROOT / "cache/decoded"  # images as `data.load_dataset` decoded them; made again where it is missing
TABLES = ROOT / "reports/tables"
FIGURES = ROOT / "reports/figures"
REPORT = ROOT / "reports/index.html"
FULL = ROOT / "reports/full"  # tables/ and figures/ of the report, with what `more` adds


def prior_folder(dataset: str) -> Path:
    return ROOT / "runs" / dataset / "prior"


def prior_check_folder(dataset: str) -> Path:
    return ROOT / "runs" / dataset / "prior-check"


def gan_folder(dataset: str) -> Path:
    return ROOT / "runs" / dataset / "gan"


def gan_check_folder(dataset: str) -> Path:
    return ROOT / "runs" / dataset / "gan-check"


def trajectories_folder(dataset: str) -> Path:
    return ROOT / "runs" / dataset / "trajectories"


def distilled_folder(dataset: str, cell: str, run: int) -> Path:
    """`cell` is <objective>-<space>-<ipc>."""
    return ROOT / "runs" / dataset / "distilled" / cell / f"run-{run}"


def scores_folder(dataset: str, cell: str) -> Path:
    return ROOT / "runs" / dataset / "scores" / cell


def judged_folder(dataset: str, name: str) -> Path:
    """Scores of a set that no stage made, under a name of the user's choice."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise ValueError(f"name is {name!r}: a set is named by letters, digits, '_', '-' and '.'")
    return ROOT / "runs" / dataset / "judged" / name


def cost_file(dataset: str, cell: str, run: int) -> Path:
    """Seconds and memory differ from time to time: they lie apart from runs/, where the same parameters give the same
    bytes."""
    return ROOT / "costs" / dataset / "cells" / cell / f"run-{run}.json"


def checkpoint_file(dataset: str, name: str) -> Path:
    """Outside every DVC output, which DVC deletes before a stage runs."""
    return ROOT / "checkpoints" / dataset / f"{name}.safetensors"


def gradient_norms_file(dataset: str) -> Path:
    return ROOT / "runs" / dataset / "gradient_norms.json"


def ablation_file(dataset: str, ablation: str) -> Path:
    return ROOT / "runs" / dataset / "ablations" / f"{ablation}.json"


def ablation_cost_file(dataset: str, ablation: str) -> Path:
    return ROOT / "costs" / dataset / "ablations" / f"{ablation}.json"
