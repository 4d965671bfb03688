"""Training a classifier: the one loop behind experts, validation, evaluation and the check of the prior."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ld3m.augment import augment, draw
from ld3m.seeds import forked, generator


def train(
    network: nn.Module,
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
    seed: int,
    after_epoch: Callable[[nn.Module], None] = lambda network: None,
) -> nn.Module:
    """Trains `network` in place with SGD on hard labels and returns the network to judge.

    `fetch(index)` gives the images (n, C, H, W) of some indices, where the network is; labels and indices are on the
    CPU. `warm_up`: the rate rises linearly over the first half of the epochs and then falls as a cosine (else it is
    constant). `ema_decay`: the returned network is the moving average, updated once an epoch (None: the trained network
    itself). Everything random follows from `seed`. ValueError, after the epoch, where a loss is not finite.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    schedule = _warm_up_then_cosine(optimizer, epochs) if warm_up else None
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) if ema_decay is not None else None
    network.train()
    with forked(seed, "dropout"):
        for epoch in range(epochs):
            rng = generator(seed, "epoch", epoch)
            losses = []
            for index in torch.randperm(len(labels), generator=rng).split(batch):
                images = augment(fetch(index), draw(strategy, count=len(index), generator=rng))
                loss = cross_entropy(network(images), labels[index].to(images.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            advice = f"the training diverges: lower its learning_rate, {learning_rate}, in params.yaml"
            require_finite(torch.stack(losses), advice=f"{advice} (epoch {epoch})")
            if schedule is not None:
                schedule.step()
            if average is not None:
                average.update_parameters(network)
            after_epoch(network)
    return (average.module if average is not None else network).eval()


def require_finite(losses: Tensor, *, advice: str) -> None:
    """ValueError with the first step whose loss, of (steps,) or (steps, n), is not finite."""
    broken = (~losses.isfinite()).nonzero()
    if len(broken):
        step = int(broken[0, 0])
        raise ValueError(f"step {step}: the loss is {losses[step].tolist()}; {advice}")


def _warm_up_then_cosine(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    half = max(1, epochs // 2)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / half, end_factor=1.0, total_iters=half)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, epochs - half))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[half])


@torch.no_grad()
def accuracy(network: nn.Module, fetch: Callable[[Tensor], Tensor], labels: Tensor, *, batch: int = 500) -> float:
    """The share of images, in [0, 1], whose class the network names."""
    network.eval()
    parts = torch.arange(len(labels)).split(batch)
    predicted = torch.cat([network(fetch(index)).argmax(1) for index in parts])
    return int((predicted.cpu() == labels).sum()) / len(labels)
