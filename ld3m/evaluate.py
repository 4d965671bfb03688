"""Judges a set of images: networks of every architecture are trained on it from scratch and tested on real images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ld3m.data import Normalization, Split
from ld3m.parallel import fan_out
from ld3m.seeds import derive
from ld3m.training import accuracy, train


def judge(
    fetch: Callable[[Tensor], Tensor],
    labels: Tensor,
    real: Split,
    *,
    normalization: Normalization,
    new_network: Callable[..., nn.Module],
    recipe: dict[str, Any],
    seed: int,
) -> float:
    """The accuracy, in [0, 1], on `real` of one network trained on the images `fetch(index)` with `labels`.

    `recipe` holds the keyword arguments of `training.train` but the seed.
    """
    network = train(new_network(seed=seed), fetch, labels, seed=seed, **recipe)
    return accuracy(network, partial(real_images, real, normalization), real.labels)


def real_images(split: Split, normalization: Normalization, index: Tensor) -> Tensor:
    """Normalised images (n, C, H, W) of a split."""
    return normalization.to_images(split.pixels(index))


@dataclass(frozen=True)
class Judged:
    """A set of images, and the networks that judge it: of every architecture in `recipes` the `seeds` of a stream.

    A recipe has the keyword arguments of `training.train` but the seed.
    """

    fetch: Callable[[Tensor], Tensor]
    labels: Tensor
    recipes: dict[str, dict[str, Any]]
    seeds: range
    seed: int


def judge_all(
    sets: list[Judged],
    real: Split,
    *,
    normalization: Normalization,
    networks: dict[str, Callable[..., nn.Module]],
    processes: int,
) -> list[dict[str, list[float]]]:
    """For every set the accuracies of its networks: {architecture: [accuracy, ...]}.

    The k-th network of an architecture has the same initialisation and augmentation whatever the images are, so that
    sets of the same `seed` can be compared network by network.
    """
    keys = [(n, architecture, k) for n, given in enumerate(sets) for architecture in given.recipes for k in given.seeds]
    tasks = [
        {
            "fetch": sets[n].fetch,
            "labels": sets[n].labels,
            "real": real,
            "normalization": normalization,
            "new_network": networks[architecture],
            "recipe": sets[n].recipes[architecture],
            "seed": derive(sets[n].seed, "judge", architecture, k),
        }
        for n, architecture, k in keys
    ]
    scores: list[dict[str, list[float]]] = [{architecture: [] for architecture in given.recipes} for given in sets]
    found = fan_out(judge, tasks, processes=processes, label="networks")
    for (n, architecture, _), score in zip(keys, found, strict=True):
        scores[n][architecture].append(score)
    return scores
