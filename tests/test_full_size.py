"""The benchmark at full size, everything tiny: what it measures, goes on from, and survives."""

import csv
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import full_size
from benchmarks.full_size import SMOKE, Case, Machine, measure, prepare, random_split
from ld3m.models.compvis import build

CPU = torch.device("cpu")
CASES = [Case(32, 2, 1, "dm", "bf16", "eager"), Case(32, 2, 1, "dc", "fp32", "eager")]


def rows(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the benchmark on two cases and returns its rows."""
    monkeypatch.setattr(full_size, "cases", lambda scale, device: CASES)

    def main(*options):
        full_size.main(["--device", "cpu", "--smoke", "--out", str(tmp_path / "cost.csv"), *options])
        return rows(tmp_path / "cost.csv") if (tmp_path / "cost.csv").exists() else []

    return main


def test_rows_are_measured_once(run, capsys):
    first = run("--minutes", "5")
    assert [(row["objective"], row["precision"], row["render_batch"]) for row in first] == [
        ("dm", "bf16", "3"),
        ("dc", "fp32", "3"),
    ]
    for row in first:
        assert float(row["ms_per_iteration"]) > 0 and float(row["tflop"]) > 0 and not row["note"]
        hours = float(row["ms_per_iteration"]) / 360
        assert float(row["hours_for_10000_iterations"]) == pytest.approx(hours, rel=1e-2)
    assert capsys.readouterr().out.count("roofline:") == 2
    assert run("--minutes", "5") == first


def test_what_is_replayed_has_the_arithmetic_of_the_eager_row(run, monkeypatch):
    monkeypatch.setattr(full_size, "cases", lambda *scale: [CASES[0], replace(CASES[0], launch="replayed"), CASES[1]])
    found = run("--minutes", "5")
    assert [row["launch"] for row in found] == ["eager", "replayed", "eager"]
    assert found[1]["tflop"] == found[0]["tflop"] != found[2]["tflop"] and float(found[1]["tflop_per_s"]) > 0


def test_memory_that_runs_out_is_a_row(run, monkeypatch):
    def starved(case, *arguments, render_batch, **options):
        if render_batch > 1 or case.precision == "fp32":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return {"ms_per_iteration": 1.0, "tflop": 1.0, "tflop_per_s": 1000.0, "note": ""}

    monkeypatch.setattr(full_size, "measure", starved)
    expected = [("bf16", "3", ""), ("bf16", "1", "1"), ("fp32", "3", ""), ("fp32", "1", "")]
    for _ in range(2):  # what does not fit is not tried again
        found = run("--minutes", "5")
        assert [(row["precision"], row["render_batch"], row["ms_per_iteration"]) for row in found] == expected
        assert [row["note"] for row in found] == ["out of memory", "", "out of memory", "out of memory"]


def test_another_error_is_a_row(run, monkeypatch):
    monkeypatch.setattr(full_size, "start", lambda *arguments, **options: 1 / 0)
    assert ["ZeroDivisionError" in row["note"] for row in run("--minutes", "5")] == [True, True]


def test_it_ends_in_time(run, monkeypatch, capsys):
    def endless(*arguments, **options):
        while True:
            pass

    monkeypatch.setattr(full_size, "measure", endless)
    assert run("--minutes", "0.1") == []
    assert "the time is up; call again" in capsys.readouterr().out


def test_the_arithmetic_is_counted_with_its_backward_pass():
    """It grows by the same amount with every step, and a step is two forward passes and one backward."""
    prior = build(SMOKE.kind, seed=0)
    split = random_split(SMOKE, 32, CPU)
    options = dict(render_batch=3, deadline=0.0)  # no time: the first iteration alone
    counted = [
        measure(Case(32, steps, 1, "dm", "fp32", "eager"), split, prior, SMOKE, Machine(CPU), **options)["tflop"]
        for steps in (1, 2, 3)
    ]
    step = counted[2] - counted[1]
    assert step == pytest.approx(counted[1] - counted[0])
    with full_size.Flop() as one:
        prior.denoise(torch.zeros(6, 3, 8, 8), 1, prior.null(6))  # guided: three images twice
    assert 2.9 < step / (one.total / 1e12) < 3.1


def test_bf16_is_near_fp32_and_gives_fp32():
    prior = build(SMOKE.kind, seed=0)
    half = prepare(prior, precision="bf16", device=CPU)
    draw = torch.Generator().manual_seed(0)
    z, pixels = torch.randn(2, 3, 8, 8, generator=draw), torch.randn(2, 3, 32, 32, generator=draw)
    c = prior.embed(torch.tensor([0, 1]))
    assert torch.equal(half.encode(pixels), prior.encode(pixels))
    for given, exact in ((half.denoise(z, 5, c), prior.denoise(z, 5, c)), (half.decode(z), prior.decode(z))):
        assert given.dtype == torch.float32
        assert 0 < (given - exact).norm() / exact.norm() < 0.05


def test_the_cases_are_ordered():
    found = {device: full_size.cases(full_size.PAPER, torch.device(device)) for device in ("cuda", "cpu")}
    assert all(cases[0] == Case(128, 20, 1, "dm", "bf16", "eager") for cases in found.values())
    assert all(len(cases) == len(set(cases)) and {case.ipc for case in cases[:17]} == {1} for cases in found.values())
    launches = {device: Counter(case.launch for case in cases) for device, cases in found.items()}
    assert launches == {"cuda": {"replayed": 32, "eager": 8}, "cpu": {"eager": 32}}


def test_the_proof(tmp_path):
    full_size.main(["--device", "cpu", "--smoke", "--proof", "--out", str(tmp_path / "proof.csv"), "--classes", "2"])
    found = rows(tmp_path / "proof.csv")
    assert [(row["objective"], row["steps"]) for row in found] == [
        ("dm", "5"),
        ("dc", "5"),
        ("mtt", "5"),
        ("mtt", "20"),
    ]
    assert all(row["finite_and_non_zero"] == "True" and row["classes"] == "2" for row in found)
