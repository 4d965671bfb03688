"""What is wrong is said before any long work, and says what to change."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ld3m.pipeline.check import check
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import apply_profile, load_params
from ld3m.runtime import paths


def test_the_committed_profile_is_in_order():
    lines = check(load_params())
    assert [line.split()[0] for line in lines] == ["data", "nets", "prior", "gan", "disk"]
    assert "3500 + 500 + 1000 images of 10 classes" in lines[0] and "4 x 8 x 8" in lines[2]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"grid.ipc": [1, 351]}, "350 images.*1..350"),
        ({"datasets.mnist5k.size_px": 36}, "size_px = 36.*multiple of 8"),
        ({"datasets.mnist5k.classes": ["0", "eleven"]}, "eleven"),
        ({"networks.convnet": {"width": 8, "depth": 6}}, "depth"),
        ({"trajectories.experts": 10**9}, "MiB needed"),
    ],
)
def test_what_is_wrong_is_named(overrides, words):
    with pytest.raises((ValueError, OSError), match=words):
        check(load_params(overrides))


def test_a_prior_of_other_parameters_is_announced_not_refused():
    (line,) = [line for line in check(load_params({"datasets.mnist5k.channels": 1})) if line.startswith("prior")]
    assert "1 channels, the prior 3" in line and "trains it first" in line


def test_a_gan_of_other_parameters_is_announced_not_refused():
    changes = {"datasets.mnist5k.channels": 1, "gan.noise_width": 8}
    (line,) = [line for line in check(load_params(changes)) if line.startswith("gan")]
    assert "channels = 1, the GAN was trained with 3" in line and "trains it first" in line


def test_a_prior_from_elsewhere_is_announced(trained):
    """The embedded one in the part of another's, for two of its classes, in an order of their own."""
    given = {"prior.source": str(trained["prior"]), "datasets.mnist5k.classes": ["7", "3"], "more.cells": {}}
    line = check(load_params(given | {"prior.classes": [7, 3]}))[2]
    assert line == f"prior   {trained['prior']}: latents 4 x 8 x 8, classes 7, 3"
    for changes, words in [
        ({}, "the data set has 2 classes, .* 10: list in prior.classes in params.yaml"),
        ({"prior.classes": [7]}, "prior.classes has 1 entries, the data set 2 classes"),
        ({"prior.classes": [7, 10]}, r"prior\.classes: \[10\] are not of the prior, which has 0 to"),
        (
            {"prior.classes": [7, 3], "datasets.mnist5k.size_px": 36},
            "size_px = 36 .*takes multiples of 8 px",
        ),
        ({"prior.source": "../nowhere/model.ckpt"}, "nowhere/model.ckpt is missing: place the model.ckpt"),
        ({"prior.source": "runs/nowhere"}, "no prior in .*nowhere: unet or transformer, vqvae or vae, scheduler"),
    ]:
        with pytest.raises((ValueError, OSError), match=words):
            check(load_params(given | changes))


def test_a_prior_from_elsewhere_is_looked_at_before_the_images_are_decoded(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Experiment, "dataset", property(lambda experiment: pytest.fail("the data were read first")))
    (tmp_path / "model.ckpt").write_bytes(b"cut short")
    given = {"prior.source": str(trained["prior"]), "more.cells": {}}
    for changes, words in [
        ({"prior.source": str(tmp_path / "nowhere.ckpt")}, "nowhere.ckpt is missing"),
        ({"prior.source": str(tmp_path / "model.ckpt")}, "model.ckpt is no checkpoint of PyTorch, or a broken one"),
        ({"datasets.mnist5k.size_px": 36}, "size_px = 36 does not fit this prior, .* datasets.<name>.size_px"),
        ({"datasets.mnist5k.channels": 1}, "the data set has 1 channels, the prior 3"),
    ]:
        with pytest.raises((ValueError, OSError), match=words):
            check(load_params(given | changes))


def test_a_mistyped_profile_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="smok.yaml is missing; the repository has .*profiles/smoke.yaml"):
        apply_profile(tmp_path / "smok.yaml")


def test_the_embedded_prior_is_good_enough():
    record = json.loads((paths.prior_check_folder("mnist5k") / "check.json").read_text())
    assert record["samples"] >= 500 and record["recognised"] >= 0.95 and record["psnr_db"] > 25


def test_the_embedded_gan_is_good_enough():
    record = json.loads((paths.gan_check_folder("mnist5k") / "check.json").read_text())
    assert record["samples"] >= 500 and record["recognised"] >= 0.95 and record["spread"] > 0.5
    weights = paths.gan_folder("mnist5k") / "weights.safetensors"
    assert weights.stat().st_size < 2.5e6


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A copy of the embedded prior and GAN, to be broken."""
    folders = {"prior": paths.prior_folder("mnist5k"), "gan": paths.gan_folder("mnist5k")}
    for folder in folders.values():
        shutil.copytree(folder, tmp_path / folder.relative_to(paths.ROOT))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return {stage: tmp_path / "runs/mnist5k" / stage for stage in folders}


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def overwrite_start(file):
    file.write_bytes(b"\xff" * 100 + file.read_bytes()[100:])


@pytest.mark.parametrize("damage", [cut, overwrite_start, Path.unlink])
@pytest.mark.parametrize(
    "stage, part", [("prior", "unet/diffusion_pytorch_model.safetensors"), ("gan", "weights.safetensors")]
)
def test_a_broken_prior_is_an_error_that_says_how_to_restore_it(trained, stage, part, damage):
    damage(trained[stage] / part)
    with pytest.raises(ValueError, match=f"dvc checkout -f {stage}.*git checkout -- store.*delete .*{stage}"):
        check(load_params())


@pytest.mark.parametrize("part", ["unet or transformer", "vqvae or vae", "scheduler", "class_embedder"])
def test_a_prior_without_a_part_is_an_error(trained, part):
    shutil.rmtree(trained["prior"] / part.split()[0])
    with pytest.raises(ValueError, match=f"{part} missing.*dvc checkout -f prior"):
        check(load_params())


def test_the_command_fails_where_the_prior_is_broken(trained, monkeypatch):
    cut(trained["prior"] / "unet/diffusion_pytorch_model.safetensors")
    monkeypatch.delitem(sys.modules, "ld3m.pipeline.check")
    monkeypatch.setattr(sys, "argv", ["check.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("ld3m.pipeline.check", run_name="__main__")
    assert "dvc checkout -f prior" in str(end.value.code)


def embedded(folder):
    """`make embedded` in a folder, with an environment that is there already and does nothing."""
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    command = ["make", "embedded", "VENV=venv"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_store_without_its_files_is_noticed_before_anything_is_pulled(tmp_path):
    shutil.copy(paths.ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml", "store/a", "store/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("data", "prior", "gan"):
        (tmp_path / ("data/mnist5k" if name == "data" else f"runs/mnist5k/{name}")).mkdir(parents=True)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.installed").touch()
    for command in (["init", "-q"], ["add", "store"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert embedded(tmp_path).returncode == 0
    (tmp_path / "store/b").unlink()
    for _ in range(2):
        done = embedded(tmp_path)
        assert done.returncode and "git checkout -- store" in done.stderr
        shutil.rmtree(tmp_path / "store", ignore_errors=True)


def test_missing_data_and_a_missing_prior_say_how_to_get_them(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="source='data/nowhere': no folder .*: place train.parquet"):
        check(load_params({"datasets.mnist5k.source": "data/nowhere"}))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    lines = check(load_params())
    for stage in ("prior", "gan"):
        (line,) = [line for line in lines if line.startswith(stage)]
        assert f"the stage `{stage}` trains it" in line and f"`dvc pull --allow-missing {stage}`" in line
    assert sum("`dvc pull data.dvc`" in line for line in lines) == 1  # wanted whatever the data set


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"grid.ipc": [1, 400]}, "grid.ipc"),
        ({"gradient_norms.images_per_class": 400}, "gradient_norms.images_per_class"),
        (
            {"more.cells": {"dm-pixel-400": {"objective": "dm", "space": "pixel", "ipc": 400, "runs": 1}}},
            "more.cells.dm-pixel-400",
        ),
        (
            {"more.controls": {"herding-400": {"control": "herding", "ipc": 400, "runs": 1}}},
            "more.controls.herding-400",
        ),
    ],
)
def test_more_images_a_class_than_there_are_is_known_before_any_work(changes, key):
    with pytest.raises(ValueError, match=rf"{key} in params.yaml: ipc=400: class .* images, ipc must be in 1"):
        check(load_params(changes))
