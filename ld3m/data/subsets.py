"""Subsets of ImageNet-1k that the literature distills, by name: ten class indices each, in the published order."""

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

IMAGENET = {
    "a": (255, 376, 984, 364, 500, 986, 333, 576, 148, 135),
    "b": (129, 916, 90, 275, 995, 874, 102, 259, 685, 139),
    "c": (565, 94, 554, 535, 92, 392, 291, 136, 324, 11),
    "d": (9, 258, 13, 262, 19, 339, 321, 24, 93, 322),
    "e": (816, 96, 100, 145, 739, 713, 783, 76, 688, 326),
    "nette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "woof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "birds": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "fruits": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "cats": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "yellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
    "geo": (980, 970, 975, 974, 973, 977, 976, 978, 972, 979),
    "food": (933, 934, 932, 963, 930, 928, 924, 959, 931, 927),
    "mammals": (386, 387, 354, 340, 338, 104, 103, 279, 334, 366),
    "marine": (148, 2, 397, 327, 33, 150, 107, 108, 119, 392),
}


@cache
def imagenet_classes() -> tuple[dict[str, str], ...]:
    """The 1000 classes of ImageNet-1k in their order: `wnid`, the name of their folder, and `name`, a word."""
    with Path(__file__).with_name("imagenet_classes.csv").open(newline="") as file:
        return tuple(csv.DictReader(file))


def check_name(name: str) -> str:
    """Return the name of a subset; ValueError if there is none of that name."""
    if name not in IMAGENET:
        raise ValueError(
            f"{name!r} is no subset of ImageNet-1k: name one of {', '.join(IMAGENET)}; "
            f"or, for classes of your own, write a list of their names, [{name}, ...]"
        )
    return name


@cache
def _known() -> dict[str, int]:
    """The index of a class by its wnid and by its word."""
    return {entry[key]: index for key in ("wnid", "name") for index, entry in enumerate(imagenet_classes())}


def word(name: str) -> str:
    """Returns the word for a class named by its wnid, and any other name as it is."""
    index = _known().get(name)
    return name if index is None else imagenet_classes()[index]["name"]


def imagenet_indices(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the index in ImageNet-1k of every class by its wnid or word; None where one is unknown."""
    found = [_known().get(name.split(",")[0]) for name in names]
    return None if None in found else tuple(found)


def of_imagenet(name: str, classes: Sequence[str], *, where: str) -> list[str]:
    """Return the names of a subset's classes, in the published order, out of the names `classes` of a source.

    They are found by wnid ("n01440764") or word ("tench"). Of 1000 classes that are numbers, or from "tench" on as on
    the hub, the index decides. ValueError for an unknown subset, or a class that `where`, the source, does not have.
    """
    found = {_known().get(each.split(",")[0]): each for each in classes}
    if len(classes) == 1000 and (classes[0].startswith("tench") or list(classes) == list(map(str, range(1000)))):
        found = dict(enumerate(classes))
    if missing := [imagenet_classes()[index]["wnid"] for index in IMAGENET[check_name(name)] if index not in found]:
        raise ValueError(
            f"{where}: classes={name!r} needs {', '.join(missing)} too (or all 1000 classes of ImageNet-1k in their "
            "order): name folders by wnid, or give a list of class names"
        )
    return [found[index] for index in IMAGENET[name]]
