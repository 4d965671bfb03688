"""Evaluates sets of images: networks of every architecture are trained on a set and tested on real images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ld3m.data.dataset import Dataset, Normalization, Split
from ld3m.evaluation.statistics import permutation
from ld3m.evaluation.training import accuracy, predicted, train, train_together
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.devices import network_chunk_size, test_chunk_size
from ld3m.runtime.parallel import fan_out
from ld3m.runtime.seeds import derive


@dataclass(frozen=True)
class EvaluationJob:
    """A set of images, and the networks to train on it."""

    fetch: Callable[[Tensor], Tensor]  # gives the normalized images (n, C, H, W) at some indices (n,)
    labels: Tensor  # (N,)
    recipes: dict[str, dict[str, Any]]  # {architecture: the keyword arguments of `training.train` but the seed}
    seeds: range  # one network k of each architecture for each of these
    seed: int  # network k has the seed derive(seed, "judge", architecture, k)


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
    """Train the networks of every job and test them on `real`.

    The k-th network of an architecture has the same initialization and augmentation whatever the images are, so that
    sets of the same `seed` can be compared network by network. (On CUDA several are trained together, and the dropout
    of all but the first depends on how many.)

    Parameters
    ----------
    networks
        {architecture: function that is called with `seed=...` and gives a network}
    processes, cluster
        Of `fan_out`.
    checkpoint
        Networks that an interrupted call left in it are not trained again.

    Returns
    -------
    list of dict
        For every job {architecture: [accuracy, ...]}, in [0, 1], one for each network.
    """
    keys, tasks = [], []
    for n, job in enumerate(jobs):
        for architecture, recipe in job.recipes.items():
            batch = min(recipe["batch"], len(job.labels))
            together = network_chunk_size(real.device, batch=batch, size_px=real.shape[-1])
            seeds = [derive(job.seed, "judge", architecture, k) for k in job.seeds]
            shared = {"fetch": job.fetch, "labels": job.labels, "real": real, "normalization": normalization}
            shared |= {"new_network": networks[architecture], "recipe": recipe}
            for first in range(0, len(seeds), together):
                keys.append((n, architecture))
                tasks.append(shared | {"seeds": seeds[first : first + together]})
    options = {"processes": processes, "cluster": cluster, "label": "networks", "checkpoint": checkpoint}
    scores: list[dict[str, list[float]]] = [{architecture: [] for architecture in job.recipes} for job in jobs]
    for (n, architecture), accuracies in zip(keys, fan_out(_train_and_test, tasks, **options), strict=True):
        scores[n][architecture] += accuracies
    return scores


def _train_and_test(
    fetch: Callable[[Tensor], Tensor],
    labels: Tensor,
    real: Split,
    normalization: Normalization,
    new_network: Callable[..., nn.Module],
    recipe: dict[str, Any],
    seeds: list[int],
) -> list[float]:
    trained = train_together([new_network(seed=seed) for seed in seeds], fetch, labels, seeds=seeds, **recipe)
    batch = test_chunk_size(real.device, size_px=real.shape[-1])
    return [accuracy(network, partial(real.normalized, normalization), real.labels, batch=batch) for network in trained]


def exchanged_classes(job: EvaluationJob, dataset: Dataset, new_network: Callable[..., nn.Module]) -> list[int] | None:
    """Tell whether the labels of a set are exchanged, by one network of the first architecture of `job` trained on it.

    Returns the class that it sees in the real validation images of each class, or None where none are clearly
    exchanged: see `statistics.permutation`.
    """
    architecture, recipe = next(iter(job.recipes.items()))
    real, seed = dataset.validation, derive(job.seed, "judge", architecture, job.seeds[0])
    network = train(new_network(seed=seed), job.fetch, job.labels, seed=seed, **recipe)
    batch = test_chunk_size(real.device, size_px=real.shape[-1])
    seen = predicted(network, partial(real.normalized, dataset.normalization), len(real), batch=batch)
    classes = len(real.classes)
    return permutation(torch.bincount(real.labels * classes + seen, minlength=classes**2).view(classes, classes))
