"""Jobs wait for what they need, several run at once, what fails is named, and time that is up ends the rest."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from ld3m.pipeline import batch
from ld3m.pipeline.batch import Job, jobs, run, run_notebook
from ld3m.pipeline.profiles import ablation_settings, apply_profile, load_params
from ld3m.runtime import paths


def write_after(file: Path, seconds: float = 0.0) -> None:
    print(f"writing {file.name}")
    time.sleep(seconds)
    file.write_text(str(time.time()))


def fail() -> None:
    raise ValueError("no such thing")


def job(folder: Path, name: str, *needs: str, work=write_after, **arguments) -> Job:
    call = partial(work, folder / name, **arguments) if work is write_after else work
    return Job(name, (folder / name,), tuple(folder / need for need in needs), call)


def test_a_job_waits_for_what_it_needs_and_is_not_run_twice(tmp_path, capsys):
    todo = [job(tmp_path, "last", "middle"), job(tmp_path, "middle", "first"), job(tmp_path, "first")]
    assert run(todo, at_once=2, minutes=1, log_folder=tmp_path / "logs") == []
    written = [float((tmp_path / name).read_text()) for name in ("first", "middle", "last")]
    assert written == sorted(written) and "writing first" in (tmp_path / "logs/first.log").read_text()
    assert capsys.readouterr().out.count("done") == 3
    assert run(todo, at_once=2, minutes=1, log_folder=tmp_path / "logs") == []
    assert capsys.readouterr().out == "" and float((tmp_path / "first").read_text()) == written[0]


def test_what_fails_is_named_and_what_needs_it_is_left(tmp_path, capsys):
    todo = [job(tmp_path, "broken", work=fail), job(tmp_path, "after", "broken"), job(tmp_path, "fine")]
    assert run(todo, at_once=3, minutes=1, log_folder=tmp_path / "logs") == ["broken", "after"]
    assert "broken: failed, see" in capsys.readouterr().out and (tmp_path / "fine").exists()
    assert "ValueError: no such thing" in (tmp_path / "logs/broken.log").read_text()


def test_time_that_is_up_ends_what_runs(tmp_path):
    began = time.monotonic()
    todo = [job(tmp_path, "slow", seconds=60), job(tmp_path, "later", "slow")]
    assert run(todo, at_once=2, minutes=4 / 60, log_folder=tmp_path / "logs") == ["slow", "later"]
    assert time.monotonic() - began < 30 and not (tmp_path / "slow").exists()


def ended(folder: Path) -> None:
    todo = [job(folder, "slow", seconds=60), job(folder, "quick")]
    (folder / "left").write_text(" ".join(run(todo, at_once=2, minutes=5, log_folder=folder / "logs")))


def test_a_signal_ends_what_runs(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=ended, args=(tmp_path,))
    process.start()
    while not (tmp_path / "quick").exists():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert (tmp_path / "left").read_text() == "slow" and not (tmp_path / "slow").exists()


def test_a_cell_is_done_when_every_run_is():
    made = {each.name: each for each in jobs(load_params())}
    cell = made["distill-more-dm-glad-1"]
    assert [folder.name for folder in cell.outputs] == ["run-0", "run-1", "run-2"]
    assert made["evaluate-more-dm-glad-1"].needs == cell.outputs


def test_a_notebook_runs_with_its_parameters(tmp_path):
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# not code"]},
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["a = 1\n", "b = 2"]},
        {
            "cell_type": "code",
            "metadata": {},
            "source": [f"open({str(tmp_path / 'out')!r}, 'w').write(f'{{a}} {{b}}')"],
        },
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    run_notebook(tmp_path / "n.ipynb", {"b": 5})
    assert (tmp_path / "out").read_text() == "1 5"


def test_there_is_a_job_for_every_stage_before_the_tables():
    params = load_params()
    names = {each.name for each in jobs(params)}
    assert {"prior", "gan", "trajectories", "gradient-norms", "evaluate-none-full_data-0"} <= names
    for objective in params.grid.objective:
        for space in params.grid.space:
            assert {f"distill-{objective}-{space}-1", f"evaluate-{objective}-{space}-1"} <= names
    for key in params.more.cells:
        assert {f"distill-more-{key}", f"evaluate-more-{key}"} <= names
    for control in params.grid.control:
        assert f"evaluate-none-{control}-1" in names
    assert {f"evaluate-more-none-{key}" for key in params.more.controls} <= names
    assert "distill-dc-glad-1" not in names  # the grid has none
    assert {f"ablation-{name}" for name in params.ablations.settings} <= names


def count_threads(file: Path) -> None:
    file.write_text(str(torch.get_num_threads()))


def test_a_job_has_one_thread_as_its_stage_has_but_the_training_of_a_prior(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    forkserver._forkserver._stop()  # another test's, with the threads of that time
    todo = [Job(name, (tmp_path / name,), (), partial(count_threads, tmp_path / name)) for name in ("prior", "cell")]
    assert run(todo, at_once=2, minutes=1, log_folder=tmp_path / "logs") == []
    assert [(tmp_path / name).read_text() for name in ("prior", "cell")] == ["2", "1"]
    forkserver._forkserver._stop()


def test_ablations_alone_ask_for_a_gan_and_for_experts(tmp_path, monkeypatch):
    file, profile = Path(shutil.copy(paths.PARAMS, tmp_path)), tmp_path / "profile.yaml"
    settings = {"spaces": {"ld3m": {}, "glad": {"space": "glad"}, "mtt": {"objective": "mtt"}}}
    changes = {"ablations": {"settings": settings}, "more": {"cells": {}}, "grid": {"objective": ["dm"]}}
    profile.write_text(json.dumps(changes))
    apply_profile(profile, path=file)
    monkeypatch.setattr(batch, "ablation_settings", partial(ablation_settings, path=file))
    made = {each.name: each for each in jobs(load_params(path=file))}
    assert {"gan", "trajectories"} <= made.keys()
    needed = [{need.name for need in made[f"ablation-spaces-{k}"].needs} for k in range(3)]
    assert needed == [{"prior"}, {"prior", "gan"}, {"prior", "trajectories"}]


@pytest.mark.parametrize("space, needed", [("pixel", set()), ("ld3m", {"prior"}), ("glad", {"gan"})])
def test_a_cell_needs_the_prior_of_its_space_alone(space, needed):
    (made,) = [each for each in jobs(load_params()) if each.name == f"distill-more-dm-{space}-10"]
    assert {need.name for need in made.needs} == needed
