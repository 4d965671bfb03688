"""Subsets of ImageNet-1k by name."""

import pytest
from PIL import Image

from ld3m.data.dataset import load_dataset
from ld3m.data.subsets import IMAGENET, of_imagenet
from ld3m.pipeline.profiles import load_params


def test_every_subset_is_ten_distinct_classes():
    assert list(IMAGENET) == [
        *"abcde", "nette", "woof", "birds", "fruits", "cats", "yellow", "geo", "food", "mammals", "marine",
    ]  # fmt: skip
    for indices in IMAGENET.values():
        assert len(set(indices)) == 10 and all(0 <= index < 1000 for index in indices)
    assert len({index for name in "abcde" for index in IMAGENET[name]}) == 50
    assert sum(map(sum, IMAGENET.values())) == 68011  # of the published numbers


def test_a_subset_is_its_classes_in_the_published_order(tmp_path):
    for split, count in {"train": 2, "val": 1}.items():
        for index in range(1000):
            (tmp_path / split / f"n{index:08d}").mkdir(parents=True)
        for index in IMAGENET["nette"]:
            for k in range(count):
                image = Image.new("RGB", (9, 8), (index // 256, index % 256, k))
                image.save(tmp_path / split / f"n{index:08d}" / f"{k}.png")
    splits = {"train": "train", "validation": 0.5, "test": "val"}
    dataset = load_dataset(tmp_path, name="toy", size_px=8, channels=3, splits=splits, classes="nette")
    assert dataset.train.classes[:3] == ("n00000000", "n00000217", "n00000482")
    for label, index in enumerate(IMAGENET["nette"]):
        for part in (dataset.train, dataset.validation, dataset.test):
            (row,) = part.of_class(label)
            assert part.uint8[row, :2, 0, 0].tolist() == [index // 256, index % 256]


def test_an_unknown_subset_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"datasets\.mnist5k\.classes: .*named 'dogs'; there are a, .*\[dogs\]"):
        load_params({"datasets.mnist5k.classes": "dogs"})


def test_a_subset_needs_the_thousand_classes_in_imagenet_s_order():
    numbers = [str(index) for index in range(1000)]
    words = ["tench, Tinca tinca", *(f"class {index}" for index in range(999))]
    for names in (numbers, words, [f"n{index:08d}" for index in range(1000)]):
        assert of_imagenet("nette", names, where="toy") == IMAGENET["nette"]
    for names in (sorted(numbers), numbers[:10], [f"animal {index:03d}" for index in range(1000)]):
        with pytest.raises(ValueError, match=r"toy: classes='nette' needs the 1000 .*: name the folders n01440764"):
            of_imagenet("nette", names, where="toy")
