"""Workers of this machine: those that are lost, whose tasks are run again a few times, and that none is left."""

import os
import signal
import subprocess
import sys

import pytest
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ld3m.checkpoint import Checkpoint
from ld3m.parallel import ATTEMPTS, end_workers, fan_out
from ld3m.paths import ROOT


@pytest.fixture(autouse=True)
def workers():
    yield
    end_workers()


def squared(folder, k, lost):
    """k², but the first `lost` workers that task 1 is given to are killed."""
    begun = folder / f"{k}-{len(list(folder.glob(f'{k}-*')))}"
    begun.touch()
    if k == 1 and int(begun.name.split("-")[1]) < lost:
        os.kill(os.getpid(), signal.SIGKILL)
    return k * k


def results(folder, *, lost, **given):
    tasks = [{"folder": folder, "k": k, "lost": lost} for k in range(6)]
    return fan_out(squared, tasks, processes=2, label="tasks", **given)


def test_the_task_of_a_killed_worker_is_run_again(tmp_path):
    assert results(tmp_path, lost=ATTEMPTS - 1) == [k * k for k in range(6)]
    assert len(list(tmp_path.glob("1-*"))) == ATTEMPTS


def test_a_task_that_kills_every_worker_is_an_error_which_keeps_what_is_done(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state.safetensors")
    with pytest.raises(TerminatedWorkerError):
        results(tmp_path, lost=ATTEMPTS, checkpoint=checkpoint)
    assert len(list(tmp_path.glob("1-*"))) == ATTEMPTS
    assert results(tmp_path, lost=ATTEMPTS, checkpoint=checkpoint) == [k * k for k in range(6)]


LEFT_AT_EXIT = """
import atexit
from pathlib import Path

children = lambda: " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children"))
atexit.register(lambda: print("left:", children()))  # after all that is registered later

from ld3m.parallel import end_workers, fan_out

for _ in range(2):
    fan_out(dict, [{"k": k} for k in range(4)], processes=2, label="tasks")
end_workers()
"""


def test_no_process_is_left_at_exit_that_would_hold_a_kernel_s_output_open():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LEFT_AT_EXIT]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert run.stdout.splitlines()[-1].strip() == "left:"
