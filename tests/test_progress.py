"""What the log of a stage says of the time that is left."""

import pytest

from ld3m.runtime import progress as module
from ld3m.runtime.progress import progress, silent


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it, under DVC."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setenv("DVC_STAGE", "distill")
    return now


@pytest.mark.parametrize("start", [0, 3])
def test_the_time_of_an_iteration_leaves_out_what_the_first_does_besides(clock, capsys, start):
    steps = []
    for step in progress(start + 10, label="distill", start=start, status=lambda: f"loss {steps[-1]}"):
        clock[0] += 100.0 if step == start else 2.0
        steps.append(step)
    assert steps == list(range(start, start + 10))
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"distill {start + 1}/{start + 10} loss {start} (0.000 s each, 0 s left)"
    assert others[-3] == f"distill {start + 8}/{start + 10} loss {start + 7} (2.000 s each, 4 s left)"
    assert all("(2.000 s each, " in line for line in others)


def test_nothing_is_said_inside_silent(clock, capsys):
    with silent():
        assert list(progress(3, label="experts", start=1)) == [1, 2]
    assert capsys.readouterr().out == ""
    assert list(progress(1, label="experts")) == [0] and capsys.readouterr().out
