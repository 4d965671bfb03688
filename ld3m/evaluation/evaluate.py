"""Evaluates sets of images: networks of every architecture are trained on a set and tested on real images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ld3m.data.dataset import Normalization, Split
from ld3m.evaluation.training import accuracy, train_together
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.devices import network_chunk_size, test_chunk_size
from ld3m.runtime.parallel import fan_out
from ld3m.runtime.seeds import derive


def evaluate_networks(
    fetch: Callable[[Tensor], Tensor],
    labels: Tensor,
    real: Split,
    *,
    normalization: Normalization,
    new_network: Callable[..., nn.Module],
    recipe: dict[str, Any],
    seeds: list[int],
) -> list[float]:
    """The accuracies, in [0, 1], on `real` of networks trained together on the images `fetch(index)` with `labels`.

    `recipe` holds the keyword arguments of `training.train` but the seed.
    """
    networks = [new_network(seed=seed) for seed in seeds]
    trained = train_together(networks, fetch, labels, seeds=seeds, **recipe)
    batch = test_chunk_size(real.device, size_px=real.shape[-1])
    return [accuracy(network, partial(real.normalized, normalization), real.labels, batch=batch) for network in trained]


@dataclass(frozen=True)
class EvaluationJob:
    """A set of images and its evaluation networks: of every architecture in `recipes`, networks `seeds` of the stream
    `seed`.

    A recipe has the keyword arguments of `training.train` but the seed.
    """

    fetch: Callable[[Tensor], Tensor]
    labels: Tensor
    recipes: dict[str, dict[str, Any]]
    seeds: range
    seed: int


def evaluate_sets(
    jobs: list[EvaluationJob],
    real: Split,
    *,
    normalization: Normalization,
    networks: dict[str, Callable[..., nn.Module]],
    processes: int,
    cluster: str | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, list[float]]]:
    """For every set the accuracies of its networks: {architecture: [accuracy, ...]}.

    The k-th network of an architecture has the same initialisation and augmentation whatever the images are, so that
    sets of the same `seed` can be compared network by network (on CUDA, where several are trained together, all but the
    first have dropout that depends on how many). Those that an interrupted call left in `checkpoint` are
    not trained again.
    """
    keys, tasks = [], []
    for n, given in enumerate(jobs):
        for architecture, recipe in given.recipes.items():
            batch = min(recipe["batch"], len(given.labels))
            together = network_chunk_size(real.device, batch=batch, size_px=real.shape[-1])
            for first in range(0, len(given.seeds), together):
                keys.append((n, architecture))
                tasks.append(
                    {
                        "fetch": given.fetch,
                        "labels": given.labels,
                        "real": real,
                        "normalization": normalization,
                        "new_network": networks[architecture],
                        "recipe": recipe,
                        "seeds": [
                            derive(given.seed, "judge", architecture, k) for k in given.seeds[first : first + together]
                        ],
                    }
                )
    scores: list[dict[str, list[float]]] = [{architecture: [] for architecture in given.recipes} for given in jobs]
    found = fan_out(
        evaluate_networks, tasks, processes=processes, cluster=cluster, label="networks", checkpoint=checkpoint
    )
    for (n, architecture), accuracies in zip(keys, found, strict=True):
        scores[n][architecture] += accuracies
    return scores
