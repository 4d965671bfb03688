"""Controls: sets that no distillation made, beside which every distilled set is evaluated.

A control is called as `control(run, ipc)` and returns normalized images (N, C, H, W) and labels (N,), `ipc` images of
every class. `run` is one run of an experiment: its `dataset`, `prior`, `seed`, `params`, `initial(ipc)` (real images
and labels that distillation starts from) and `synthetic(space, ipc, **changes)` (a set at iteration 0).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ld3m.data.coresets import herding, k_center
from ld3m.method.sampler import sample
from ld3m.models.diffusion_prior import prior_chunk_size

Control = Callable[[Any, int], tuple[Tensor, Tensor]]


def random_real(run: Any, ipc: int) -> tuple[Tensor, Tensor]:
    """Take the random real images that distillation starts from."""
    x, labels = run.initial(ipc)
    return run.dataset.normalization.normalize(x), labels


@torch.no_grad()
def chosen(run: Any, ipc: int, choose: Callable[[Tensor, int], Tensor] = herding) -> tuple[Tensor, Tensor]:
    """Choose real images (N, C, H, W), in [-1, 1], of every class by their latents in the prior's autoencoder.

    The choice is that of every run, and made once.
    """
    train, key = run.dataset.train, f"{ipc} chosen by {choose}"
    if key not in run.loaded:
        indices = []
        for label in range(len(train.classes)):
            members = train.of_class(label)
            parts = members.split(prior_chunk_size(train.shape[-1]))
            z = torch.cat([run.prior.encode(train.x(part)) for part in parts])
            indices.append(members[choose(z.flatten(1).cpu(), ipc)])
        run.loaded[key] = torch.cat(indices)
    index = run.loaded[key]
    return train.x(index), train.labels[index]


def coreset(run: Any, ipc: int, choose: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """Take the real images that `choose` chooses."""
    x, labels = chosen(run, ipc, choose)
    return run.dataset.normalization.normalize(x), labels


def iteration0(run: Any, ipc: int, start: str = "real") -> tuple[Tensor, Tensor]:
    """Render the set that LD3M starts from, real images after the reverse process."""
    synthetic = run.synthetic("ld3m", ipc, start=start)
    return synthetic.render().detach(), synthetic.labels


def prior_samples(run: Any, ipc: int) -> tuple[Tensor, Tensor]:
    """Draw guided samples of the diffusion prior."""
    x, labels = run.initial(ipc)
    given = run.params.spaces.ld3m
    options = {"steps": given.steps, "guidance": given.guidance, "render_batch": given.render_batch}
    samples = sample(run.prior, labels, size_px=x.shape[-1], seed=run.seed, **options)
    return run.dataset.normalization.normalize(samples), labels


CONTROLS: dict[str, Control] = {
    "random_real": random_real,
    "herding": partial(coreset, choose=herding),
    "k_center": partial(coreset, choose=k_center),
    "iteration0": iteration0,
    "iteration0_herding": partial(iteration0, start="herding"),
    "prior_samples": prior_samples,
}
