"""LD3M+: sets that start from chosen images, and tables with several sets a row."""

import pytest
import torch

from ld3m.data.coresets import herding
from ld3m.pipeline import ablations
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import PROFILES, ablation_settings, load_params, read_values, validate

FAST = {"evaluate.recipe.epochs": dict.fromkeys(("convnet", "alexnet", "vgg11", "resnet18", "vit"), 1)}
FAST |= {"processes": 1, "evaluate.recipe_overrides": {}}


@pytest.fixture(scope="module")
def experiment():
    return Experiment(load_params(FAST))


@pytest.mark.parametrize("space", ["pixel", "ld3m"])
def test_a_set_can_start_from_the_images_nearest_to_the_means_of_latents(experiment, space):
    train, prior = experiment.dataset.train, experiment.prior
    expected = []
    for label in range(10):
        members = (train.labels == label).nonzero().squeeze(1)
        with torch.no_grad():
            z = prior.encode(train.x(members)).flatten(1)
        expected.append(members[(z - z.mean(0)).norm(dim=1).argmin()])
    x = train.x(torch.stack(expected))
    started = experiment.synthetic(space, 1, start="herding", prior="prior")
    assert started.labels.tolist() == list(range(10))
    if space == "pixel":
        torch.testing.assert_close(started.learnables["images"], experiment.dataset.normalization.normalize(x))
    else:
        torch.testing.assert_close(started.learnables["z"], prior.encode(x))
        images, labels = experiment.control("iteration0_herding", 1)
        assert torch.equal(images, started.render()) and torch.equal(labels, started.labels)


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


@pytest.mark.parametrize("objective, space, iterations", [("none", "herding", 0), ("dm", "pixel", 1)])
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


@pytest.mark.parametrize("dataset", [[], ["cifar10_cpu"], ["smoke"]], ids=str)
def test_the_profile_fits_every_data_set(dataset, tmp_path):
    from ld3m.pipeline.profiles import apply_profiles

    apply_profiles(*dataset, "plus", path=tmp_path / "params.yaml")
    settings = ablation_settings("plus", path=tmp_path / "params.yaml")
    assert len(settings) == len(read_values(PROFILES / "plus.yaml")["ablations"]["settings"]["plus"])
    assert {params.ablations.runs for params, *_ in settings.values()} == {5}


def test_one_network_of_one_set_has_no_interval():
    with pytest.raises(ValueError, match="ablations.seeds = 1: must be at least 2 with ablations.runs = 1"):
        load_params({"ablations.seeds": 1})
    load_params({"ablations.seeds": 1, "ablations.runs": 2})
    values = read_values(PROFILES / "base.yaml")
    values["spaces"]["pixel"]["start"] = "prior"
    with pytest.raises(ValueError, match=r"spaces.pixel.start: must be 'real', 'herding' or 'noise'"):
        validate(values, origin="params.yaml")
