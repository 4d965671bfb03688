"""Judging a set of ten images: every architecture trained from several seeds and tested on all real test images.

Ours is `ld3m.evaluate.judge_all` over processes, which are started before. The plain loop takes one network after
another with a DataLoader over a TensorDataset: the same recipe and the same random streams, with the SGD, the schedule
and the averaged model of torch as they come, on one thread or on all of them. Seconds are those of one (set,
architecture) score, so of all its seeds. The accuracies of both must agree.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.table import Row, in_turns, less_is_better, main
from ld3m.augment import augment, draw
from ld3m.config import load_params
from ld3m.data import Split
from ld3m.evaluate import Judged
from ld3m.experiment import Experiment
from ld3m.seeds import derive, forked, generator

Scores = dict[str, list[float]]  # {architecture: an accuracy in [0, 1] a seed}
ALIKE = 0.01  # networks trained with other rounding end as other networks; their mean accuracy hardly moves


def plain(judged: Judged, networks: dict[str, Callable], test: TensorDataset, *, threads: int) -> Scores:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    train = TensorDataset(judged.fetch(torch.arange(len(judged.labels))), judged.labels)
    scores: Scores = {}
    for architecture, recipe in judged.recipes.items():
        seeds = [derive(judged.seed, "judge", architecture, k) for k in judged.seeds]
        trained = [_train(networks[architecture](seed=seed), train, seed=seed, **recipe) for seed in seeds]
        scores[architecture] = [_accuracy(network, test) for network in trained]
    torch.set_num_threads(before)
    return scores


def _train(
    network: nn.Module,
    train: TensorDataset,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    warm_up: bool,
    ema_decay: float,
    strategy: str,
    seed: int,
) -> nn.Module:
    device = next(network.parameters()).device
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    half = max(1, epochs // 2)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / half, total_iters=half)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, epochs - half))
    schedule = lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[half])
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    network.train()
    with forked(seed, "dropout"):
        for epoch in range(epochs):
            rng = generator(seed, "epoch", epoch)
            order = torch.randperm(len(train), generator=rng).tolist()
            for images, labels in DataLoader(train, batch_size=batch, sampler=order, generator=torch.Generator()):
                images = augment(images.to(device), draw(strategy, count=len(images), generator=rng))
                loss = cross_entropy(network(images), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            average.update_parameters(network)
    return average.module.eval()


@torch.no_grad()
def _accuracy(network: nn.Module, test: TensorDataset) -> float:
    device = next(network.parameters()).device
    loader = DataLoader(test, batch_size=256)
    right = sum((network(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in loader)
    return right / len(test)


def measure(*, smoke: bool) -> list[Row]:
    experiment = Experiment(load_params({"processes": 1} if smoke else {}))
    params, real = experiment.params, experiment.dataset.test
    images, labels = experiment.control("random_real", 1)
    judged = experiment.judged(images, labels, plain=False)
    if smoke:
        real = Split(real.uint8[:50], real.labels[:50], real.classes)
        judged = replace(judged, recipes={"convnet": judged.recipes["convnet"] | {"epochs": 2}})
    networks = {name: experiment.new_network(name) for name in judged.recipes}
    test = TensorDataset(real.images(experiment.dataset.normalization, torch.arange(len(real.labels))), real.labels)
    found: dict[str, Scores] = {}

    def kept(name: str, way: Callable[[], Scores]) -> None:
        found[name] = way()

    threads = torch.get_num_threads()
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: experiment.judge([judged], real)[0],
        "DataLoader loop, one thread": partial(plain, judged, networks, test, threads=1),
        f"DataLoader loop, {threads} threads": partial(plain, judged, networks, test, threads=threads),
    }
    brief = {name: recipe | {"epochs": 1} for name, recipe in judged.recipes.items()}
    experiment.judge([replace(judged, recipes=brief)], real)  # starts the processes
    seconds = in_turns({name: partial(kept, name, way) for name, way in ways.items()}, rounds=1)
    for name in ways.keys() - {"ours"}:
        _require_alike(found["ours"], found[name], name=name)
    each = {name: value / len(judged.recipes) for name, value in seconds.items()}
    return [
        less_is_better("evaluation", name, ours=each["ours"], other=other, unit="s a score", device=params.on_device)
        for name, other in each.items()
        if name != "ours"
    ]


def _require_alike(ours: Scores, other: Scores, *, name: str) -> None:
    for architecture, accuracies in ours.items():
        apart = abs(statistics.mean(accuracies) - statistics.mean(other[architecture]))
        print(f"  {architecture}: mean accuracies of ours and of {name} are {apart:.4f} apart", flush=True)
        if apart > ALIKE:
            raise ValueError(f"{architecture}: {accuracies} and, {name}, {other[architecture]}: not the same numbers")


if __name__ == "__main__":
    main(measure, __doc__)
