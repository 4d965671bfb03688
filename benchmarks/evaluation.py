"""Evaluating a set of ten images: every architecture trained from several seeds and tested on all real test images.

Ours is `evaluate_sets` over processes, which are started before. The plain loop takes one network after
another with a DataLoader over a TensorDataset: the same recipe and the same random streams, with the layers, the SGD,
the schedule and the averaged model of torch as they come, on one thread or on all of them. Seconds are those of one
(set, architecture) score, so of all its seeds.

Both must compute the same: after five epochs the weights of a network of every architecture have moved alike, up to
rounding, and both find the same accuracy of the same network (tests/test_benchmarks.py compares them in float64).
Hundreds of epochs later rounding has made other networks of them, whose mean accuracies are printed and may differ as
those of other seeds do.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.experts import textbook
from benchmarks.table import Row, in_turns, less_is_better, main, require_same
from ld3m.data.augment import augment, draw
from ld3m.data.dataset import Split
from ld3m.evaluation.evaluate import EvaluationJob
from ld3m.evaluation.training import accuracy, train
from ld3m.models.networks import flat_parameters
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime.seeds import derive, forked, generator

Scores = dict[str, list[float]]  # {architecture: an accuracy in [0, 1] a seed}
ALIKE = 0.15  # no recipe is so far from itself: three networks of one architecture have a standard deviation of 0.05


def plain(job: EvaluationJob, networks: dict[str, Callable], test: TensorDataset, *, threads: int) -> Scores:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    train = TensorDataset(job.fetch(torch.arange(len(job.labels))), job.labels)
    scores: Scores = {}
    for architecture, recipe in job.recipes.items():
        seeds = [derive(job.seed, "judge", architecture, k) for k in job.seeds]
        trained = [_train(textbook(networks[architecture](seed=seed)), train, seed=seed, **recipe) for seed in seeds]
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
    clip_norm: float,
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

    def ema(mean: Tensor, weight: Tensor, updates: int) -> Tensor:
        return weight + min(ema_decay, updates / (updates + 1)) * (mean - weight)

    average = AveragedModel(network, avg_fn=ema)
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
                norm = torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm()
                scale = (clip_norm / norm).clamp(max=1)
                for parameter in network.parameters():
                    parameter.grad.mul_(scale)
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


def _require_same_training(job: EvaluationJob, networks: dict[str, Callable], test: TensorDataset) -> None:
    images, labels = test.tensors
    train_set = TensorDataset(job.fetch(torch.arange(len(job.labels))), job.labels)
    for architecture, recipe in job.recipes.items():
        brief, new = recipe | {"epochs": 5}, networks[architecture]
        begin = flat_parameters(new(seed=0))
        one = train(new(seed=0), job.fetch, job.labels, seed=0, **brief)
        other = _train(textbook(new(seed=0)), train_set, seed=0, **brief)
        moved = [flat_parameters(network) - begin for network in (one, other)]
        require_same(moved[:1], moved[1:], what=f"the trainings of {architecture} of ours and of the loop", within=1e-2)
        if (found := accuracy(other, images.__getitem__, labels)) != (again := _accuracy(other, test)):
            raise ValueError(f"{architecture}: ours finds an accuracy of {found}, the loop one of {again}")


def measure(*, smoke: bool) -> list[Row]:
    experiment = Experiment(load_params({"processes": 1} if smoke else {}))
    params, real = experiment.params, experiment.dataset.test
    images, labels = experiment.control("random_real", 1)
    job = experiment.evaluation_job(images, labels)
    if smoke:
        real = Split(real.uint8[:50], real.labels[:50], real.classes)
        job = replace(job, recipes={"convnet": job.recipes["convnet"] | {"epochs": 2}})
    networks = {name: experiment.new_network(name) for name in job.recipes}
    test = TensorDataset(real.normalized(experiment.dataset.normalization, torch.arange(len(real.labels))), real.labels)
    found: dict[str, Scores] = {}

    def kept(name: str, way: Callable[[], Scores]) -> None:
        found[name] = way()

    threads = torch.get_num_threads()
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: experiment.evaluate([job], real)[0],
        "DataLoader loop, one thread": partial(plain, job, networks, test, threads=1),
        f"DataLoader loop, {threads} threads": partial(plain, job, networks, test, threads=threads),
    }
    _require_same_training(job, networks, test)
    brief = {name: recipe | {"epochs": 1} for name, recipe in job.recipes.items()}
    experiment.evaluate([replace(job, recipes=brief)], real)  # starts the processes
    seconds = in_turns({name: partial(kept, name, way) for name, way in ways.items()}, rounds=1)
    for name in ways.keys() - {"ours"}:
        _require_alike(found["ours"], found[name], name=name)
    each = {name: value / len(job.recipes) for name, value in seconds.items()}
    return [
        less_is_better("evaluation", name, ours=each["ours"], other=other, unit="s a score", device=params.on_device)
        for name, other in each.items()
        if name != "ours"
    ]


def _require_alike(ours: Scores, other: Scores, *, name: str) -> None:
    for architecture, accuracies in ours.items():
        apart = abs(statistics.mean(accuracies) - statistics.mean(other[architecture]))
        print(f"  {architecture}: mean accuracies of ours and of the {name} are {apart:.3f} apart", flush=True)
        if apart > ALIKE:
            raise ValueError(f"{architecture}: {accuracies} and, {name}, {other[architecture]}: not the same numbers")


if __name__ == "__main__":
    main(measure)
