"""The notebooks of every long stage, under the smoke profile, killed at random moments: minutes long. The same with the
loops alone is in test_survive.py."""

import os
import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from executing import run_notebook
from test_survive import INTERRUPTED, KILLS, NEVER, content, server, signalled  # noqa: F401

from ld3m.pipeline import profiles as config
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Interrupted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STAGES = {  # notebook, parameters, outputs under runs/smoke; in an order in which they can run
    "prior": ("00_prior", {}, ["prior", "prior-check"]),
    "gan": ("00_gan", {}, ["gan", "gan-check"]),
    "trajectories": ("01_trajectories", {}, ["trajectories"]),
    "distill": ("02_distill", {"cell": "mtt-ld3m-1"}, ["main/distilled/mtt-ld3m-1"]),
    "distill_runs": ("02_distill", {"cell": "mtt-glad-1"}, ["report/distilled/mtt-glad-1"]),
    "evaluate": ("03_evaluate", {"cell": "mtt-ld3m-1"}, ["main/scores/mtt-ld3m-1"]),
    "full_data": ("03_evaluate", {"cell": "full_data"}, ["main/scores/full_data"]),
    "gradient_norms": ("04_gradient_norms", {}, ["gradient_norms.json"]),
    "ablation": ("04_ablations", {"ablation": "steps"}, ["ablations/steps.json"]),
}


def attempt(root: Path, stage: str, after: int, number: int) -> None:
    """Runs the notebook of a stage, and sends this process a signal after so many calls."""
    os.environ |= {"DVC_STAGE": stage, "MPLBACKEND": "Agg"}
    paths.ROOT = root
    for name in ("load_params", "ablation_settings"):
        setattr(config, name, partial(getattr(config, name), path=root / "params.yaml"))
    sys.stdout = sys.stderr = (root / "log").open("w")
    notebook, parameters, _ = STAGES[stage]
    file = Path(__file__).parents[1] / "notebooks" / f"{notebook}.ipynb"
    try:
        with signalled(after, number, root / f"calls {stage}"):
            run_notebook(file, parameters)
    except Interrupted:
        os._exit(INTERRUPTED)


def run(server, root: Path, stage: str, *, after: int = NEVER, number: int = signal.SIGKILL) -> int:  # noqa: F811
    for output in STAGES[stage][2]:  # as DVC does before a stage
        place = root / "runs/smoke" / output
        place.unlink() if place.is_file() else shutil.rmtree(place, ignore_errors=True)
    child = server.Process(target=attempt, args=(root, stage, after, number))
    child.start()
    child.join(600)
    return child.exitcode


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):  # noqa: F811
    """What all stages write when nothing happens."""
    root = tmp_path_factory.mktemp("whole")
    config.apply_profiles("smoke", path=root / "params.yaml")
    for stage in STAGES:
        assert run(server, root, stage) == 0, (root / "log").read_text()
    assert content(root / "checkpoints") == {}
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_a_notebook_that_is_killed_goes_on_and_writes_the_same_bytes(server, whole, tmp_path, stage):  # noqa: F811
    root, draw = tmp_path / "killed", random.Random(f"{stage} {KILLS}")
    shutil.copytree(whole, root)
    calls = int((whole / f"calls {stage}").read_text())
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        run(server, root, stage, after=draw.randrange(calls // 4, calls), number=number)
    assert run(server, root, stage) == 0, (root / "log").read_text()
    assert content(root / "runs") == content(whole / "runs")
    assert content(root / "checkpoints") == {}
