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
from ld3m.evaluation.artefact import read_artefact, tensors_hash, write_artefact
from ld3m.runtime.storage import read_tensors, write_tensors

CLASSES = ("cat", "dog", "sea horse")
IPC = 2
INTERVAL = "0.600 (95 % t interval 0.352 to 0.848) on validation data, n = 3"  # 0.1 * 4.303 / sqrt(3) is 0.248


def toy(channels=3, classes=CLASSES):
    """Two images a class, some of their pixels outside [-1, 1], and what a run records."""
    normalization = Normalization((0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.1)[:channels])
    labels = torch.arange(len(classes)).repeat_interleave(IPC)
    rng = torch.Generator().manual_seed(0)
    pixels = 3 * torch.rand(len(labels), channels, 8, 8, generator=rng) - 1.5
    recipe = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 3}
    score = {"split": "validation", "accuracy": [0.5, 0.7, 0.6]}
    record = {
        "configuration": {
            "iterations": 4,
            "network": "convnet",
            "network_size": {"width": 8, "depth": None},
            "seed": 5,
            "augmentation": "color_crop",
            "validation_recipe": recipe,
            "data_sha256": "d" * 64,
            "prior_sha256": None,
        },
        "history": [{"step": 0, "loss": 0.1}],
        "validation": [{"iteration": 0, "accuracy": 0.25}, {"iteration": 2, "accuracy": 0.75}],
        "cost": {"iterations": 4},
        "score": score,
    }
    tensors = {"images": normalization.normalize(pixels), "z": torch.randn(len(labels), 4, generator=rng)}
    return tensors, dict(labels=labels, classes=classes, normalization=normalization, name="toy", record=record)


def write(folder, **changes):
    tensors, rest = toy(**changes)
    write_artefact(folder, tensors, **rest)
    return tensors, rest


def rounded(tensors, rest):
    """The images as 8 bit (N, H, W, C), by plain numpy."""
    mean, std = (np.array(values)[:, None, None] for values in (rest["normalization"].mean, rest["normalization"].std))
    images = tensors["images"].double().numpy() * std + mean
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "set"
    return folder, *write(folder)


def test_what_is_written_is_read(written):
    folder, tensors, rest = written
    read, metadata = read_artefact(folder)
    assert set(read) == {"images", "labels", "z"}
    for name, tensor in (tensors | {"labels": rest["labels"]}).items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)
    assert rest["record"].items() <= metadata.items()
    assert metadata["name"] == "toy" and metadata["classes"] == list(CLASSES)
    assert metadata["normalization"] == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
    assert metadata["libraries"]["torch"] == torch.__version__


@pytest.mark.parametrize("name, change", [("images", lambda t: t + 1e-6), ("labels", lambda t: t.flip(0))])
def test_changed_tensors_are_detected(tmp_path, name, change):
    write(tmp_path / "set")
    file = tmp_path / "set" / "distilled.safetensors"
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors | {name: change(tensors[name])}, metadata)
    with pytest.raises(ValueError, match=r"distilled\.safetensors: the tensors do not match the hash"):
        read_artefact(tmp_path / "set")


def test_a_file_without_a_hash_and_a_missing_one_are_named(tmp_path):
    write_tensors(tmp_path / "distilled.safetensors", {"images": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="do not match"):
        read_artefact(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"distilled\.safetensors is missing; `dvc repro`"):
        read_artefact(tmp_path / "absent")


def test_a_card_of_other_tensors_is_detected(tmp_path):
    write(tmp_path / "set")
    card = tmp_path / "set" / "card.md"
    digest = read_artefact(tmp_path / "set")[1]["tensors_sha256"]
    card.write_text(card.read_text().replace(digest, "0" * 64))
    with pytest.raises(ValueError, match=rf"card\.md is of other tensors: their hash is {digest}"):
        read_artefact(tmp_path / "set")


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["cat", "dog"]},
        {"normalization": {"mean": [0.5], "std": [0.2]}},
        {"normalization": {"mean": [0.5, 0.4, 0.3], "std": [0.2]}},
        {"normalization": None},
    ],
)
def test_metadata_that_do_not_fit_the_tensors_are_detected(tmp_path, change):
    write(tmp_path / "set")
    file = tmp_path / "set" / "distilled.safetensors"
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors, metadata | change)
    with pytest.raises(ValueError, match="in the metadata do not fit"):
        read_artefact(tmp_path / "set")


def test_a_set_is_loaded_as_images_and_labels_and_the_package_imports_at_once(written):
    folder, tensors, rest = written
    images, labels = ld3m.load(folder)
    assert torch.equal(images, tensors["images"]) and torch.equal(labels, rest["labels"])
    with pytest.raises(FileNotFoundError, match="is missing"):
        ld3m.load(folder / "absent")
    check = "import ld3m, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_hash_is_over_names_shapes_types_and_values():
    one = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"b": one["b"], "c": one["a"]},
        one | {"a": torch.zeros(3, 2)},
        one | {"a": torch.zeros(2, 3, dtype=torch.int32)},
        one | {"a": -torch.zeros(2, 3)},
        {"a": one["a"]},
    ]
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
    tensors, rest = write(tmp_path / "set", channels=channels)
    folders = sorted((tmp_path / "set" / "images").iterdir())
    assert [re.sub(r"^\d+ ", "", folder.name) for folder in folders] == sorted(CLASSES)
    expected = rounded(tensors, rest)
    assert {0, 255} <= set(expected.flatten().tolist())
    for label, folder in enumerate(folders):
        assert sorted(file.name for file in folder.iterdir()) == ["0.png", "1.png"]
        for k in range(IPC):
            with Image.open(folder / f"{k}.png") as image:
                assert image.mode == {1: "L", 3: "RGB"}[channels]
                np.testing.assert_array_equal(
                    np.asarray(image).reshape(8, 8, channels), expected[IPC * label + k], strict=True
                )


@pytest.mark.parametrize(
    "classes",
    [
        ("../x", "..", ".", "a/b", "/etc/x", "a\\b"),
        ("", " ", "\n", "\0"),
        ("a/b", "a_b", "a:b"),
        ("", "class 0", "class 1"),
        ("è", "猫", "`x`\n# title"),
    ],
)
def test_no_class_name_leaves_the_folder_or_overwrites_another(tmp_path, classes):
    tensors, rest = write(tmp_path / "set", classes=classes)
    folder, images = tmp_path / "set", tmp_path / "set" / "images"
    assert list(tmp_path.iterdir()) == [folder]
    assert sorted(folder.iterdir()) == [folder / "card.md", folder / "distilled.safetensors", images]
    assert len(list(images.iterdir())) == len(classes)
    shown = [np.asarray(Image.open(file)).tobytes() for file in images.glob("*/*.png")]
    assert sorted(shown) == sorted(image.tobytes() for image in rounded(tensors, rest))


def test_the_card_says_what_was_chosen_and_where_it_comes_from(written):
    folder, _, _ = written
    card = (folder / "card.md").read_text()
    for part in (
        "6 images, 2 a class (cat, dog, sea horse), 3 x 8 x 8",
        "Iteration 2 of 4",
        "0.750",
        "d" * 64,
        INTERVAL,
    ):
        assert part in card
    assert read_artefact(folder)[1]["tensors_sha256"] in card and "none used" in card


def test_a_set_that_cannot_be_written_leaves_the_former_one(tmp_path):
    write(tmp_path / "set")
    before = files(tmp_path / "set")
    tensors, rest = toy()
    with pytest.raises(KeyError):
        write_artefact(tmp_path / "set", tensors, **rest | {"record": {}})
    assert files(tmp_path / "set") == before and len(list(tmp_path.iterdir())) == 1
