"""Training classifiers: the one loop behind experts, validation, evaluation and the check of the prior."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.optim.sgd import sgd  # torch.optim.SGD loads the compiler: a second more in every process
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ld3m.data.augment import augment_each, draw
from ld3m.runtime.seeds import forked, generator
from ld3m.runtime.training_state import require_finite


def train(
    network: nn.Module, fetch: Callable[[Tensor], Tensor], labels: Tensor, *, seed: int, **recipe: Any
) -> nn.Module:
    """Train one network in place as `train_together` does, and return the one to evaluate."""
    return train_together([network], fetch, labels, seeds=[seed], **recipe)[0]


def train_together(
    networks: Sequence[nn.Module],
    fetch: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    warm_up: bool,
    ema_decay: float | None,
    strategy: str,
    seeds: Sequence[int],
    clip_norm: float | None = None,
    after_epoch: Callable[[Sequence[nn.Module]], None] = lambda networks: None,
) -> list[nn.Module]:
    """Train networks of one architecture in place with SGD on hard labels and return those to evaluate.

    Several networks are computed as one with stacked weights, each what it would be alone up to rounding.

    Parameters
    ----------
    fetch
        Gives the normalized images (n, C, H, W) at some indices (n,), where the networks are.
    labels
        (N,), on the CPU, as the indices are.
    warm_up
        Let the rate rise linearly over the first half of the epochs and then fall as a cosine; else it is constant.
    ema_decay
        Return moving averages, updated once an epoch. The decay rises as k / (k + 1) with the epoch k = 0, 1, ... up to
        this value, so that the first epochs do not linger. None returns the trained networks themselves.
    strategy
        Of the augmentation, see `augment.draw`.
    seeds
        One for each network, from which all that is random in it follows, except dropout: that follows from the first.
    clip_norm
        A network's gradient of a larger norm is scaled down to it.

    Raises
    ------
    ValueError
        After the epoch, where a loss is not finite.
    """
    count = len(networks)
    parameters, logits = _as_one(networks)
    velocities: list[Tensor | None] = [None] * len(parameters)
    constants = {"momentum": momentum, "dampening": 0.0, "nesterov": False, "maximize": False, "fused": True}
    average = [parameter.detach().clone() for parameter in parameters]
    for network in networks:
        network.train()
    with forked(seeds[0], "dropout"):
        for epoch in range(epochs):
            rngs = [generator(seed, "epoch", epoch) for seed in seeds]
            orders = torch.stack([torch.randperm(len(labels), generator=rng) for rng in rngs])  # (networks, N)
            rate = learning_rate * (_warm_up_then_cosine(epoch, epochs) if warm_up else 1)
            losses = []
            for index in orders.split(batch, dim=1):
                size = index.shape[1]
                augmentations = [draw(strategy, count=size, generator=rng) for rng in rngs]
                images = augment_each(fetch(index.flatten()), [size] * count, augmentations)
                answers = labels[index.flatten()].to(images.device)
                loss = cross_entropy(logits(images), answers, reduction="none").view(count, size).mean(1)
                for parameter in parameters:
                    parameter.grad = None
                loss.sum().backward()
                gradients = [parameter.grad for parameter in parameters]
                if clip_norm is not None:
                    _clip(gradients, clip_norm, count)
                with torch.no_grad():
                    sgd(parameters, gradients, velocities, lr=rate, weight_decay=weight_decay, **constants)
                losses.append(loss.detach())
            advice = f"the training diverges in epoch {epoch}: lower learning_rate={learning_rate}"
            require_finite(torch.stack(losses), advice=advice)
            if ema_decay is not None:
                get_ema_multi_avg_fn(min(ema_decay, epoch / (epoch + 1)))(average, parameters, None)
            _give(parameters, networks)
            after_epoch(networks)
    if ema_decay is not None:
        networks = [deepcopy(network) for network in networks]
        _give(average, networks)
    return [network.eval() for network in networks]


def _as_one(networks: Sequence[nn.Module]) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """The parameters of the networks, each stacked over the networks where there are several, and the function that
    maps images (n, C, H, W), as many for each network one after another, to logits (n, classes)."""
    if len(networks) == 1:
        return list(networks[0].parameters()), networks[0]
    stacked, _ = stack_module_state(list(networks))

    def one(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(networks[0], parameters, (images,))

    def logits(images: Tensor) -> Tensor:
        shares = images.unflatten(0, (len(networks), -1))
        return vmap(one, randomness="different")(stacked, shares).flatten(0, 1)

    return list(stacked.values()), logits


def _clip(gradients: Sequence[Tensor], norm: float, count: int) -> None:
    """Scale the gradients of each of `count` networks down to a norm in place where theirs is larger."""
    norms = torch.stack([gradient.reshape(count, -1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    scales = (norm / norms).clamp(max=1)  # 1 at norm 0, too
    for gradient in gradients:
        gradient.mul_(scales.view(-1, *[1] * (gradient.dim() - 1)))


@torch.no_grad()
def _give(parameters: Sequence[Tensor], networks: Sequence[nn.Module]) -> None:
    """Copy parameters as `_as_one` has them into the networks."""
    for k, network in enumerate(networks):
        for parameter, values in zip(network.parameters(), parameters, strict=True):
            parameter.copy_(values[k] if len(networks) > 1 else values)


def _warm_up_then_cosine(epoch: int, epochs: int) -> float:
    """The factor of the learning rate: a linear rise to 1 over the first half of the epochs, then a cosine to 0."""
    half = max(1, epochs // 2)
    if epoch < half:
        return 1 / half + (1 - 1 / half) * epoch / half
    return (1 + math.cos(math.pi * (epoch - half) / max(1, epochs - half))) / 2


@torch.no_grad()
def predicted(network: nn.Module, fetch: Callable[[Tensor], Tensor], count: int, *, batch: int = 50) -> Tensor:
    """Return the classes (count,), on the CPU, that the network sees in images 0 .. count-1."""
    network.eval()
    return torch.cat([network(fetch(index)).argmax(1) for index in torch.arange(count).split(batch)]).cpu()


def accuracy(network: nn.Module, fetch: Callable[[Tensor], Tensor], labels: Tensor, *, batch: int = 50) -> float:
    """Compute the share of images, in [0, 1], whose class the network names; `fetch` is that of `train_together`."""
    return int((predicted(network, fetch, len(labels), batch=batch) == labels).sum()) / len(labels)
