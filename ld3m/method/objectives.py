"""What is matched: weight gradients (DC), feature means (DM) or training trajectories (MTT).

`OBJECTIVES` names the classes. An objective is called as `objective(images, labels, step=step)` with normalized images
(N, C, H, W) and labels (N,), and returns the loss and its gradient for the images; the call sets the `.grad` of its own
`learnables`, if any. Every random draw is named by (seed, purpose, step), so any step can be repeated.

DC and DM sum a distance between real and synthetic images over the classes, in another network in every step, freshly
initialized or trained a little. They differ in that distance, `gradient_distance` or `feature_distance`.
"""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ld3m.data.augment import Augmentation, augment, augment_each, draw
from ld3m.data.dataset import Normalization, Split, class_batch
from ld3m.models.networks import unflatten
from ld3m.runtime.chunked import thread_map
from ld3m.runtime.seeds import derive, generator

AT_ONCE_PX = 2**20  # 1024 images of 32 px, 64 of 128 px

Distance = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]


def gradient_distance(
    network: nn.Module, real: Tensor, real_labels: Tensor, synthetic: Tensor, labels: Tensor
) -> Tensor:
    """DC: 1 - cos(gradient on real images, gradient on synthetic ones), summed over the output channels of all layers.

    Gradients are those of the cross-entropy for the weights, without biases and norms.

    Parameters
    ----------
    real, synthetic
        Normalized images (n, C, H, W) and (m, C, H, W), of the classes `real_labels` (n,) and `labels` (m,).

    Returns
    -------
    Tensor
        The distance (), differentiable in `synthetic`.
    """
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    parts = []
    at_once = real_chunk_size(real.shape)
    for images, targets in zip(real.split(at_once), real_labels.split(at_once), strict=True):
        loss = len(images) / len(real) * cross_entropy(network(images), targets)
        parts.append(torch.autograd.grad(loss, weights))
    gs_real = [sum(g_parts) for g_parts in zip(*parts, strict=True)]
    gs = torch.autograd.grad(cross_entropy(network(synthetic), labels), weights, create_graph=True)
    return sum(_channel_distance(g_real, g) for g_real, g in zip(gs_real, gs, strict=True))


def _channel_distance(g_real: Tensor, g: Tensor) -> Tensor:
    g_real, g = g_real.flatten(1), g.flatten(1)  # (output channels, inputs)
    return (1 - (g_real * g).sum(1) / (g_real.norm(dim=1) * g.norm(dim=1) + 1e-6)).sum()


def feature_distance(
    network: nn.Module, real: Tensor, real_labels: Tensor, synthetic: Tensor, labels: Tensor
) -> Tensor:
    """DM: |mean feature of real images - mean feature of synthetic ones|^2, summed over the classes.

    Both sides have the same classes. Arguments and result are those of `gradient_distance`.
    """
    with torch.no_grad():
        parts = [network.features(images) for images in real.split(real_chunk_size(real.shape))]
        means_real = _class_means(torch.cat(parts), real_labels)
    return (_class_means(network.features(synthetic), labels) - means_real).square().sum()


def _class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Mean features (classes present, F) of features (n, F)."""
    members = (labels.unique()[:, None] == labels).to(features)
    return members / members.sum(1, keepdim=True) @ features


def real_chunk_size(shape: tuple[int, ...]) -> int:
    """How many real images (C, H, W) go through a network at once, so that memory does not grow with their number."""
    return max(1, AT_ONCE_PX // (shape[-2] * shape[-1]))


@dataclass(frozen=True)
class ClassMatching:
    """DC and DM: the sum over classes of a distance in a network that is new in every step.

    Real and synthetic images of a class share one augmentation (Siamese). Groups of classes are matched in threads of
    one core each; the number of threads changes no bit.
    """

    learnables: ClassVar[dict[str, Tensor]] = {}
    split: Split  # the real images
    _: KW_ONLY
    distance: Distance
    most_classes: int  # that go through the network together, as far as memory allows
    normalization: Normalization
    new_network: Callable[..., nn.Module]  # called with seed=...
    experts: Callable[..., Any]  # as those of `TrajectoryMatching`
    strategy: str  # of the augmentation
    threads: int
    seed: int
    real_batch: int  # real images of a class in a step
    trained_epochs: int = 0  # of the expert whose weights the random ones approach (IDC, DANCE); 0: they do not

    @property
    def class_chunk_size(self) -> int:
        return max(1, min(self.most_classes, AT_ONCE_PX // (self.real_batch * self.split.shape[-1] ** 2)))

    def __call__(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[float, Tensor]:
        network = self.new_network(seed=derive(self.seed, "network", step)).to(images).eval()
        if epoch := self.trained_epochs:
            self.experts(last_epoch=epoch).approach(network, epoch=epoch, rng=generator(self.seed, "trained", step))
        of_classes = partial(self._of_classes, network, images.detach(), labels, step)
        loss, grad_images = 0.0, torch.zeros_like(images)
        chunks = labels.unique().split(self.class_chunk_size)
        for index, distance, grad in thread_map(of_classes, chunks, threads=self.threads):
            loss += distance
            grad_images[index] = grad
        return loss, grad_images

    def _of_classes(
        self, network: nn.Module, images: Tensor, labels: Tensor, step: int, classes: Tensor
    ) -> tuple[Tensor, float, Tensor]:
        """Indices of the images of some classes, their distance to real ones, and its gradient for them."""
        members, chosen, augmentations = [], [], []
        for label in classes.tolist():
            rng = generator(self.seed, "real", step, label)
            members.append((labels == label).nonzero().squeeze(1))
            chosen.append(class_batch(self.split, label, count=self.real_batch, generator=rng))
            augmentations.append(draw(self.strategy, count=1, generator=rng))
        index, real_index = torch.cat(members), torch.cat(chosen)
        real = self.split.normalized(self.normalization, real_index).to(images)
        real = augment_each(real, [*map(len, chosen)], augmentations)
        learned = images[index].requires_grad_()
        synthetic = augment_each(learned, [*map(len, members)], augmentations)
        real_targets, targets = (of.to(images.device) for of in (self.split.labels[real_index], labels[index]))
        distance = self.distance(network, real, real_targets, synthetic, targets)
        return index, distance.item(), torch.autograd.grad(distance, learned)[0]


@dataclass
class TrajectoryMatching:
    """MTT: a student trained on the synthetic images from an expert's snapshot shall end at a later snapshot.

    A student step has one operation of the augmentation, with parameters of its own for every image. The student's
    learning rate is learned with the images. The experts have seen the real images, so `split` and
    `normalization` are not used.
    """

    split: Split
    _: KW_ONLY
    normalization: Normalization
    new_network: Callable[..., nn.Module]  # called with seed=..., of the experts' architecture
    experts: Callable[..., Any]  # called with last_epoch=..., the last one read: `evaluation.experts.Experts`
    strategy: str  # of the augmentation
    threads: int  # not used
    seed: int
    student_steps: int
    student_batch: int | None  # images in a student step, drawn without replacement; None: all
    expert_epochs: int  # between the two snapshots
    max_start_epoch: int  # start epochs are 0 .. max_start_epoch - 1
    student_lr: float  # where the learned rate starts
    first_order: bool  # see `match_trajectory`

    def __post_init__(self) -> None:
        self.trajectories = self.experts(last_epoch=self.max_start_epoch - 1 + self.expert_epochs)
        self.network = self.new_network(seed=0).eval()  # with dropout the recomputed steps would differ from the first
        device = next(self.network.parameters()).device
        self.learnables = {"student_lr": torch.tensor(self.student_lr, device=device, requires_grad=True)}

    def __call__(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[float, Tensor]:
        rng = generator(self.seed, "trajectory", step)
        expert = int(torch.randint(len(self.trajectories), (), generator=rng))
        epoch = int(torch.randint(self.max_start_epoch, (), generator=rng))
        epochs = [epoch, epoch + self.expert_epochs]
        ends = self.trajectories.snapshots(expert, epochs).to(images)  # theta_start, theta_target
        indices = islice(self._batches(len(images), rng), self.student_steps)
        plan = [(index, draw(self.strategy, count=len(index), generator=rng)) for index in indices]
        lr = self.learnables["student_lr"]
        loss, grad_images, lr.grad = match_trajectory(
            self.network, images, labels, lr.detach(), *ends, plan=plan, first_order=self.first_order
        )
        return loss, grad_images

    def _batches(self, images: int, rng: torch.Generator) -> Iterator[Tensor]:
        """Indices of the student's batches: through all images in a random order, then in another."""
        while True:
            yield from torch.randperm(images, generator=rng).split(self.student_batch or images)


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

    The forward pass keeps the flat parameter vectors (P,) alone; the backward pass recomputes one step at a time, with
    v = dL/dtheta_{s+1}:

        theta_{s+1} = theta_s - lr g(theta_s, x)
        dL/dx  -= lr d(v g)/dx,    dL/dlr -= v g,    v -= lr d(v g)/dtheta_s

    Parameters
    ----------
    images, lr
        Normalized synthetic images (N, C, H, W), and the learning rate () of the student.
    theta_start, theta_target
        Snapshots theta_0 and theta* of an expert, flat (P,).
    plan
        For every student step the indices (n,) of its images, and their augmentation.
    first_order
        Leave v as it is (TESLA's approximation: later steps do not see earlier images).

    Returns
    -------
    tuple
        The loss, dL/dx (N, C, H, W) and dL/dlr ().
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


OBJECTIVES = {
    "dc": partial(ClassMatching, distance=gradient_distance, most_classes=1),  # gradients are compared class by class
    "dm": partial(ClassMatching, distance=feature_distance, most_classes=5),
    "mtt": TrajectoryMatching,
}
