"""Workers of this machine: those that are lost, whose tasks are run again a few times, and that none is waited for."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pytest
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ld3m.runtime.checkpoint import Checkpoint, Interrupted
from ld3m.runtime.parallel import ATTEMPTS, end_workers, fan_out
from ld3m.runtime.paths import ROOT


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


def flaky(folder, k):
    """k, but the first worker that every second task is given to is killed."""
    marker = folder / f"lost {k}"
    if k % 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return k


@pytest.mark.slow
def test_losses_of_other_tasks_workers_do_not_add_up(tmp_path):
    tasks = [{"folder": tmp_path, "k": k} for k in range(2 * ATTEMPTS + 1)]
    assert fan_out(flaky, tasks, processes=2, label="tasks") == list(range(2 * ATTEMPTS + 1))
    assert len(list(tmp_path.iterdir())) == ATTEMPTS


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_the_last_result_arrives_ends_the_call(tmp_path, processes):
    arrived = []

    def receive(k, result):
        arrived.append(k)
        if len(arrived) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    given = dict(processes=processes, label="tasks", checkpoint=Checkpoint(tmp_path / "state.safetensors"))
    tasks = [{"folder": tmp_path, "k": 2 * k} for k in range(4)]
    with pytest.raises(Interrupted):
        fan_out(flaky, tasks, receive=receive, **given)
    assert fan_out(flaky, tasks, receive=lambda k, result: arrived.append(k), **given) == [0, 2, 4, 6]
    assert len(arrived) == 4


FANS_OUT = """
from ld3m.runtime.parallel import end_workers, fan_out

fan_out(dict, [{"k": k} for k in range(4)], processes=2, label="tasks")
end_workers()
"""


def test_a_stage_with_workers_is_over_with_its_last_cell(tmp_path):
    """A kernel that is asked to end signals joblib's trackers for half a minute, and they ignore it."""
    cells = [nbformat.v4.new_code_cell(FANS_OUT)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "given.ipynb")
    command = [sys.executable, "-m", "ld3m.pipeline.papermill_engine", "-k", "python3", "given.ipynb", "executed.ipynb"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=True)
    executed = nbformat.read(tmp_path / "executed.ipynb", as_version=4)
    ended = datetime.fromisoformat(executed.cells[-1].metadata.papermill.end_time).replace(tzinfo=UTC)
    assert (datetime.now(UTC) - ended).total_seconds() < 10


def sleeping(folder, k):
    (folder / str(k)).write_text(str(os.getpid()))
    time.sleep(60)


def test_workers_end_with_the_process_that_is_killed_so_that_another_may_go_on(tmp_path):
    code = "import sys; from pathlib import Path; from test_parallel import *; " + (
        "fan_out(sleeping, [dict(folder=Path(sys.argv[1]), k=k) for k in range(2)], processes=2, label='tasks')"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    run = subprocess.Popen([sys.executable, "-c", code, tmp_path], env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: len([file for file in tmp_path.iterdir() if file.read_text()]) == 2, seconds=90)
    workers = [int(file.read_text()) for file in tmp_path.iterdir()]
    run.kill()
    run.wait()
    wait_until(lambda: not any(is_alive(worker) for worker in workers), seconds=10)


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def wait_until(holds, *, seconds):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)
