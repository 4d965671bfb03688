"""Every path of the project, from one root."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARAMS = ROOT / "params.yaml"
PROFILES = ROOT / "profiles"
CHECKPOINTS = ROOT / "checkpoints"  # outside every DVC output, which DVC deletes before a stage runs
TABLES = ROOT / "reports/tables"
FIGURES = ROOT / "reports/figures"


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


def distilled_folder(dataset: str, cell: str) -> Path:
    """`cell` is <objective>-<space>-<ipc>."""
    return ROOT / "runs" / dataset / "distilled" / cell


def scores_folder(dataset: str, cell: str) -> Path:
    return ROOT / "runs" / dataset / "scores" / cell


def checkpoint_file(dataset: str, cell: str) -> Path:
    return CHECKPOINTS / dataset / f"{cell}.safetensors"


def ablations_folder(dataset: str) -> Path:
    return ROOT / "runs" / dataset / "ablations"
