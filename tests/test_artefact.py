import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ld3m
from ld3m.data.dataset import Normalization
from ld3m.evaluation.artefact import read_artefact, write_artefact
from ld3m.runtime.storage import read_tensors, tensors_hash, write_tensors

CLASSES = ("cat", "dog", "sea horse")
IPC = 2
RECIPE = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 3}
CONFIGURATION = {"iterations": 4, "network": "convnet", "network_size": {"width": 8, "depth": None}, "seed": 5}
CONFIGURATION |= {"augmentation": "color_crop", "validation_recipe": RECIPE}
CONFIGURATION |= {"data_sha256": "d" * 64, "prior_sha256": None}
RECORD = {"configuration": CONFIGURATION, "history": [{"step": 0, "loss": 0.1}], "cost": {"iterations": 4}}
RECORD |= {"validation": [{"iteration": 0, "accuracy": 0.25}, {"iteration": 2, "accuracy": 0.75}]}
RECORD |= {"score": {"split": "validation", "accuracy": [0.5, 0.7, 0.6]}}


def write(folder, *, channels=3, classes=CLASSES):
    """A set of two images a class, some of their pixels outside [-1, 1]; returns its tensors, its labels, and the
    images as 8 bit (N, H, W, C), by plain numpy."""
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.1)[:channels]
    labels = torch.arange(len(classes)).repeat_interleave(IPC)
    rng = torch.Generator().manual_seed(0)
    pixels = 3 * torch.rand(len(labels), channels, 8, 8, generator=rng) - 1.5
    normalization = Normalization(mean, std)
    tensors = {"images": normalization.normalize(pixels), "z": torch.randn(len(labels), 4, generator=rng)}
    given = dict(labels=labels, classes=classes, normalization=normalization, name="toy", record=RECORD)
    write_artefact(folder, tensors, **given)
    shown = tensors["images"].double().numpy().transpose(0, 2, 3, 1) * np.array(std) + mean
    return tensors, labels, np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "set"
    return folder, *write(folder)


def test_what_is_written_is_read_and_the_package_imports_at_once(written):
    folder, tensors, labels, _ = written
    read, metadata = read_artefact(folder)
    torch.testing.assert_close(read, tensors | {"labels": labels}, rtol=0, atol=0)
    assert RECORD.items() <= metadata.items()
    assert metadata["name"] == "toy" and metadata["classes"] == list(CLASSES)
    assert metadata["normalization"] == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
    assert metadata["libraries"]["torch"] == torch.__version__
    torch.testing.assert_close(ld3m.load(folder), (tensors["images"], labels), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match=r"absent/distilled\.safetensors is missing: distill it first"):
        ld3m.load(folder / "absent")
    subprocess.run([sys.executable, "-c", "import ld3m, sys; sys.exit('torch' in sys.modules)"], check=True)


@pytest.mark.parametrize(
    "tensor_changes, changes",
    [
        ({"images": lambda t: t + 1e-6}, {}),
        ({"labels": lambda t: t.flip(0)}, {}),
        ({}, {"tensors_sha256": None}),
        ({}, {"classes": ["cat", "dog"]}),
        ({}, {"classes": 3}),
        ({}, {"normalization": {"mean": [0.5], "std": [0.2]}}),
        ({}, {"normalization": {"mean": [0, 0, 0], "std": [[], [], []]}}),
        ({}, {"normalization": {"mean": [float("nan")] * 3, "std": [0.2] * 3}}),
    ],
)
def test_tensors_and_metadata_that_do_not_fit_are_detected(tmp_path, tensor_changes, changes):
    write(tmp_path / "set")
    file = tmp_path / "set" / "distilled.safetensors"
    tensors, metadata = read_tensors(file)
    changed = {name: change(tensors[name]) for name, change in tensor_changes.items()}
    write_tensors(file, tensors | changed, metadata | changes)
    with pytest.raises(ValueError, match=r"distilled\.safetensors: the tensors do not fit"):
        read_artefact(tmp_path / "set")


def test_the_hash_is_over_names_shapes_types_and_values():
    one = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [one | {"a": other} for other in (torch.zeros(3, 2), torch.zeros(2, 3).int(), -torch.zeros(2, 3))]
    others += [{"b": one["b"], "c": one["a"]}, {"a": one["a"]}]
    assert len({tensors_hash(tensors) for tensors in (one, *others)}) == 6
    assert tensors_hash(dict(reversed(one.items()))) == tensors_hash(one)
    assert tensors_hash(one | {"a": torch.zeros(3, 2).T.requires_grad_()}) == tensors_hash(one)


def test_bytes_repeat_and_say_nothing_about_the_machine(tmp_path, monkeypatch):
    write(tmp_path / "one")
    for name in ("USER", "LOGNAME", "HOME", "HOSTNAME"):
        monkeypatch.setenv(name, str(tmp_path / "somebody"))
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "another place" / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "another place" / "two")
    assert one == two and len(one) == 2 + len(CLASSES) * IPC
    text = (tmp_path / "one" / "card.md").read_text() + str(read_artefact(tmp_path / "one")[1])
    assert not re.search(r"(?<![\w.`])/\w", text)  # an absolute path


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pngs_are_the_clamped_rounded_images(tmp_path, channels):
    expected = write(tmp_path / "set", channels=channels)[2]
    assert {0, 255} <= set(expected.flatten().tolist())
    for n, file in enumerate(f"{label:03d} {name}/{k}.png" for label, name in enumerate(CLASSES) for k in range(IPC)):
        with Image.open(tmp_path / "set/images" / file) as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            np.testing.assert_array_equal(np.asarray(image).reshape(8, 8, channels), expected[n], strict=True)


def test_no_class_name_leaves_the_folder_or_overwrites_another(tmp_path):
    classes = ("../x", "..", ".", "a/b", "a_b", "a:b", "/etc/x", "a\\b", "", " ", "\n", "\0", "è", "猫", "`x`\n# title")
    expected = write(tmp_path / "set", classes=classes)[2]
    folder, images = tmp_path / "set", tmp_path / "set" / "images"
    assert list(tmp_path.iterdir()) == [folder]
    assert sorted(folder.iterdir()) == [folder / "card.md", folder / "distilled.safetensors", images]
    assert len(list(images.iterdir())) == len(classes)
    shown = [np.asarray(Image.open(file)).tobytes() for file in images.glob("*/*.png")]
    assert sorted(shown) == sorted(image.tobytes() for image in expected)


def test_the_card_says_what_was_chosen_and_where_it_comes_from(written):
    folder = written[0]
    card = (folder / "card.md").read_text()
    for part in (
        "6 images, 2 a class (cat, dog, sea horse), 3 x 8 x 8",
        "Iteration 2 of 4",
        "reached 0.750",
        "| data, sha256 | " + "d" * 64,
        "| prior, sha256 | none used |",
        read_artefact(folder)[1]["tensors_sha256"],
        "0.600 (95 % t interval 0.352 to 0.848) on validation data, n = 3",  # 0.1 * 4.303 / sqrt(3) is 0.248
    ):
        assert part in card
