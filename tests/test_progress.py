"""What the log of a stage says of the time that is left, and the memory of the process."""

import mmap
import re

import numpy as np
import pytest

from ld3m.runtime import progress as module
from ld3m.runtime.memory import forget_peak, peak_gib
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
    for step in progress(start + 10, label="distil", start=start, status=lambda: "loss 1"):
        clock[0] += 100.0 if step == start else 2.0
    log = capsys.readouterr().out
    assert f"distil {start + 10}/{start + 10} loss 1 (2.000 s each, 0 s left)" in log
    assert f"distil {start + 8}/{start + 10} loss 1 (2.000 s each, 4 s left)" in log
    assert set(re.findall(r"([\d.]+) s each", log)) == {"2.000"}


def test_every_step_comes_once_and_a_few_steps_say_nothing_of_time(clock, capsys):
    assert list(progress(3, label="experts")) == [0, 1, 2]
    assert capsys.readouterr().out.splitlines() == [f"experts {k}/3" for k in (1, 2, 3)]


def test_nothing_is_said_where_it_is_to_be_silent(clock, capsys):
    with silent():
        assert list(progress(3, label="experts", start=1)) == [1, 2]
    assert capsys.readouterr().out == ""
    assert list(progress(1, label="experts")) == [0] and capsys.readouterr().out


def test_the_peak_is_that_since_it_was_forgotten():
    if not forget_peak():
        pytest.skip("the system cannot")
    before = peak_gib()
    with mmap.mmap(-1, 2**28) as pages:  # 0.25 GiB, gone at once: the allocator, which may keep it, is not asked
        np.frombuffer(pages, np.uint8).sum()
    assert 0.2 < peak_gib() - before < 0.4
    assert forget_peak() and peak_gib() - before < 0.1
