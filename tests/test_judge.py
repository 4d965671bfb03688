"""The notebook `judge` gives a set the scores that the pipeline gives the same images."""

import json
from dataclasses import replace

import nbformat
import pytest
import torch

from ld3m.evaluation.artefact import write_images
from ld3m.pipeline import profiles as config
from ld3m.pipeline import runs
from ld3m.pipeline.cells import Cell, cell_of
from ld3m.pipeline.experiment import Experiment
from ld3m.runtime import paths
from ld3m.runtime.paths import ROOT

NOTEBOOK = nbformat.read(ROOT / "notebooks/judge.ipynb", as_version=nbformat.NO_CONVERT)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """That of the smoke profile, which writes under `tmp_path`."""
    file = tmp_path / "params.yaml"
    config.apply_profiles("smoke", path=file)
    params = config.load_params(path=file)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(config, "load_params", lambda overrides: params)
    return Experiment(params)


def run(**parameters):
    """The values of all names after the cells, run as papermill does it: parameters after their cell."""
    scope = {}
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code":
            exec(cell.source, scope)
            scope |= parameters if "tags" in cell.metadata else {}
    return scope


def control_folder(root):
    return root / "runs/smoke/main/scores/random_real-1"


def score(experiment, key):
    return runs.evaluate_runs(experiment, cell_of(experiment.params, key))


def test_real_images_from_a_folder_score_as_the_control_does(experiment, tmp_path):
    score(experiment, "random_real-1")
    score(experiment, "full_data")
    pixels, labels = experiment.initial(1)
    write_images(tmp_path / "set", pixels, labels, experiment.dataset.train.classes)
    scope = run(path=str(tmp_path / "set"), name="theirs")
    beside = runs.comparable(scope["evaluation"], scope["labels"])
    assert beside["random_real"] == scope["accuracies"] and set(beside) == {"random_real", "full_data"}
    table = scope["metrics"].compare(scope["accuracies"], **beside)
    assert list(table.architecture) == ["convnet", "vit", "mean"] and (table.IOR == 0).all() and table.LRS.notna().all()
    folder = tmp_path / "runs" / "smoke" / "evaluated" / "theirs"
    assert {file.name for file in folder.iterdir()} == {"scores.json", "images.safetensors"}
    record, control = (json.loads((place / "scores.json").read_text()) for place in (folder, control_folder(tmp_path)))
    assert record == control | {"cell": "theirs"}


def test_scores_that_are_missing_or_of_other_parameters_are_not_laid_beside(experiment, tmp_path, capsys):
    labels = torch.tensor([0, 1])
    assert runs.comparable(experiment, labels) == {}
    said = capsys.readouterr().out
    assert all(f"{name}/scores.json is missing" in said for name in ("random_real-1", "full_data"))
    scores = score(experiment, "random_real-1")
    assert runs.comparable(experiment, labels) == {"random_real": scores[0]}
    assert "random_real" not in runs.comparable(experiment, torch.tensor([0, 0, 1]))  # as many a class, or nothing
    file = control_folder(tmp_path) / "scores.json"
    record = json.loads(file.read_text())
    record["networks"]["vit"]["recipe"]["training"]["epochs"] += 1
    file.write_text(json.dumps(record))
    assert runs.comparable(experiment, labels) == {}
    assert "was evaluated with other parameters or data" in capsys.readouterr().out


def test_runs_start_from_other_images_and_one_run_scores_the_same_beside_others(experiment):
    first, second = (replace(experiment, run=run).initial(1)[0] for run in (0, 1))
    assert not torch.equal(first, second)
    cell = cell_of(experiment.params, "random_real-1")
    together = runs.evaluate_runs(experiment, replace(cell, runs=(0, 1)))
    alone = runs.evaluate_runs(experiment, replace(cell, runs=(1,)))
    assert together[1] == alone[1]
    assert {name: len(scores) for name, scores in together[0].items()} == {"convnet": 2, "vit": 2}
    assert {name: len(scores) for name, scores in alone[1].items()} == {"convnet": 1, "vit": 1}


def test_several_runs_are_distilled_side_by_side_as_each_alone(experiment, tmp_path, monkeypatch):
    fan_out = runs.fan_out  # in this process: another would write into the repository's own folders
    monkeypatch.setattr(runs, "fan_out", lambda *work, **given: fan_out(*work, **given | {"processes": 1}))
    params = experiment.params.model_copy(update={"processes": 2})
    cell = Cell("smoke", "dm-pixel-1", "report", "dm", "pixel", 1, runs=(1, 2))
    folders = runs.distill_runs(replace(experiment, params=params), cell)
    assert [folder.name for folder in folders] == ["run-1", "run-2"] and "report" in folders[0].parts
    assert all(folder.is_relative_to(tmp_path) for folder in folders)
    together = [(folder / "distilled.safetensors").read_bytes() for folder in folders]
    alone = runs.distill_runs(experiment, replace(cell, runs=(2,)))[0]
    assert (alone / "distilled.safetensors").read_bytes() == together[1] != together[0]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101])
def test_a_name_that_is_no_name_is_refused_before_anything_is_judged(experiment, tmp_path, name):
    with pytest.raises(ValueError, match="a set is named by letters"):
        run(path=str(tmp_path), name=name)
    assert not (tmp_path / "runs").exists()


def test_a_set_that_does_not_fit_leaves_nothing(experiment, tmp_path):
    write_images(tmp_path / "set", torch.zeros(3, 3, 32, 32), torch.arange(3), ("0", "1", "2"))
    with pytest.raises(ValueError, match="and no other"):
        run(path=str(tmp_path / "set"))
    assert not (tmp_path / "runs").exists()
