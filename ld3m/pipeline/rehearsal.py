"""A few iterations of everything that an experiment does, timed: by the real code, on what is there or on stand-ins."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ld3m.data.dataset import Dataset, Normalization, Split
from ld3m.evaluation.training import accuracy, train
from ld3m.method.distill import Synthetic
from ld3m.method.objectives import DISTANCES, real_chunk_size
from ld3m.models.compvis import build_full_size
from ld3m.models.diffusion_prior import IncompatiblePrior, Prior, build_prior, with_classes
from ld3m.models.gan import Generator, build_generator
from ld3m.models.networks import flat_parameters
from ld3m.models.prior_io import load_prior
from ld3m.models.train_gan import GROUP, fit_gan
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.measure import Line, Plane, clock, grow, grow_plane
from ld3m.runtime.devices import test_chunk_size
from ld3m.runtime.parallel import fan_out
from ld3m.runtime.progress import silent
from ld3m.runtime.seeds import generator

COUNTS = {"train": 1170, "validation": 130, "test": 50}  # images a class of ImageNet, where the data are not there
CLASSES = 10  # and as many classes, where params.yaml does not say
LIKELY = "cin256-v2"  # the paper's prior, where that of `prior.source` is not there
STORED = 64  # random images that stand for any number of them
STEPS = 3  # of a training, less one, when a step is timed


@dataclass(frozen=True)
class RandomExperts:
    """Snapshots of no training."""

    parameters: int

    def __len__(self) -> int:
        return 1

    def snapshots(self, expert: int, epochs: list[int]) -> Tensor:
        return drawn((len(epochs), self.parameters), "cpu") / 100


@dataclass(frozen=True)
class Rehearsal(Experiment):
    """The experiment with random images and weights for what is not there."""

    @classmethod
    def of(cls, experiment: Experiment) -> "Rehearsal":
        """With what the experiment has loaded already."""
        rehearsal = cls(experiment.params)
        vars(rehearsal).update(vars(experiment))
        return rehearsal

    @cached_property
    def absent(self) -> dict[str, str]:
        """What stand-ins are used in the place of, and why."""
        return {}

    @cached_property
    def dataset(self) -> Dataset:
        try:
            return Experiment.dataset.func(self)
        except FileNotFoundError:
            given = self.params.data
            count = len(given.classes) if isinstance(given.classes, tuple) else CLASSES
            each = ", ".join(f"{images} of {split}" for split, images in COUNTS.items())
            self.absent["data"] = f"the data are not here: counted are {count} classes of {each} images each"
            splits = {name: self.random_split(images * count, classes=count) for name, images in COUNTS.items()}
            plain = Normalization((0.5,) * given.channels, (0.25,) * given.channels)
            return Dataset(self.params.dataset, normalization=plain, **splits)

    def random_split(self, count: int, *, classes: int) -> Split:
        """A split of `count` images, the classes in turn, of which some are in memory."""
        given = self.params.data
        shape = (min(count, STORED), given.channels, given.size_px, given.size_px)
        stored = (255 * drawn(shape, self.params.on_device)).byte()
        every = torch.arange(count)
        return Split(stored, every % classes, tuple(map(str, range(classes))), rows=every % len(stored))

    @cached_property
    def prior(self) -> Prior:
        try:
            return Experiment.prior.func(self)
        except (FileNotFoundError, IncompatiblePrior) as problem:  # a broken one is an error here too
            prior, kind = self._in_its_place()
            self.absent["prior"] = f"{kind} in the place of the prior: {re.split('[.;] ', str(problem))[0]}"
        return self.launched(prior.freeze_())

    def _in_its_place(self) -> tuple[Prior, str]:
        """A prior like the one that the stage `prior` is to make or to link to, and what it is. Which of its classes
        the data have costs the same."""
        count, given, source = len(self.dataset.train.classes), self.params.data, self.params.prior.source
        if source is None:
            return self.new_prior(), "random weights"
        try:
            prior, kind = load_prior(source), source
        except FileNotFoundError:
            prior, kind = build_full_size(LIKELY, seed=0), f"random weights of {LIKELY}'s size"
        prior.check(size_px=given.size_px, channels=given.channels, classes=prior.classes)
        return with_classes(prior, range(count)), kind

    @cached_property
    def gan(self) -> Generator:
        try:
            return Experiment.gan.func(self)
        except (FileNotFoundError, ValueError) as problem:
            self.absent["gan"] = f"random weights in the place of the GAN: {re.split('[.;] ', str(problem))[0]}"
            return self.new_gan().freeze_()

    def experts(self) -> RandomExperts:
        return RandomExperts(len(flat_parameters(self.new_network(self.params.distill.network)(seed=0))))

    def initial(self, ipc: int) -> tuple[Tensor, Tensor]:
        """One image, whatever `ipc` is: a set that is tried has copies of it."""
        first = torch.zeros(1, dtype=torch.int64)
        return self.dataset.train.x(first), self.dataset.train.labels[first]

    def new_prior(self) -> Prior:
        """As the stage `prior` begins with."""
        given = self.params.prior_arguments()
        return build_prior(classes=len(self.dataset.train.classes), **given).to(self.params.on_device)

    def new_gan(self) -> Generator:
        given = self.params.gan_arguments()
        return build_generator(classes=len(self.dataset.train.classes), **given).to(self.params.on_device)

    def learned(self, space: str) -> int:
        """Numbers that are learned of an image."""
        return sum(tensor.numel() for tensor in self.synthetic(space, 1).learnables.values())

    def rendering(self, space: str, *, width: int) -> Plane:
        """Rendering images forward and backward, `width` at once, by steps of the chain (1 where there is none)."""

        def work(count: int, steps: int) -> float:
            one = self.synthetic(space, 1, **({"steps": steps} if space == "ld3m" else {}))
            codes = copies(one, count)

            def render() -> None:
                rendered = codes.render(step=0)
                rendered.backward(torch.ones_like(rendered))

            return clock(render)

        depth = getattr(getattr(self.params.spaces, space), "steps", 1)
        return grow_plane(work, width=width, depth=depth, at_once=width, device=self.params.on_device)

    def matching(self, name: str, *, ipc: int) -> Plane:
        """One call of an objective: real images of a class by rounds of as many classes as are in work at once; for MTT
        synthetic images by steps of the student."""
        classes = len(self.dataset.train.classes)
        objective = self.objective(name)

        def call(matched: Any, labels: Tensor) -> float:
            images = drawn((len(labels), *self.dataset.train.shape), self.params.on_device)
            return clock(lambda: matched(images, labels, step=0))

        if name in DISTANCES:
            a_round = objective.threads * objective.class_chunk_size
            width, depth = objective.real_batch, ceil(classes / a_round)
            at_once = real_chunk_size(self.dataset.train.shape)

            def work(real: int, rounds: int) -> float:
                labels = torch.arange(min(classes, rounds * a_round)).repeat_interleave(ipc)
                return call(replace(objective, real_batch=real), labels)
        else:
            width = min(objective.student_batch or classes * ipc, classes * ipc)
            at_once, depth = width, objective.student_steps

            def work(images: int, steps: int) -> float:
                return call(replace(objective, student_steps=steps), torch.arange(images) % classes)

        return grow_plane(work, width=width, depth=depth, at_once=at_once, device=self.params.on_device)

    def prior_training(self) -> tuple[Line, Line]:
        """Steps of the autoencoder and of the denoiser, by images in a batch."""
        given, seed = self.params.prior, self.params.seed
        side = self.params.prior_arguments()["latent_size"]
        split = self.random_split(ceil(given.autoencoder.codebook / side**2), classes=1)  # as the codebook starts from

        def autoencoder(steps: int, batch: int) -> Callable[[], Any]:
            training = given.autoencoder.training() | {"steps": steps, "batch": batch, "continuous_steps": 0}
            prior = self.new_prior()
            return lambda: fit_autoencoder(prior, split, **training, seed=seed)

        def denoiser(steps: int, batch: int) -> Callable[[], Any]:
            training = given.denoiser.training() | {"steps": steps, "batch": batch}
            prior = self.new_prior().in_precision(given.precision)
            return lambda: fit_denoiser(prior, split, **training, seed=seed)

        grown = dict(device=self.params.on_device)
        return (
            grow(lambda batch: a_step(autoencoder, batch), full=given.autoencoder.batch, **grown),
            grow(lambda batch: a_step(denoiser, batch), full=given.denoiser.batch, **grown),
        )

    def gan_training(self) -> Line:
        """A step of the GAN, by groups of images in a batch."""
        given = self.params.gan
        split = self.random_split(STORED, classes=len(self.dataset.train.classes))

        def training(steps: int, groups: int) -> Callable[[], Any]:
            changed = given.training() | {"steps": steps, "batch": groups * GROUP}
            gan = self.new_gan()
            return lambda: fit_gan(gan, split, **changed, seed=self.params.seed)

        longer = 1 + given.r1_every  # the penalty is paid once in so many steps
        work = lambda groups: a_step(training, groups, longer)  # noqa: E731
        return grow(work, full=given.batch // GROUP, device=self.params.on_device)

    def networks(self, architectures: Sequence[str], *, batch: int) -> dict[str, tuple[Line, Line]]:
        """Steps of training, by images in a batch, and tests, by images, of each architecture; as many at once, and in
        such processes, as when sets are judged."""
        tasks = [
            {
                "new_network": self.new_network(name),
                "recipe": self.params.recipe(name, 1),
                "shape": self.dataset.train.shape,
                "device": self.params.on_device,
                "batch": batch,
            }
            for name in architectures
        ]
        with silent():
            lines = fan_out(_network, tasks, processes=self.params.processes, label="networks")
        return dict(zip(architectures, lines, strict=True))


def drawn(shape: tuple[int, ...], device: str) -> Tensor:
    """Numbers in [0, 1), the same every time."""
    return torch.rand(shape, generator=generator(0, "rehearsal")).to(device)


def copies(one: Synthetic, count: int) -> Synthetic:
    """A set of `count` images like the one image of a set."""
    index = torch.zeros(count, dtype=torch.int64)
    learnables = {name: tensor.detach()[index].requires_grad_() for name, tensor in one.learnables.items()}
    fixed = {"fixed": {name: tensor[index] for name, tensor in one.fixed.items()}} if hasattr(one, "fixed") else {}
    return replace(one, labels=one.labels[index], learnables=learnables, **fixed)


def a_step(training: Callable[[int, int], Callable[[], Any]], batch: int, longer: int = STEPS) -> float:
    """Seconds of a step of `training(steps, batch)`: what `longer` steps take more than one does. On CUDA more steps,
    for each training records its own, which scatters."""
    longer *= 10 if torch.cuda.is_initialized() else 1
    with silent():
        short, long = (clock(training(steps, batch)) for steps in (1, longer))
    return max(long - short, 1e-9) / (longer - 1)


def _network(
    new_network: Callable[..., nn.Module],
    recipe: dict[str, Any],
    *,
    shape: tuple[int, ...],
    device: str,
    batch: int,
) -> tuple[Line, Line]:
    network = new_network(seed=0)

    def images(count: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        return drawn((count, *shape), device).__getitem__, torch.zeros(count, dtype=torch.int64)

    def training(epochs: int, count: int) -> Callable[[], Any]:
        changed, given = recipe | {"epochs": epochs, "batch": count}, images(count)
        return lambda: train(network, *given, **changed, seed=0)

    def test(count: int) -> float:
        given = images(count)
        return clock(lambda: accuracy(network, *given, batch=count))

    return (
        grow(lambda count: a_step(training, count), full=batch, device=device),
        grow(test, full=test_chunk_size(device, size_px=shape[-1]), device=device),
    )
