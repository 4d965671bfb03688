"""The recipe on a card reproduces the score on that card."""

import re

import pytest
import torch

from ld3m.method.distill import Distilled
from ld3m.pipeline import profiles as config
from ld3m.pipeline.cells import Cell
from ld3m.pipeline.experiment import Experiment
from ld3m.runtime import paths

# smoke, with epochs enough to tell a trained network from an untrained one
EPOCHS = {"evaluate.recipe.epochs": {"convnet": 30, "vit": 2}, "distill.validation_seeds": 3}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    file = tmp_path_factory.mktemp("smoke") / "params.yaml"
    config.apply_profiles("smoke", path=file)
    return config.load_params(EPOCHS, path=file)


def test_the_recipe_of_the_card_has_ten_lines_and_reproduces_its_score(params, tmp_path, monkeypatch):
    experiment = Experiment(params)
    synthetic = experiment.synthetic("pixel", 1)
    images = synthetic.render().detach()
    accuracies = experiment.validate(images, synthetic.labels)
    validation = [{"iteration": 0, "accuracy": accuracies[0], "accuracies": accuracies}]
    run = Distilled(best={"images": images}, history=[{"step": 0}], validation=validation)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(config, "load_params", lambda: params)
    monkeypatch.chdir(experiment._write(run, synthetic, Cell("smoke", "dm-pixel-1", "main", "dm", "pixel", 1)))
    card = open("card.md").read()
    (recipe,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    lines = [line for line in recipe.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    scope = {}
    exec(recipe, scope)
    (score,) = re.findall(r"convnet reaches ([\d.]+) \(95 % t interval ([-\d.]+) to ([-\d.]+)\)", card)
    mean, low, high = map(float, score)
    again = torch.tensor(scope["scores"]).mean().item()
    assert scope["scores"] == accuracies and 0.6 < mean < 1
    assert low <= again <= high
    assert again == pytest.approx(mean, abs=6e-4)  # the card has three decimals; the seeds are the same
