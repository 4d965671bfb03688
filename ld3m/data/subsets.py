"""Subsets of ImageNet-1k that the literature distils, by name: ten class indices each, in the published order."""

import re
from collections.abc import Sequence

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
IMAGENET_CLASSES = 1000


def check_name(name: str) -> str:
    """The name of a subset as it is; ValueError for one that is not there."""
    if name not in IMAGENET:
        raise ValueError(
            f"there is no subset {name!r} of ImageNet-1k; there are {', '.join(IMAGENET)}; class names go into a list: "
            f"[{name}]"
        )
    return name


def of_imagenet(name: str, *, classes_there: Sequence[str], key: str) -> tuple[int, ...]:
    """Class indices of a subset, for a source with the classes `classes_there`; `key` is the setting that errors name.

    ValueError for an unknown name, and for a source that has not the 1000 classes of ImageNet-1k in their order: under
    ImageNet's names of folders, sorted, as numbers, or from "tench" on, as the hub's are called.
    """
    try:
        indices = IMAGENET[check_name(name)]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if len(classes_there) != IMAGENET_CLASSES or not _are_in_order(classes_there):
        raise ValueError(
            f"{key} is {name!r}, ten of the {IMAGENET_CLASSES} classes of ImageNet-1k in their order, but the source "
            f"has {len(classes_there)}, from {classes_there[0]!r} on: name their folders n01440764 and so on, as "
            f"ImageNet does, or set {key} in params.yaml to null for all of them or to a list of names"
        )
    return indices


def _are_in_order(names: Sequence[str]) -> bool:
    folders = all(re.fullmatch(r"n\d{8}", name) for name in names)  # which readers sort
    return folders or names[0].startswith("tench") or list(names) == list(map(str, range(len(names))))
