"""Bad input is one clear error before any long work, and says what to change."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ld3m.pipeline import check as check_module
from ld3m.pipeline.cells import runs_path
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime import paths


def check(overrides):
    return list(check_module.check(load_params(overrides)))


def test_the_committed_profile_is_in_order():
    lines = check({})
    assert [line.split()[0] for line in lines] == ["data", "nets", "prior", "gan", "disk"]
    assert "3500 + 500 + 1000 images of 10 classes" in lines[0] and "trained on 10 classes" in lines[2]


def test_images_that_two_splits_share_are_counted(tmp_path):
    for split, source in {"train": "train", "validation": "validation", "test": "validation"}.items():
        shutil.copy(paths.ROOT / f"data/mnist5k/{source}.parquet", tmp_path / f"{split}.parquet")
    lines = check({"datasets.mnist5k.source": str(tmp_path)})
    assert lines[1].startswith("data    500 images of test are in validation too") and lines[2].startswith("nets")
    shutil.copy(tmp_path / "test.parquet", tmp_path / "train.parquet")  # of which validation is a share
    given = {
        f"datasets.mnist5k.{key}": value for key, value in {"source": str(tmp_path), "splits.validation": 0.1}.items()
    }
    lines = check(given | {"cells": {}, "controls": {}})
    assert lines[1].startswith("data    500 images of test are in train too") and lines[2].startswith("nets")


def test_a_gan_of_another_size_is_refused_before_it_is_trained():
    experiment = Experiment(load_params({"gan.widths": [8, 8, 8], "gan.discriminator_widths": [8, 8]}))
    with pytest.raises(ValueError, match="gan.widths do not fit datasets.mnist5k: size_px=32: this GAN has 16"):
        experiment.new_gan()


TOO_MANY = {"control": "random_real", "ipc": 400, "runs": [0], "table": "main", "prior": "data"}


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"gradient_norms.images_per_class": 400}, r"gradient_norms.images_per_class in params.yaml: .*1\.\."),
        ({"controls": {"many": TOO_MANY}}, r"controls.many.ipc in params.yaml: .*1\.\.350"),
        ({"datasets.mnist5k.classes": ["0", "eleven"]}, "eleven"),
        ({"datasets.mnist5k.source": "data/nowhere"}, "change datasets.mnist5k.source, .*`dvc pull -f data.dvc`"),
        ({"networks.convnet": {"width": 8, "depth": 6}}, "networks.convnet in params.yaml: depth=6: must be at most"),
        (
            {"datasets.mnist5k.size_px": 36},
            "prior.autoencoder and .* do not fit .*size_px=36: .* multiples of 8",
        ),
        ({"networks.vit": {"factory": "torch.nn:Identity"}}, "networks.vit.factory .*must be a subclass of Network"),
        ({"trajectories.experts": 10**9}, "MiB needed"),
        ({"objectives.dm.trained_epochs": 1}, "cells.dm-pixel-1.experts in params.yaml: trained_epochs needs traj"),
    ],
)
def test_what_is_wrong_is_named(overrides, words):
    with pytest.raises((ValueError, OSError), match=words):
        check(overrides)


@pytest.mark.parametrize("stage, words", [("prior", "channels=1: this prior"), ("gan", "channels=1: this GAN")])
def test_a_prior_of_other_parameters_is_trained_again(stage, words):
    (line,) = [line for line in check({"datasets.mnist5k.channels": 1}) if line.startswith(stage)]
    assert words in line and f"the stage `{stage}` trains it again" in line


def test_without_data_and_priors_it_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    lines = check({})
    for stage in ("prior", "gan"):
        (line,) = [line for line in lines if line.startswith(stage)]
        assert f"the stage `{stage}` trains it" in line and f"`dvc pull --allow-missing {stage}`" in line
    assert sum("`dvc pull data.dvc`" in line for line in lines) == 1


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Copies the embedded prior and GAN, to be broken."""
    for stage in ("prior", "gan"):
        shutil.copytree(runs_path("mnist5k", stage), tmp_path / "runs/mnist5k" / stage)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return tmp_path / "runs/mnist5k"


@pytest.mark.parametrize(
    "stage, part", [("prior", "unet/diffusion_pytorch_model.safetensors"), ("gan", "weights.safetensors")]
)
@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-100]), Path.unlink])
def test_a_broken_prior_is_an_error_that_says_how_to_restore_it(trained, stage, part, damage):
    damage(trained / stage / part)
    with pytest.raises(ValueError, match=f"dvc checkout -f {stage}.*git checkout -- store.*delete .*{stage}"):
        check({})


def test_a_prior_from_elsewhere_must_fit_the_data(trained, tmp_path, monkeypatch):
    """The embedded prior in the place of a released one, for two of its classes."""
    source = (trained / "prior").rename(tmp_path / "elsewhere")
    given = {"prior.source": str(source), "datasets.mnist5k.classes": ["7", "3"], "cells": {}}
    assert check(given | {"prior.classes": [7, 3]})[2] == f"prior   {source}, its class of each class: 7 = 7, 3 = 3"
    with pytest.raises(ValueError, match="elsewhere has 10 classes, the data set 2: list in prior.classes"):
        check(given)
    monkeypatch.setattr(Experiment, "dataset", property(lambda experiment: pytest.fail("the data were decoded first")))
    (tmp_path / "model.ckpt").write_bytes(b"cut short")
    for changes, words in [
        ({"prior.source": str(tmp_path / "nowhere.ckpt")}, "nowhere.ckpt is missing"),
        ({"prior.source": str(tmp_path / "model.ckpt")}, "model.ckpt is broken or no checkpoint of PyTorch"),
        ({"datasets.mnist5k.size_px": 36}, "size_px=36: this prior takes multiples of 8"),
        ({"datasets.mnist5k.channels": 1}, "channels=1: this prior has 3"),
    ]:
        with pytest.raises((ValueError, OSError), match=words):
            check(given | changes)


def test_the_embedded_priors_are_good_enough():
    prior = json.loads((runs_path("mnist5k", "prior-check") / "check.json").read_text())
    gan = json.loads((runs_path("mnist5k", "gan-check") / "check.json").read_text())
    for check in (prior, gan):  # the key of a check made before is `recognised`
        assert check["samples"] >= 500 and check.get("sample_class_accuracy", check.get("recognised")) >= 0.95
    assert prior["psnr_db"] > 25 and gan["spread"] > 0.5


def test_a_store_without_its_files_is_noticed_before_anything_is_pulled(tmp_path):
    shutil.copy(paths.ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml", "store/a", "store/b", "venv/.installed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("data/mnist5k", "runs/mnist5k/prior", "runs/mnist5k/gan"):
        (tmp_path / name).mkdir(parents=True)
    options = {"cwd": tmp_path, "env": os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}, "capture_output": True}
    for command in (["init", "-q"], ["add", "store"]):
        subprocess.run(["git", *command], check=True, **options)
    assert subprocess.run(["make", "embedded", "VENV=venv"], **options).returncode == 0
    (tmp_path / "store/b").unlink()
    done = subprocess.run(["make", "embedded", "VENV=venv"], **options)
    assert done.returncode and b"git checkout -- store" in done.stderr
