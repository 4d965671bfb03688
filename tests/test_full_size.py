"""The benchmark at full size, everything tiny."""

import csv

import pytest
import torch

from benchmarks import full_size
from benchmarks.flop import Flop
from benchmarks.full_size import SMOKE, iterate, matching, random_split, start
from ld3m.models.compvis import build


@pytest.fixture
def run(tmp_path):
    """Runs the benchmark and returns the rows of its file."""

    def main(*options):
        given = ["--device", "cpu", "--smoke", "--out", str(tmp_path / "costs.csv"), "--precisions", "float32"]
        full_size.main([*given, *options])
        return list(csv.DictReader((tmp_path / "costs.csv").read_text().splitlines()))

    return main


def test_a_row_for_every_case_is_measured_once(run):
    first = run("--steps", "1", "2", "--objectives", "dm", "mtt")
    assert [(row["objective"], row["steps"]) for row in first] == [(o, s) for s in "12" for o in ("dm", "mtt")]
    assert all(float(row[key]) > 0 for row in first for key in ("ms_per_iteration", "grad_norm_z", "grad_norm_c"))
    assert run("--steps", "1", "2", "--objectives", "dm", "mtt") == first
    added = run("--objectives", "dc", "--render-batch", "1")
    assert added[:-1] == first and (added[-1]["objective"], added[-1]["render_batch"]) == ("dc", "1")


def test_memory_that_runs_out_is_a_row(run, monkeypatch):
    monkeypatch.setattr(full_size, "start", lambda *arguments, **options: torch.empty(2**50))
    assert [row["note"] for row in run("--objectives", "dm", "dc")] == ["out of memory: lower --render-batch"] * 2
    monkeypatch.setattr(full_size, "start", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--objectives", "mtt")


def test_the_arithmetic_is_counted_with_its_backward_pass(tmp_path):
    """It grows by the same amount with every step, and a step is two forward passes and one backward."""
    prior, split, counted = build(SMOKE.kind, seed=0), random_split(SMOKE, 32, torch.device("cpu")), []
    for steps in (1, 2, 3):
        codes = start(split, prior, ipc=1, steps=steps, render_batch=3)
        with Flop() as count:
            iterate(codes, matching("dm", split, SMOKE, tmp_path))
        counted.append(count.total)
    step = counted[2] - counted[1]
    assert step == pytest.approx(counted[1] - counted[0])
    with Flop() as one:
        prior.denoise(torch.zeros(6, 3, 8, 8), 1, prior.null(6))  # guided: three images twice
    assert 2.9 < step / one.total < 3.1
