"""Worker processes: a lost one is an error, a kill or a signal leaves none alive, and the results so far are kept."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import nbformat
import pytest
from conftest import wait_until
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.memory import OutOfMemory, explain_out_of_memory
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.paths import ROOT


@pytest.fixture(autouse=True)
def workers():
    yield
    end_workers()


def squared(folder, k, lost=None):
    (folder / f"{k}-{len(list(folder.glob(f'{k}-*')))}").touch()
    if k == lost:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
    return k * k


def squares(folder, **given):
    tasks, checkpoint = [{"folder": folder, "k": k} | given for k in range(8)], Checkpoint(folder / "state.pt")
    return fan_out(squared, tasks, processes=2, label="tasks", checkpoint=checkpoint)


def test_a_lost_worker_is_out_of_memory_at_once_and_the_results_before_it_are_kept(tmp_path):
    with pytest.raises(OutOfMemory, match="lower the.batch") as failed, explain_out_of_memory("the.batch"):
        squares(tmp_path, lost=7)
    assert isinstance(failed.value.__cause__, TerminatedWorkerError)
    assert len(list(tmp_path.glob("7-*"))) == 1
    assert squares(tmp_path) == [k * k for k in range(8)]
    assert len(list(tmp_path.glob("0-*"))) == 1


FANS_OUT = """
from ld3m.runtime.parallel import end_workers, fan_out

fan_out(dict, [{"k": k} for k in range(4)], processes=2, label="tasks")
end_workers()
"""


def test_a_stage_with_workers_is_over_with_its_last_cell(tmp_path):
    """A kernel that is asked to end signals joblib's trackers for half a minute, and they ignore it."""
    given, executed = tmp_path / "given.ipynb", tmp_path / "executed.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FANS_OUT)]), given)
    command = [sys.executable, "-m", "ld3m.pipeline.papermill_engine", "-k", "python3", given, executed]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    last = nbformat.read(executed, as_version=4).cells[-1]
    ended = datetime.fromisoformat(last.metadata.papermill.end_time).replace(tzinfo=UTC)
    assert (datetime.now(UTC) - ended).total_seconds() < 10


def count(file, seconds):
    steps = []
    with Checkpoint(file) as checkpoint:
        checkpoint.resume(steps.extend)
        for step in range(len(steps), 200):
            with checkpoint.step(lambda: steps):
                file.with_name(f"{file.name} at work").touch()
                time.sleep(seconds)
                steps.append(step)
    return steps


def counts(folder, *, seconds, **where):
    tasks = [{"file": folder / f"{k}.pt", "seconds": seconds} for k in range(3)]
    return fan_out(count, tasks, label="counts", checkpoint=Checkpoint(folder / "all.pt"), **where)


def at_work(folder):
    return len(list(folder.glob("* at work")))


def require_two_begun(folder):
    """Two tasks of three have kept their steps, and the third has not begun."""
    found = []
    for k in range(2):
        Checkpoint(folder / f"{k}.pt").resume(found.append)
    assert len(found) == at_work(folder) == 2
    assert all(0 < len(steps) < 200 and steps == list(range(len(steps))) for steps in found)


PROGRAM = """
import sys
from multiprocessing import util
from pathlib import Path

from test_parallel import counts

try:
    counts(Path(sys.argv[1]), seconds=0.02, processes=2)
finally:
    util._exit_function()  # as in a child of multiprocessing: waits for workers before they are asked to end
"""


@pytest.mark.parametrize(
    "send, number, begun",  # when so many tasks have begun: 0 = while workers start
    [(os.kill, signal.SIGTERM, 2), (os.killpg, signal.SIGINT, 2), (os.kill, signal.SIGKILL, 0)],
)
def test_a_signal_lets_every_worker_finish_its_step_and_a_kill_leaves_none(tmp_path, send, number, begun):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "DVC_STAGE": "test"}
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: at_work(tmp_path) >= begun and len(group(run.pid)) >= 3)
    send(run.pid, number)
    assert run.wait(20) not in (0, None)
    wait_until(lambda: not group(run.pid), seconds=300)
    if begun:
        require_two_begun(tmp_path)
    assert counts(tmp_path, seconds=0.0, processes=1) == [list(range(200))] * 3


def group(leader):
    """The processes of the group that are alive."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(leader) and "Z" not in line]
