"""Subsets of ImageNet-1k by name."""

import pytest
from PIL import Image

from ld3m.data.dataset import load_dataset
from ld3m.data.subsets import IMAGENET, imagenet_classes, imagenet_indices, of_imagenet
from ld3m.pipeline.profiles import load_params


def test_every_subset_is_ten_distinct_classes():
    assert " ".join(IMAGENET) == "a b c d e nette woof birds fruits cats yellow geo food mammals marine"
    for indices in IMAGENET.values():
        assert len(set(indices)) == 10 and all(0 <= index < 1000 for index in indices)
    assert len({index for name in "abcde" for index in IMAGENET[name]}) == 50
    assert sum(map(sum, IMAGENET.values())) == 68011  # of the published numbers


def test_a_subset_is_its_classes_in_the_published_order(tmp_path):
    wnids = [imagenet_classes()[index]["wnid"] for index in IMAGENET["woof"]]
    for label, wnid in enumerate(wnids):
        for file in (f"train/{wnid}/0.png", f"train/{wnid}/1.png", f"val/{wnid}/0.png"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("L", (8, 8), bytes(range(label, label + 64))).save(tmp_path / file)
    splits = {"train": "train", "validation": 0.5, "test": "val"}
    dataset = load_dataset(tmp_path, name="toy", size_px=8, channels=1, splits=splits, classes="woof")
    assert dataset.train.classes == tuple(wnids) and wnids != sorted(wnids)
    for part in (dataset.train, dataset.validation, dataset.test):
        assert part.uint8[part.labels.argsort(), 0, 0, 0].tolist() == list(range(10))


def test_an_unknown_subset_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"datasets\.mnist5k\.classes: .*named 'dogs'; there are a, .*\[dogs\]"):
        load_params({"datasets.mnist5k.classes": "dogs"})


def test_a_subset_is_found_by_wnid_or_word_or_in_imagenet_s_order():
    wnids, words = ([entry[key] for entry in imagenet_classes()] for key in ("wnid", "name"))
    assert len(set(wnids)) == 1000 and wnids == sorted(wnids) and (wnids[0], words[701]) == ("n01440764", "parachute")
    numbers, fake = [str(index) for index in range(1000)], [f"n{index:08d}" for index in range(1000)]
    for names in (numbers, ["tench, Tinca tinca", *words[1:]], fake, wnids):
        assert of_imagenet("nette", names, where="toy") == [names[index] for index in IMAGENET["nette"]]
    for names in (wnids, words):
        ten = [names[index] for index in IMAGENET["woof"]]
        assert of_imagenet("woof", sorted(ten), where="toy") == ten  # just those ten, in any order
        assert imagenet_indices(ten) == IMAGENET["woof"] and imagenet_indices([*ten, "0"]) is None
    assert imagenet_indices(["crane"]) is None  # a bird and a machine
    for names in (sorted(numbers), numbers[:10], [f"animal {index:03d}" for index in range(1000)]):
        with pytest.raises(ValueError, match=r"toy: classes='nette' needs the folders n01440764, .*rename the folders"):
            of_imagenet("nette", names, where="toy")
