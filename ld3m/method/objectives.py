"""What is matched: weight gradients (DC), feature means (DM) or training trajectories (MTT).

An objective is called as `objective(images, labels, step=step) -> (loss, grad_images)` with images (N, C, H, W) and
labels (N,); it may have `learnables` of its own, whose `.grad` the call sets. Every random draw is named by
(seed, purpose, step), so any step can be repeated.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ld3m.data.augment import Augmentation, augment, augment_each, draw
from ld3m.data.dataset import Normalization, Split, class_batch
from ld3m.models.networks import unflatten
from ld3m.runtime.seeds import derive, generator

AT_ONCE_PX = 2**20  # 1024 images of 32 px, 64 of 128 px
CLASSES_AT_ONCE = 5


class Experts(Protocol):
    """Trajectories of networks trained on real images."""

    def __len__(self) -> int: ...
    def snapshots(self, expert: int, epochs: list[int]) -> Tensor:
        """The flat parameters (len(epochs), P) after some epochs of one expert."""


Distance = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]


def gradient_distance(
    network: nn.Module, real: Tensor, real_labels: Tensor, synthetic: Tensor, labels: Tensor
) -> Tensor:
    """DC: one minus the cosine of the weight gradients, summed over the output channels of every layer.

    Biases and norms are left out. Differentiable in `synthetic`.
    """
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    parts = []
    at_once = real_chunk_size(real.shape)
    for images, answers in zip(real.split(at_once), real_labels.split(at_once), strict=True):
        loss = len(images) / len(real) * cross_entropy(network(images), answers)
        parts.append(torch.autograd.grad(loss, weights))
    wanted = [sum(g_real) for g_real in zip(*parts, strict=True)]
    given = torch.autograd.grad(cross_entropy(network(synthetic), labels), weights, create_graph=True)
    return sum(_channel_distance(g_real, g) for g_real, g in zip(wanted, given, strict=True))


def _channel_distance(g_real: Tensor, g: Tensor) -> Tensor:
    g_real, g = g_real.flatten(1), g.flatten(1)  # (output channels, inputs)
    return (1 - (g_real * g).sum(1) / (g_real.norm(dim=1) * g.norm(dim=1) + 1e-6)).sum()


def feature_distance(
    network: nn.Module, real: Tensor, real_labels: Tensor, synthetic: Tensor, labels: Tensor
) -> Tensor:
    """DM: the squared distance between the feature means of a class, summed over the classes, which both sides have.

    Differentiable in `synthetic`.
    """
    with torch.no_grad():
        parts = [network.features(images) for images in real.split(real_chunk_size(real.shape))]
        wanted = _class_means(torch.cat(parts), real_labels)
    return (_class_means(network.features(synthetic), labels) - wanted).square().sum()


def _class_means(features: Tensor, labels: Tensor) -> Tensor:
    """(classes that there are, F) of features (n, F)."""
    members = (labels.unique()[:, None] == labels).to(features)
    return members / members.sum(1, keepdim=True) @ features


def real_chunk_size(shape: tuple[int, ...]) -> int:
    """How many real images (C, H, W) go through a network at once, so that memory does not grow with their number."""
    return max(1, AT_ONCE_PX // (shape[-2] * shape[-1]))


DISTANCES: dict[str, Distance] = {"dc": gradient_distance, "dm": feature_distance}


def class_chunk_size(distance: str, *, real_batch: int, size_px: int) -> int:
    """How many classes to take through the network in one pass: for DM several, as far as memory allows, but few enough
    for threads to share them. DC needs the gradient of every class."""
    return 1 if distance == "dc" else max(1, min(CLASSES_AT_ONCE, AT_ONCE_PX // (real_batch * size_px**2)))


@dataclass(frozen=True)
class ClassMatching:
    """DC and DM: the sum over classes of a distance in a freshly initialised network.

    `threads` groups of `class_chunk_size` classes are in work, and in memory, at once; each runs on one thread, so the
    number of threads changes no bit. Real and synthetic images of a class share one augmentation (Siamese).
    """

    distance: Distance
    split: Split
    normalization: Normalization
    new_network: Callable[..., nn.Module]  # called with seed=...
    real_batch: int  # real images per class and step
    strategy: str
    threads: int
    seed: int
    class_chunk_size: int = 1
    learnables: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[float, Tensor]:
        network = self.new_network(seed=derive(self.seed, "network", step)).to(images).eval()
        of_classes = partial(self._of_classes, network, images.detach(), labels, step)
        loss, grad_images = 0.0, torch.zeros_like(images)
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for index, distance, grad in pool.map(of_classes, labels.unique().split(self.class_chunk_size)):
                loss += distance
                grad_images[index] = grad
        return loss, grad_images

    def _of_classes(
        self, network: nn.Module, images: Tensor, labels: Tensor, step: int, classes: Tensor
    ) -> tuple[Tensor, float, Tensor]:
        """Where the images of some classes are, their distance to the real ones, and its gradient for them."""
        members, chosen, augmentations = [], [], []
        for label in classes.tolist():
            rng = generator(self.seed, "real", step, label)
            members.append((labels == label).nonzero().squeeze(1))
            chosen.append(class_batch(self.split, label, count=self.real_batch, generator=rng))
            augmentations.append(draw(self.strategy, count=1, generator=rng))
        index, real_index = torch.cat(members), torch.cat(chosen)
        real = self.split.normalized(self.normalization, real_index).to(images)
        synthetic = images[index].requires_grad_()
        distance = self.distance(
            network,
            augment_each(real, [len(part) for part in chosen], augmentations),
            self.split.labels[real_index].to(images.device),
            augment_each(synthetic, [len(part) for part in members], augmentations),
            labels[index].to(images.device),
        )
        return index, distance.item(), torch.autograd.grad(distance, synthetic)[0]


@dataclass(frozen=True)
class TrajectoryMatching:
    """MTT: a student trained on the synthetic images from an expert's snapshot shall end at a later snapshot.

    `student_lr` is a scalar tensor, learned with the images.
    """

    experts: Experts
    network: nn.Module
    student_lr: Tensor
    student_steps: int
    expert_epochs: int  # between the two snapshots
    max_start_epoch: int  # start epochs are 0 .. max_start_epoch - 1
    student_batch: int | None  # images per student step; None is the whole set
    strategy: str
    first_order: bool
    seed: int

    @property
    def learnables(self) -> dict[str, Tensor]:
        return {"student_lr": self.student_lr}

    def __call__(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[float, Tensor]:
        rng = generator(self.seed, "trajectory", step)
        expert = int(torch.randint(len(self.experts), (), generator=rng))
        epoch = int(torch.randint(self.max_start_epoch, (), generator=rng))
        theta_start, theta_target = self.experts.snapshots(expert, [epoch, epoch + self.expert_epochs]).to(images)
        batch = min(self.student_batch or len(images), len(images))
        plan = [
            (torch.randperm(len(images), generator=rng)[:batch], draw(self.strategy, count=1, generator=rng))
            for _ in range(self.student_steps)
        ]
        loss, grad_images, grad_lr = match_trajectory(
            self.network.eval(),  # dropout would make the recomputed steps others than the first
            images,
            labels,
            self.student_lr.detach(),
            theta_start,
            theta_target,
            plan=plan,
            first_order=self.first_order,
        )
        self.student_lr.grad = grad_lr
        return loss, grad_images


def match_trajectory(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    theta_start: Tensor,
    theta_target: Tensor,
    *,
    plan: list[tuple[Tensor, Augmentation]],
    first_order: bool,
) -> tuple[float, Tensor, Tensor]:
    """Loss |theta_S - theta*|^2 / |theta_0 - theta*|^2 with its gradients for the images and the student's rate.

    `plan` holds the image indices and the augmentation of every student step. The forward pass keeps the flat
    parameter vectors alone; the backward pass recomputes one step at a time, with v = dL/dtheta_s:

        theta_{s+1} = theta_s - lr g(theta_s, x)
        dL/dx  -= lr d(v g)/dx,    dL/dlr -= v g,    v -= lr d(v g)/dtheta_s

    `first_order` leaves v as it is (TESLA's approximation: later steps do not see earlier images).
    """
    thetas, labels = [theta_start], labels.to(images.device)
    for index, augmentation in plan:
        theta = thetas[-1].detach().requires_grad_()
        g = _student_gradient(network, theta, augment(images[index], augmentation), labels[index], create_graph=False)
        thetas.append(theta.detach() - lr * g)
    scale = (theta_start - theta_target).square().sum()
    loss = (thetas[-1] - theta_target).square().sum() / scale
    v = 2 * (thetas[-1] - theta_target) / scale
    grad_images, grad_lr = torch.zeros_like(images), torch.zeros_like(lr)
    for (index, augmentation), theta in zip(reversed(plan), reversed(thetas[:-1]), strict=True):
        x = images[index].detach().requires_grad_()
        theta = theta.detach().requires_grad_()
        g = _student_gradient(network, theta, augment(x, augmentation), labels[index], create_graph=True)
        vg = (v * g).sum()
        grad_x, *grad_theta = torch.autograd.grad(vg, [x] if first_order else [x, theta])
        grad_images[index] -= lr * grad_x
        grad_lr -= vg.detach()
        if not first_order:
            v = v - lr * grad_theta[0]
    return loss.item(), grad_images, grad_lr


def _student_gradient(
    network: nn.Module, theta: Tensor, images: Tensor, labels: Tensor, *, create_graph: bool
) -> Tensor:
    logits = functional_call(network, unflatten(theta, network), (images,))
    return torch.autograd.grad(cross_entropy(logits, labels), theta, create_graph=create_graph)[0]
