"""Estimates how long the stages of params.yaml take on this machine, from three real iterations of each kind of work.

    python -m ld3m.pipeline.estimate                  # params.yaml as it is
    python -m ld3m.pipeline.estimate imagenet128      # with profiles applied: names in profiles/, or files

Weights are random, and so are data that are missing; nothing is downloaded. An ablation's setting counts as the
baseline does. Not counted are seconds each: decoding, checks of the priors, images of controls, gradient norms, tables,
and the start of a stage.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from math import ceil
from operator import attrgetter
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor

from ld3m.data.dataset import Dataset, Normalization, Split
from ld3m.evaluation.experts import Experts
from ld3m.evaluation.training import accuracy, train
from ld3m.models.compvis import build as build_cin256
from ld3m.models.diffusion_prior import Prior
from ld3m.models.gan import Generator
from ld3m.models.networks import flat_parameters
from ld3m.models.prior_io import load_prior
from ld3m.models.prior_variants import with_classes
from ld3m.models.train_gan import fit_gan
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser
from ld3m.pipeline.cells import cells
from ld3m.pipeline.experiment import Experiment, shared
from ld3m.pipeline.profiles import PARAMS, apply_profiles, load_params
from ld3m.runtime.devices import describe
from ld3m.runtime.memory import OutOfMemory, explain_out_of_memory, forget_peak, peak_gib
from ld3m.runtime.progress import silent
from ld3m.runtime.seeds import generator

ITERATIONS = 3
Kind = tuple  # of work: a function of the experiment that returns seconds, and its other arguments
Stage = tuple[str, str, tuple[str, ...], list[tuple[int, Kind]]]  # name, table, keys that lower its memory, its work


class StandIns(Experiment):
    """The experiment with random weights, and random data where they are missing."""

    @shared
    def dataset(self) -> Dataset:
        with suppress(FileNotFoundError):
            return super().dataset
        given, rng = self.params.data, generator(0, "estimate")
        names = given.classes if isinstance(given.classes, tuple) else tuple(map(str, range(10)))
        shape = (64, given.channels, given.size_px, given.size_px)
        stored = torch.randint(256, shape, dtype=torch.uint8, generator=rng).to(self.params.on_device)
        indices = (torch.arange(count * len(names)) for count in (1170, 130, 50))  # images a class of ImageNet
        splits = (Split(stored, k % len(names), names, rows=k % 64) for k in indices)
        return Dataset(self.params.dataset, *splits, Normalization((0.5,) * given.channels, (0.25,) * given.channels))

    @shared
    def prior(self) -> Prior:
        if self.params.prior.source is None:
            return self.launched(self.new_prior().freeze_())
        try:
            prior = load_prior(self.params.prior.source)
        except FileNotFoundError:
            prior = build_cin256(seed=0)  # of the size of the paper's prior
        return self.launched(with_classes(prior, range(len(self.dataset.train.classes))))

    @shared
    def gan(self) -> Generator:
        return self.new_gan().freeze_()

    def experts(self, *, last_epoch: int) -> "RandomExperts":
        return RandomExperts([flat_parameters(self.new_network(self.params.distill.network)(seed=0))])


class RandomExperts(list):
    """The flat weights (P,) of untrained networks in place of experts."""

    approach = Experts.approach

    def snapshots(self, expert: int, epochs: list[int]) -> Tensor:
        return torch.stack([(1 + epoch) * self[expert] for epoch in epochs])


def clock(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes, on the device too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def step_seconds(training: Callable[[int], Callable[[], object]], *, steps: int = ITERATIONS) -> float:
    """Time a step of `training(steps)`, which prepares a training of so many. What its start takes is subtracted."""
    steps *= 10 if torch.cuda.is_initialized() else 1  # each training records a CUDA graph, in a varying time
    with silent():
        short, long = min(clock(training(1)) for _ in range(2)), clock(training(1 + steps))
    return max(1e-9, long - short) / steps


def prior_seconds(experiment: StandIns, part: str) -> float:
    """Time a step of training "prior.autoencoder", "prior.denoiser" or "gan", on all threads as dvc.yaml has it."""
    fit, new, changes = {
        "prior.autoencoder": (fit_autoencoder, experiment.new_prior, {"continuous_steps": 0}),
        "prior.denoiser": (fit_denoiser, experiment.new_prior, {}),
        "gan": (fit_gan, experiment.new_gan, {}),
    }[part]
    given, train = attrgetter(part)(experiment.params), experiment.dataset.train
    split = replace(train, labels=train.labels[:64], rows=torch.arange(64) if train.rows is None else train.rows[:64])
    options, steps = given.training() | changes | {"seed": 0}, getattr(given, "r1_every", ITERATIONS)  # with a penalty
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        return step_seconds(lambda count: partial(fit, new(), split, **options | {"steps": count}), steps=steps)
    finally:
        torch.set_num_threads(1)


def iteration_seconds(experiment: StandIns, objective: str, space: str, ipc: int, prior: str) -> float:
    """Time an iteration of distillation: render, match, backward."""
    synthetic, matching = experiment.synthetic(space, ipc, prior=prior), experiment.objective(objective)

    def iterate() -> None:
        images = synthetic.render(step=0)
        images.backward(matching(images.detach(), synthetic.labels, step=0)[1])

    return min(clock(iterate) for _ in range(ITERATIONS))  # the first is slower


def network_seconds(experiment: StandIns, name: str, images: int, epochs: int, batch: int) -> float:
    """Time training a network on so many images and its test, where `processes` of them are trained side by side."""
    params, dataset, batch = experiment.params, experiment.dataset, min(images, batch)
    network, recipe = experiment.new_network(name)(seed=0), params.recipe(name, 1) | {"batch": batch, "seed": 0}
    x = torch.randn((batch, *dataset.train.shape), generator=generator(0, "estimate")).to(params.on_device)
    labels = torch.arange(batch) % len(dataset.train.classes)
    step = step_seconds(lambda count: partial(train, network, x.__getitem__, labels, **recipe | {"epochs": count}))
    test = min(clock(lambda: accuracy(network, x.__getitem__, labels)) for _ in range(2))
    return (epochs * ceil(images / batch) * step + len(dataset.test.labels) / batch * test) / params.processes


def stages(experiment: StandIns) -> Iterator[Stage]:
    """Yield every stage before the tables that takes more than seconds."""
    params, train_set = experiment.params, experiment.dataset.train

    def network(name: str, ipc: int) -> Kind:
        recipe, images = params.recipe(name, ipc), ipc * len(train_set.classes) or len(train_set.labels)
        return network_seconds, name, images, recipe["epochs"], recipe["batch"]

    parts = ["prior.autoencoder", "prior.denoiser", "gan"]
    for part in parts[2 if params.prior.source else 1 if params.prior.autoencoder.source else 0 :]:
        yield part, "prior", (f"{part}.batch",), [(attrgetter(part)(params).steps, (prior_seconds, part))]
    given, seen = params.trajectories, params.distill.network
    expert = network_seconds, seen, len(train_set.labels), given.epochs, given.batch
    yield "trajectories", "main", ("trajectories.batch",), [(given.experts, expert)]
    checks = (1 + params.distill.validation_checks) * params.distill.validation_seeds
    for cell in cells(params):
        if cell.objective != "none":
            runs, iterations = len(cell.runs), params.budget(*cell.row, iterations=cell.iterations).iterations
            iteration, check = (iteration_seconds, *cell.row, cell.prior), network(seen, cell.ipc)
            lower, work = params.lowers_memory(*cell.row[:2]), [(runs * iterations, iteration), (runs * checks, check)]
            yield f"distill {cell.key}", cell.table, lower, work
        count = sum(map(params.networks_a_set, cell.runs))
        work = [(count, network(name, cell.ipc)) for name in params.architectures]
        yield f"evaluate {cell.key}", cell.table, ("evaluate.recipe.batch", "processes"), work
    given, budget = params.ablations, params.budget("dm", "ld3m").iterations
    settings = 1 + sum(changes != {} for of in given.settings.values() for changes in of.values())  # one baseline
    settings *= given.runs
    work = [(settings * (given.iterations or budget), (iteration_seconds, "dm", "ld3m", 1, "prior"))]
    work += [(settings * given.seeds, network(name, 1)) for name in given.architecture]
    yield "ablations", "report", params.lowers_memory("dm", "ld3m"), work


def estimate(experiment: StandIns) -> None:
    """Print a row for every stage as soon as it is timed, and the sums. Too little memory for a stage is a row too."""
    sums: Counter[str] = Counter()
    print(f"{experiment.params.dataset} on {describe(experiment.params.on_device)}; memory is that of one process")

    @cache
    def timed(function: Callable[..., float], *arguments: object) -> tuple[float, float]:
        forget_peak()
        return function(experiment, *arguments), peak_gib()

    for name, table, lower, work in stages(experiment):
        try:
            with explain_out_of_memory(*lower):
                found = [(count, *timed(*call)) for count, call in work]
        except OutOfMemory as problem:
            print(f"{name:<32} {problem.strerror}", flush=True)
            continue
        seconds = sum(count * each for count, each, _ in found)
        sums[table] += seconds
        print(f"{name:<32} {seconds:>9,.0f} s {max(gib for *_, gib in found):>8.2f} GiB  {table}", flush=True)
    print("; ".join(f"{table}: {seconds / 60:,.0f} min" for table, seconds in sums.items()))


def main(profiles: list[str]) -> None:
    torch.set_num_threads(1)
    constants.HF_HUB_OFFLINE = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PARAMS.name if profiles else PARAMS
        if profiles:
            apply_profiles(*profiles, path=file)
        params = load_params(path=file)
    estimate(StandIns(params))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
