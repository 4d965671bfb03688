"""What is kept comes back; a signal waits for the step; one process a run; bad disks and broken files lose nothing."""

import hashlib
import importlib
import io
import math
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch

from ld3m.runtime.checkpoint import Checkpoint, Interrupted

STATE = {
    "network": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.tensor([0.5, 3.0], dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, "0": {"step": torch.tensor(4.0)}}, "betas": (0.9, 0.99)},
    "empty": torch.zeros(0, 2, dtype=torch.int64),
    "history": [{"loss": 0.1 + 0.2, "norm": math.inf, "name": "ä"}, None, True, [], {}],
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "checkpoints" / "run.safetensors"


@pytest.fixture
def made(file):
    """A checkpoint whose states were written, one after the other."""

    def make(*states, **changes):
        with Checkpoint(file, minutes=0, **changes) as checkpoint:
            for state in states:
                with checkpoint.step(lambda state=state: state):
                    pass
        return checkpoint

    return make


def read(checkpoint):
    states = []
    checkpoint.resume(states.append)
    return states[0] if states else None


def test_a_state_comes_back_as_it_was(made):
    state = read(made(STATE))
    assert state["history"] == STATE["history"] and state["optimizer"].pop("betas") == [0.9, 0.99]
    assert list(state["optimizer"]["state"]) == [0, "0"]  # JSON alone would make them one
    for path in (("network", "weight"), ("network", "half"), ("empty",)):
        one, other = STATE, state
        for key in path:
            one, other = one[key], other[key]
        assert other.dtype == one.dtype and torch.equal(one, other)
    assert [state["optimizer"]["state"][key]["step"].item() for key in (0, "0")] == [3, 4]


def test_there_is_nothing_before_the_first_step_and_after_removal(made, file):
    assert read(Checkpoint(file)) is None and read(Checkpoint()) is None
    checkpoint = made(STATE, STATE)
    checkpoint.folder.mkdir()
    (checkpoint.folder / "large").touch()
    checkpoint.remove()
    assert not list(file.parent.iterdir())
    checkpoint.remove()


def test_a_changed_byte_is_found_and_a_pickle_with_the_right_hash_is_not_executed(made, file, tmp_path):
    checkpoint, buffer = made({"a": torch.ones(50)}), io.BytesIO()
    whole = file.read_bytes()
    torch.save({"state": Touch(tmp_path / "executed")}, buffer)
    hostile = buffer.getvalue()
    for content in (whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], hashlib.sha256(hostile).digest() + hostile):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="run.safetensors is broken or not written by ld3m: to start over delete"):
            read(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(file):
    file.parent.write_text("no folder")
    with pytest.raises(OSError, match="run.lock could not be written"), Checkpoint(file):
        pytest.fail("started")


class Touch:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_without_file_locks_the_error_says_what_to_use(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    for name in [name for name in sys.modules if name.startswith("ld3m.runtime.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("checkpoint", "memory", "parallel", "progress", "storage"):
        importlib.import_module(f"ld3m.runtime.{name}")
    checkpoint = sys.modules["ld3m.runtime.checkpoint"]
    with checkpoint.Checkpoint(), pytest.raises(OSError, match="use Linux or macOS, on Windows WSL"):
        with checkpoint.Checkpoint(file):
            pytest.fail("started")


def test_values_that_do_not_fit_are_an_error_with_a_message(made, file):
    made([1])
    with pytest.raises(
        ValueError, match=r"run.safetensors does not hold the state of this run \(KeyError.*delete .*run"
    ):
        Checkpoint(file).resume(lambda state: {}["weight"])


def test_a_step_is_finished_written_and_the_run_ended(file):
    steps = []
    with pytest.raises(
        Interrupted, match="ended by a signal. Last written: .*run.safetensors; the same command goes on"
    ):
        with Checkpoint(file) as checkpoint:
            for step in range(5):
                with checkpoint.step(lambda: steps):
                    if step == 2:
                        signal.raise_signal(signal.SIGTERM)
                        signal.raise_signal(signal.SIGTERM)
                        assert not file.exists()
                    steps.append(step)
    assert steps == read(checkpoint) == [0, 1, 2]


def test_a_second_ctrl_c_does_not_wait_for_the_step(file):
    kept = []
    with pytest.raises(Interrupted, match="Last written: nothing"):
        with Checkpoint(file) as checkpoint:
            with checkpoint.step(lambda: kept):
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # as a kernel is ended, by SLURM too
                    signal.raise_signal(number)
                kept.append(0)
                signal.raise_signal(signal.SIGINT)
                pytest.fail("not ended")
    assert kept == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_between_steps_a_run_ends_at_once_with_its_last_whole_step(file, number):
    with pytest.raises(Interrupted):
        with Checkpoint(file) as checkpoint:
            with checkpoint.step(lambda: [0]):
                pass
            signal.raise_signal(number)
            pytest.fail("not ended")
    assert read(checkpoint) == [0]


def test_a_signal_at_any_call_of_a_block_ends_it_with_what_is_done(file):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def block(after):
        """What was done when the signal came at so many calls, or None where there are fewer."""
        calls, done = 0, []

        def count(frame, event, argument):
            nonlocal calls
            calls += getattr(signal.getsignal(signal.SIGTERM), "__func__", None) is Checkpoint._on_signal
            if calls == after:
                calls += 1
                os.kill(os.getpid(), signal.SIGTERM)

        sys.setprofile(count)
        try:
            with Checkpoint(file, minutes=0) as checkpoint:
                for step in range(2):
                    with checkpoint.step(lambda: done):
                        done.append(step)
        except Interrupted:
            return done
        finally:
            sys.setprofile(None)
        assert calls < after, "the signal was not heard"
        return None

    after, found = 0, []
    while (done := block(after := after + 1)) is not None:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        assert not file.with_suffix(".lock").exists()
        assert (read(Checkpoint(file)) if file.exists() else []) == done
        Checkpoint(file).remove()
        found.append(len(done))
    assert set(found) == {0, 1, 2} and len(found) > 50


def test_an_error_in_a_step_leaves_the_state_before_it(file):
    with pytest.raises(ZeroDivisionError):
        with Checkpoint(file, minutes=0) as checkpoint:
            for step in range(3):
                with checkpoint.step(lambda step=step: [step]):
                    1 / (1 - step)
    assert read(checkpoint) == [0]


def test_signals_do_what_they_did_before_and_without_a_file_what_they_always_do(file):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Checkpoint(file):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
        with Checkpoint(file.with_name("inner.safetensors")):
            pass
    with Checkpoint() as checkpoint, checkpoint.step(dict):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_keeps_its_state_too(made):
    thread = threading.Thread(target=made, args=([1],))
    thread.start()
    thread.join()
    assert read(made()) == [1]


def test_a_second_run_is_refused_and_changes_nothing(made, file):
    made([1])
    with Checkpoint(file) as checkpoint:
        with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} already runs on .*run.safetensors"):
            made([2])
        with Checkpoint(file.with_name("other.safetensors")):
            pass
    assert read(checkpoint) == [1]
    made([2])
    assert [path.name for path in file.parent.iterdir()] == ["run.safetensors"]


def hold(file, ready):
    with Checkpoint(file):
        ready.set()
        time.sleep(60)


def test_a_killed_run_leaves_no_lock(made, file):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    child = context.Process(target=hold, args=(file, ready))
    child.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match=f"process {child.pid} already runs"):
        made([1])
    child.kill()
    child.join()
    made([1])
