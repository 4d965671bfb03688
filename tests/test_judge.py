"""The notebook `judge`, runs and the recipe on a card give the same images the same scores."""

import json
import re
from dataclasses import replace

import nbformat
import pytest
import torch

from ld3m.evaluation.artefact import write_images
from ld3m.method.distill import Distilled
from ld3m.pipeline import profiles as config
from ld3m.pipeline import runs
from ld3m.pipeline.cells import Cell, cell_of
from ld3m.pipeline.experiment import Experiment
from ld3m.runtime import paths

NOTEBOOK = nbformat.read(paths.ROOT / "notebooks/judge.ipynb", as_version=nbformat.NO_CONVERT)


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    """Gives the experiment of the smoke profile, which writes under `tmp_path`; notebooks and cards load it too."""
    file = tmp_path / "params.yaml"
    config.apply_profiles("smoke", path=file)
    monkeypatch.setattr(paths, "ROOT", tmp_path)

    def make(**overrides):
        params = config.load_params(overrides, path=file)
        monkeypatch.setattr(config, "load_params", lambda overrides=None: params)
        return Experiment(params)

    return make


@pytest.fixture
def experiment(smoke):
    return smoke()


def run(**parameters):
    """The values of all names after the cells, run as papermill does it: parameters after their cell."""
    scope = {}
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code":
            exec(cell.source, scope)
            scope |= parameters if "tags" in cell.metadata else {}
    return scope


def control_file(root):
    return root / "runs/smoke/main/scores/random_real-1/scores.json"


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
    record, control = (json.loads(file.read_text()) for file in (folder / "scores.json", control_file(tmp_path)))
    assert record == control | {"cell": "theirs"}


def test_scores_that_are_missing_or_of_other_parameters_are_not_laid_beside(experiment, tmp_path, capsys):
    labels = torch.tensor([0, 1])
    assert runs.comparable(experiment, labels) == {}
    said = capsys.readouterr().out
    for name in ("random_real-1", "full_data"):
        assert f"{name}/scores.json is missing: evaluate {name} first (`dvc repro control@{name}`)\n" in said
    scores = score(experiment, "random_real-1")
    assert runs.comparable(experiment, labels) == {"random_real": scores[0]}
    assert "random_real" not in runs.comparable(experiment, torch.tensor([0, 0, 1]))  # as many a class, or nothing
    file = control_file(tmp_path)
    record = json.loads(file.read_text())
    record["networks"]["vit"]["recipe"]["training"]["epochs"] += 1
    file.write_text(json.dumps(record))
    assert runs.comparable(experiment, labels) == {}
    assert "with other parameters or data: evaluate it again (`dvc repro control@ran" in capsys.readouterr().out


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_labels_that_are_probably_wrong_are_reported(smoke, monkeypatch, capsys, is_exchanged):
    experiment = smoke(**{"evaluate.recipe.epochs": {"convnet": 30, "vit": 1}})
    found = {0: {"convnet": [0.02, 0.0] if is_exchanged else [0.4, 0.9], "vit": [0.4, 0.6]}}
    monkeypatch.setattr(runs, "_evaluate", lambda *work, **given: found)
    images, labels = experiment.control("random_real", 1)
    assert runs.evaluate_foreign(experiment, images, 1 - labels if is_exchanged else labels, "theirs") == found[0]
    a, b = experiment.dataset.train.classes
    said = f"""convnet reaches 1.0%, far below chance, 50.0%: the set's classes may be in another order
the set's labels are probably exchanged: a network trained on it sees {a} as {b}, {b} as {a}
"""
    assert capsys.readouterr().out == (said if is_exchanged else "")


def test_runs_start_from_other_images_and_one_run_scores_the_same_beside_others(experiment):
    first, second = (replace(experiment, run=run).initial(1)[0] for run in (0, 1))
    assert not torch.equal(first, second)
    cell = cell_of(experiment.params, "random_real-1")
    together = runs.evaluate_runs(experiment, replace(cell, runs=(0, 1)))
    assert together[1] == runs.evaluate_runs(experiment, replace(cell, runs=(1,)))[1]
    for k, count in ((0, 2), (1, 1)):
        assert {name: len(scores) for name, scores in together[k].items()} == {"convnet": count, "vit": count}


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


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "x" * 101])
def test_a_name_that_is_no_name_is_refused_before_anything_is_judged(experiment, tmp_path, name):
    with pytest.raises(ValueError, match="a set is named by letters"):
        run(path=str(tmp_path), name=name)
    assert not (tmp_path / "runs").exists()


def test_the_recipe_of_the_card_has_ten_lines_and_reproduces_its_score(smoke, monkeypatch):
    epochs = {"convnet": 30, "vit": 2}  # enough to know a trained network from an untrained one
    experiment = smoke(**{"evaluate.recipe.epochs": epochs, "distill.validation_seeds": 3})
    synthetic = experiment.synthetic("pixel", 1)
    images = synthetic.render().detach()
    accuracies = experiment.validate(images, synthetic.labels)
    validation = [{"iteration": 0, "accuracy": accuracies[0], "accuracies": accuracies}]
    distilled = Distilled(best={"images": images}, history=[{"step": 0}], validation=validation)
    monkeypatch.chdir(experiment._write(distilled, synthetic, Cell("smoke", "dm-pixel-1", "main", "dm", "pixel", 1)))
    card = open("card.md").read()
    (recipe,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    lines = [line for line in recipe.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    scope = {}
    exec(recipe, scope)
    assert scope["scores"] == accuracies
    (mean,) = re.findall(r"convnet reaches ([\d.]+) \(95 % t interval", card)
    assert sum(accuracies) / 3 == pytest.approx(float(mean), abs=6e-4) and 0.6 < float(mean) < 1
