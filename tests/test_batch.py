"""The stages of dvc.yaml, several at a time: the result of `dvc repro`, failures, time limit and signals."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
from conftest import wait_until
from ruamel.yaml import YAML

from ld3m.pipeline import batch
from ld3m.runtime import paths

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")

# b and c wait for one another, which works only if they run at the same time
PIPELINE = """
stages:
  a: {cmd: echo a >> ran && echo 1 > a, outs: [a]}
  b: {cmd: "echo b >> ran && touch b.runs && until test -f c.runs; do sleep 0.1; done && cp a b", deps: [a], outs: [b]}
  c: {cmd: "echo c >> ran && touch c.runs && until test -f b.runs; do sleep 0.1; done && cp a c", deps: [a], outs: [c]}
  last:
    matrix: {word: [x, y]}
    cmd: echo last >> ran && cat b c word > last-${item.word}
    deps: [b, c, word]
    outs: ["last-${item.word}"]
  alone: {cmd: echo alone >> ran && echo 2 > alone, outs: [alone]}
"""


def dvc(*arguments):
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    def start(pipeline):
        (tmp_path / "dvc.yaml").write_text(pipeline)
        (tmp_path / "word").write_text("word\n")
        subprocess.run(["git", "init", "-q"], check=True)
        dvc("init", "-q")
        return tmp_path

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return start


def test_the_result_is_that_of_dvc_repro_and_only_what_changed_runs_again(repository):
    folder = repository(PIPELINE)
    with pytest.raises(SystemExit, match="nowhere"):
        batch.main(["nowhere"])
    batch.main(["--jobs", "3"])
    assert sorted((folder / "ran").read_text().split()) == ["a", "alone", "b", "c", "last", "last"]
    dvc("repro")  # has nothing to do
    assert dvc("status").stdout.decode().startswith("Data and pipelines are up to date")
    assert len((folder / "ran").read_text().split()) == 6
    lock = YAML(typ="safe").load((folder / "dvc.lock").read_text())
    (folder / "dvc.lock").unlink()
    dvc("repro", "--force", "a", "alone", "--downstream", "--no-run-cache")
    assert YAML(typ="safe").load((folder / "dvc.lock").read_text()) == lock
    (folder / "ran").unlink()
    (folder / "word").write_text("other\n")
    batch.main(["last@x"])
    assert (folder / "ran").read_text() == "last\n" and (folder / "last-x").read_text() == "1\n1\nother\n"


def test_after_a_failure_the_others_finish_and_those_that_need_it_do_not_run(repository, capsys):
    folder = repository(PIPELINE.replace("cp a b", "echo no such thing && false"))
    with pytest.raises(SystemExit) as end:
        batch.main(["--jobs", "2"])
    printed = capsys.readouterr()
    log = folder / "runs/logs/b.log"
    assert end.value.code == 1 and f"b: failed, see {log}\n" in printed.out and "no such thing" in log.read_text()
    assert printed.err == "not done: b, last@x, last@y\n"
    assert (folder / "c").exists() and (folder / "alone").exists() and "last" not in (folder / "ran").read_text()


SLOW = """
stages:
  slow: {cmd: "python -c 'open(\\"begun\\", \\"w\\"); import time; time.sleep(60)'", outs: [never]}
"""


@pytest.mark.parametrize("arguments", [["--minutes", "0.4"], []])
def test_time_that_is_up_and_a_signal_stop_what_runs(repository, arguments):
    folder = repository(SLOW)
    code = f"from ld3m.pipeline import batch; batch.paths.ROOT = batch.Path({str(folder)!r}); batch.main({arguments})"
    in_background = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # as a shell starts it with &
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, preexec_fn=in_background
    )
    wait_until((folder / "begun").exists, seconds=300)
    if not arguments:
        process.terminate()
    assert process.communicate(timeout=300)[1] == "not done: slow\n" and process.returncode == 1
    assert "KeyboardInterrupt" in (folder / "runs/logs/slow.log").read_text()


def test_the_stages_of_this_repository_come_from_dvc_yaml(monkeypatch):
    monkeypatch.chdir(paths.ROOT)
    found = batch.stages(["tables"])
    assert found["evaluate@dm-ld3m-1"] == {"data", "distill@dm-ld3m-1"} and "report" not in found
    assert {"prior", "trajectories", "gradient_norms"} < found.keys() < batch.stages([]).keys()


SAVES = """
import time
open("begun", "w")
try:
    print("a line", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(8)
    open("saved", "w")
    raise
"""


def test_an_interrupted_notebook_has_time_to_write_its_checkpoint(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SAVES)])
    nbformat.write(notebook, tmp_path / "given.ipynb")
    command = [sys.executable, "-m", "ld3m.pipeline.papermill_engine", "-k", "python3", "--log-output", "given.ipynb"]
    environment = os.environ | {"PYTHONPATH": str(Path(paths.__file__).parents[2])}
    pipes = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "executed.ipynb"], **pipes)
    wait_until((tmp_path / "begun").exists, seconds=300)
    process.terminate()
    assert "a line" in process.communicate(timeout=300)[1] and process.returncode
    assert (tmp_path / "saved").exists()
