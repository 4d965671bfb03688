"""One call of each objective on ten images, loss and gradient, against the same written plainly.

DC and DM: the classes one after another, each with its own real batch and augmentation, on all threads; ours does
several at once on one thread each, and DM takes a thread's share of the classes through the network together. MTT:
autograd through all student steps, which keeps every one of them; ours keeps their parameter vectors and computes each
step again: a third more arithmetic, for memory that grows by a parameter vector a step alone, which is measured too.
The trajectory is a random walk from an initialization.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from benchmarks.memory import peak_mib
from benchmarks.table import Row, in_turns, less_is_better, main, require_same
from ld3m.data.augment import augment, draw
from ld3m.data.dataset import class_batch
from ld3m.evaluation.experts import Experts
from ld3m.method.objectives import ClassMatching, TrajectoryMatching
from ld3m.models.networks import flat_parameters, unflatten
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime.seeds import derive, generator
from ld3m.runtime.storage import write_tensors


def plain_classes(matching: ClassMatching, images: Tensor, labels: Tensor, *, gradients: bool) -> Tensor:
    """The gradient (N, C, H, W) of DC (`gradients`) or DM, one class after another."""
    network = matching.new_network(seed=derive(matching.seed, "network", 0)).to(images).eval()
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    grad = torch.zeros_like(images)
    for label in labels.unique().tolist():
        rng = generator(matching.seed, "real", 0, label)
        chosen = class_batch(matching.split, label, count=matching.real_batch, generator=rng)
        augmentation = draw(matching.strategy, count=1, generator=rng)
        real = augment(matching.split.normalized(matching.normalization, chosen), augmentation)
        own = images[labels == label].requires_grad_()
        synthetic = augment(own, augmentation)
        if gradients:
            answers = torch.full((len(real),), label, device=images.device)
            wanted = torch.autograd.grad(cross_entropy(network(real), answers), weights)
            loss = cross_entropy(network(synthetic), answers[: len(own)])
            given = torch.autograd.grad(loss, weights, create_graph=True)
            distance = sum(_one_minus_cosine(a, b) for a, b in zip(wanted, given, strict=True))
        else:
            with torch.no_grad():
                wanted = network.features(real).mean(0)
            distance = (network.features(synthetic).mean(0) - wanted).square().sum()
        grad[labels == label] = torch.autograd.grad(distance, own)[0]
    return grad


def _one_minus_cosine(wanted: Tensor, given: Tensor) -> Tensor:
    wanted, given = wanted.flatten(1), given.flatten(1)
    return (1 - (wanted * given).sum(1) / (wanted.norm(dim=1) * given.norm(dim=1) + 1e-6)).sum()


def plain_trajectory(matching: TrajectoryMatching, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient (N, C, H, W) of MTT through one graph of all student steps."""
    rng = generator(matching.seed, "trajectory", 0)
    expert = int(torch.randint(len(matching.trajectories), (), generator=rng))
    epoch = int(torch.randint(matching.max_start_epoch, (), generator=rng))
    start, target = matching.trajectories.snapshots(expert, [epoch, epoch + matching.expert_epochs]).to(images)
    images, labels = images.detach().requires_grad_(), labels.to(images.device)
    theta = start.requires_grad_()
    for _ in range(matching.student_steps):
        index = torch.randperm(len(images), generator=rng)  # the whole set in every step
        shown = augment(images[index], draw(matching.strategy, count=len(images), generator=rng))
        logits = functional_call(matching.network, unflatten(theta, matching.network), (shown,))
        loss = cross_entropy(logits, labels[index])
        theta = theta - matching.student_lr * torch.autograd.grad(loss, theta, create_graph=True)[0]
    loss = (theta - target).square().sum() / (start.detach() - target).square().sum()
    return torch.autograd.grad(loss, images)[0]


def measure(*, smoke: bool) -> list[Row]:
    experiment = Experiment(load_params())
    device, rounds = experiment.params.on_device, 1 if smoke else 9
    images, labels = experiment.control("random_real", 1)
    rows = []
    for name in ("dc", "dm"):
        matching = experiment.objective(name)
        other = partial(plain_classes, matching, images, labels, gradients=name == "dc")
        seconds = _compared(partial(matching, images, labels, step=0), other, what=name, rounds=rounds)
        rows.append(less_is_better(f"{name}_step", "class by class", **seconds, unit="s", device=device))
    with tempfile.TemporaryDirectory() as folder:
        matching = trajectory_matching(experiment, Path(folder))
        if smoke:
            matching = replace(matching, student_steps=2)
        ours, other = partial(matching, images, labels, step=0), partial(plain_trajectory, matching, images, labels)
        seconds = _compared(ours, other, what="mtt", rounds=rounds)
        memory = {"ours": peak_mib(ours), "other": peak_mib(other)}
    steps = f"one graph of {matching.student_steps} student steps"
    rows.append(less_is_better("mtt_step", steps, **seconds, unit="s", device=device))
    rows.append(less_is_better("mtt_memory", steps, **memory, unit="MiB", device=device))
    return rows


def _compared(
    ours: Callable[[], tuple[float, Tensor]], other: Callable[[], Tensor], *, what: str, rounds: int
) -> dict[str, float]:
    require_same([ours()[1]], [other()], what=f"the gradients of {what} and of the plain way", within=1e-3)
    return in_turns({"ours": ours, "other": other}, rounds=rounds)


def trajectory_matching(experiment: Experiment, folder: Path) -> TrajectoryMatching:
    """MTT as params.yaml has it, towards an expert that took random steps of about a training's size."""
    params, given = experiment.params, experiment.params.objectives.mtt
    network = experiment.new_network(params.distill.network)(seed=0)
    begin, rng = flat_parameters(network).cpu(), generator(0, "walk")
    last = given.max_start_epoch - 1 + given.expert_epochs
    snapshots = torch.stack([begin + 0.01 * k * torch.randn(begin.shape, generator=rng) for k in range(last + 1)])
    write_tensors(folder / "expert-0000.safetensors", {"snapshots": snapshots}, {"expert": 0})
    return TrajectoryMatching(
        experiment.dataset.train,
        normalization=experiment.dataset.normalization,
        new_network=experiment.new_network(params.distill.network),
        experts=lambda last_epoch: Experts((folder / "expert-0000.safetensors",)),
        strategy=params.data.augmentation,
        threads=1,
        seed=0,
        **given.model_copy(update={"first_order": False}).options(),
    )


if __name__ == "__main__":
    main(measure)
