"""Judges a set of images: networks of every architecture are trained on it from scratch and tested on real images."""

from collections.abc import Callable
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
    strategy: str,
    seed: int,
) -> float:
    """The accuracy, in [0, 1], on `real` of one network trained on the images `fetch(index)` with `labels`.

    `recipe` holds the keyword arguments of `training.train` but strategy and seed.
    """
    network = train(new_network(seed=seed), fetch, labels, strategy=strategy, seed=seed, **recipe)
    return accuracy(network, partial(real_images, real, normalization), real.labels)


def real_images(split: Split, normalization: Normalization, index: Tensor) -> Tensor:
    """Normalised images (n, C, H, W) of a split."""
    return normalization.to_images(split.pixels(index))


def judge_all(
    fetch: Callable[[Tensor], Tensor],
    labels: Tensor,
    real: Split,
    *,
    normalization: Normalization,
    networks: dict[str, Callable[..., nn.Module]],
    recipes: dict[str, dict[str, Any]],
    strategy: str,
    seeds: range,
    seed: int,
    processes: int,
) -> dict[str, list[float]]:
    """Accuracies of the networks `seeds` of every architecture: {architecture: [accuracy, ...]}.

    The k-th network of an architecture has the same initialisation and augmentation whatever the images are, so
    that sets can be compared seed by seed.
    """
    shared = dict(fetch=fetch, labels=labels, real=real, normalization=normalization, strategy=strategy)
    keys = [(architecture, k) for architecture in networks for k in seeds]
    tasks = [
        shared
        | {
            "new_network": networks[architecture],
            "recipe": recipes[architecture],
            "seed": derive(seed, "judge", architecture, k),
        }
        for architecture, k in keys
    ]
    scores = fan_out(judge, tasks, processes=processes, label="networks")
    return {
        architecture: [score for (name, _), score in zip(keys, scores, strict=True) if name == architecture]
        for architecture in networks
    }
