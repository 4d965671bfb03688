"""Subsets of ImageNet-1k by name."""

import pytest
from PIL import Image

from ld3m.data import dataset as data
from ld3m.data import subsets
from ld3m.pipeline.profiles import load_params

SETTINGS = {"name": "toy", "size_px": 8, "channels": 3, "splits": {"train": "train", "validation": 0.5, "test": "val"}}


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """An image folder of 1000 classes named as ImageNet's folders are; only those of "nette" have images."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split, count in {"train": 2, "val": 1}.items():
        for index in range(1000):
            (folder / split / f"n{index:08d}").mkdir(parents=True)
        for index in subsets.IMAGENET["nette"]:
            for k in range(count):
                image = Image.new("RGB", (9, 8), (index // 256, index % 256, k))
                image.save(folder / split / f"n{index:08d}" / f"{k}.png")
    return folder


def test_every_subset_is_ten_distinct_classes():
    assert list(subsets.IMAGENET) == [
        *"abcde", "nette", "woof", "birds", "fruits", "cats", "yellow", "geo", "food", "mammals", "marine",
    ]  # fmt: skip
    for indices in subsets.IMAGENET.values():
        assert len(set(indices)) == 10 and all(0 <= index < 1000 for index in indices)
    first_five = [index for name in "abcde" for index in subsets.IMAGENET[name]]
    assert len(set(first_five)) == 50
    assert sum(map(sum, subsets.IMAGENET.values())) == 68011  # of the published numbers


def test_a_subset_is_its_classes_in_the_published_order(thousand):
    dataset = data.load_dataset(thousand, **SETTINGS, classes="nette")
    assert dataset.train.classes[:3] == ("n00000000", "n00000217", "n00000482")
    for label, index in enumerate(subsets.IMAGENET["nette"]):
        for part in (dataset.train, dataset.validation, dataset.test):
            (row,) = part.of_class(label)
            assert part.uint8[row, :2, 0, 0].tolist() == [index // 256, index % 256]


def test_an_unknown_subset_lists_those_that_exist(thousand):
    with pytest.raises(ValueError, match=r"dataset 'toy': classes='dogs': .*; there are a, b, c, .*marine.*\[dogs\]"):
        data.load_dataset(thousand, **SETTINGS, classes="dogs")
    with pytest.raises(ValueError, match=r"datasets\.mnist5k\.classes: .*named 'dogs'; there are .*marine"):
        load_params({"datasets.mnist5k.classes": "dogs"})


@pytest.mark.parametrize(
    "names, known",
    [
        ([f"n{index:08d}" for index in range(1000)], True),
        (["tench, Tinca tinca", *(f"class {index}" for index in range(999))], True),
        ([str(index) for index in range(1000)], True),
        (sorted(str(index) for index in range(1000)), False),
        ([f"animal {index:03d}" for index in range(1000)], False),
        ([str(index) for index in range(10)], False),
    ],
)
def test_a_subset_needs_the_thousand_classes_in_imagenet_s_order(names, known):
    if known:
        assert subsets.of_imagenet("nette", names, where="toy") == subsets.IMAGENET["nette"]
    else:
        with pytest.raises(ValueError, match=r"toy: classes='nette' needs the 1000 .*: name their folders n01440764"):
            subsets.of_imagenet("nette", names, where="toy")
