"""Workers of this machine that are lost: their tasks are run again, a few times."""

import os
import signal

import pytest
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ld3m.checkpoint import Checkpoint
from ld3m.parallel import ATTEMPTS, end_workers, fan_out


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
