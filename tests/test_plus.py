"""LD3M+: sets that start from chosen images, and tables with several sets a row."""

import pytest
import torch

from ld3m.data.coresets import herding
from ld3m.pipeline import ablations
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import (
    PROFILES,
    ablation_settings,
    apply_profiles,
    load_params,
    read_values,
    validate,
)

FAST = {"evaluate.recipe.epochs": dict.fromkeys(("convnet", "alexnet", "vgg11", "resnet18", "vit"), 1)}
FAST |= {"processes": 1, "evaluate.recipe_overrides": {}}


@pytest.fixture(scope="module")
def experiment():
    return Experiment(load_params(FAST))


def test_a_set_can_start_from_the_images_nearest_to_the_means_of_latents(experiment):
    train, prior = experiment.dataset.train, experiment.prior
    expected = []
    for label in range(10):
        members = (train.labels == label).nonzero().squeeze(1)
        with torch.no_grad():
            z = prior.encode(train.x(members)).flatten(1)
        expected.append(members[(z - z.mean(0)).norm(dim=1).argmin()])
    x = train.x(torch.stack(expected))
    pixels = experiment.synthetic("pixel", 1, start="herding", prior="prior")
    latents = experiment.synthetic("ld3m", 1, start="herding", prior="prior")
    torch.testing.assert_close(pixels.learnables["images"], experiment.dataset.normalization.normalize(x))
    torch.testing.assert_close(latents.learnables["z"], prior.encode(x))
    assert pixels.labels.tolist() == latents.labels.tolist() == list(range(10))
    images, labels = experiment.control("iteration0_herding", 1)
    assert torch.equal(images, latents.render()) and torch.equal(labels, latents.labels)


def test_a_cell_that_starts_from_chosen_images_depends_on_the_prior(experiment):
    with pytest.raises(ValueError, match="spaces.pixel.start = 'herding' reads the prior: give its cells `prior: pr"):
        experiment.synthetic("pixel", 1, start="herding", prior="data")


def test_several_images_of_a_class_are_those_of_herding(experiment):
    members = experiment.dataset.train.of_class(0)
    with torch.no_grad():
        z = experiment.prior.encode(experiment.dataset.train.x(members)).flatten(1)
        expected = experiment.prior.encode(experiment.dataset.train.x(members[herding(z, 3)]))
    torch.testing.assert_close(experiment.synthetic("ld3m", 3, start="herding").learnables["z"][:3], expected)


def test_rates_of_adam_do_not_depend_on_the_number_of_images():
    budget = {"iterations": 3, "learning_rates": {"z": 0.1, "z_T": 0.2, "c": 0.3}}
    params = load_params({"distill.dm.ld3m": budget | {"optimizer": "adam"}})
    assert params.budget("dm", "ld3m", 10).learning_rates == {"z": 0.1, "c": 0.3}
    assert load_params({"distill.dm.ld3m": budget}).budget("dm", "ld3m", 10).learning_rates == {"z": 1.0, "c": 3.0}


@pytest.mark.parametrize("objective, space, iterations", [("none", "random_real", 0), ("dm", "pixel", 1)])
def test_a_setting_has_a_set_for_every_run_and_pairs_its_networks(objective, space, iterations):
    changes = {"ablations.runs": 2, "ablations.seeds": 2, "ablations.architecture": ["convnet", "vit"]}
    budget = {"distill.dm.pixel": {"iterations": 1, "learning_rates": {"images": 1.0}}}
    params = load_params(FAST | changes | budget | {"architectures": ["convnet", "vit"]})
    record = ablations.measure(params, objective, space, 2)
    alone = []
    for run in (0, 1):
        experiment = Experiment(params, run)
        made, labels, history, _ = ablations._made(experiment, objective, space, 2)
        assert len(history) == iterations and labels.bincount().tolist() == [2] * 10
        job = experiment.evaluation_job(made[0], labels, networks=2)
        alone += experiment.evaluate([job], experiment.dataset.test)
    assert record["accuracy"] == {name: alone[0][name] + alone[1][name] for name in ("convnet", "vit")}
    assert record["images"].shape == (20, 3, 32, 32) and (record["seconds"] > 0) == bool(iterations)


@pytest.mark.parametrize("profiles", [[], ["cifar10_cpu"], ["imagenette128"]], ids=str)
def test_the_profile_fits_every_data_set(profiles, tmp_path):
    apply_profiles(*profiles, path=tmp_path / "params.yaml")
    rows = read_values(PROFILES / "plus.yaml")["ablations"]
    overrides = {f"ablations.{key}": value for key, value in rows.items()}
    settings = ablation_settings("plus", overrides, path=tmp_path / "params.yaml")
    assert list(settings) == list(rows["settings"]["plus"])
    assert {params.ablations.runs for params, *_ in settings.values()} == {5}


def test_one_network_of_one_set_has_no_interval():
    with pytest.raises(ValueError, match="ablations.seeds = 1: must be at least 2 with ablations.runs = 1"):
        load_params({"ablations.seeds": 1})
    load_params({"ablations.seeds": 1, "ablations.runs": 2})
    values = read_values(PROFILES / "base.yaml")
    values["spaces"]["pixel"]["start"] = "prior"
    with pytest.raises(ValueError, match=r"spaces.pixel.start: must be 'real', 'herding' or 'noise'"):
        validate(values, origin="params.yaml")
