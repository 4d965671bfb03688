"""The notebooks of every long stage, under the smoke profile, killed at random moments: minutes long. The same with the
loops alone is in test_survive.py."""

import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from executing import run_notebook
from test_survive import KILLS, content, run, server  # noqa: F401

from ld3m.pipeline import profiles as config
from ld3m.runtime import paths

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


def execute(stage, keep, out):
    """Runs the notebook of a stage, with its outputs beside `out`."""
    root, (notebook, parameters, outputs) = out.parent, STAGES[stage]
    for output in outputs:  # as DVC does before a stage
        place = root / "runs/smoke" / output
        place.unlink() if place.is_file() else shutil.rmtree(place, ignore_errors=True)
    os.environ |= {"DVC_STAGE": stage, "MPLBACKEND": "Agg"}
    paths.ROOT = root
    for name in ("load_params", "ablation_settings"):
        setattr(config, name, partial(getattr(config, name), path=root / "params.yaml"))
    run_notebook(Path(__file__).parents[1] / "notebooks" / f"{notebook}.ipynb", parameters)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):  # noqa: F811
    """What all stages write when nothing happens, and how many calls each makes."""
    root, calls = tmp_path_factory.mktemp("whole"), {}
    config.apply_profiles("smoke", path=root / "params.yaml")
    for stage in STAGES:
        assert run(server, partial(execute, stage), root) == 0, (root / "log").read_text()
        calls[stage] = int((root / "calls").read_text())
    assert content(root / "checkpoints") == {}
    return root, calls


@pytest.mark.parametrize("stage", STAGES)
def test_a_notebook_that_is_killed_goes_on_and_writes_the_same_bytes(server, whole, tmp_path, stage):  # noqa: F811
    root, draw, (expected, calls) = tmp_path / "killed", random.Random(f"{stage} {KILLS}"), whole
    shutil.copytree(expected, root)
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        after = draw.randrange(calls[stage] // 4, calls[stage])
        run(server, partial(execute, stage), root, after=after, number=number)
    assert run(server, partial(execute, stage), root) == 0, (root / "log").read_text()
    assert content(root / "runs") == content(expected / "runs")
    assert content(root / "checkpoints") == {}
