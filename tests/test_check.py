"""What is wrong is said before any long work, and says what to change."""

import json

import pytest

from ld3m import paths
from ld3m.check import check
from ld3m.config import apply_profile, load_params


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


def test_missing_data_and_a_missing_prior_say_how_to_get_them(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc pull data.dvc"):
        check(load_params({"datasets.mnist5k.source": "data/nowhere"}))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    lines = check(load_params())
    assert all(any(f"the stage `{stage}` trains it" in line for line in lines) for stage in ("prior", "gan"))
