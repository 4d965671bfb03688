"""Controls: sets that no distillation made, beside which every distilled set is evaluated.

A control is called as `control(run, ipc)` and returns normalized images (N, C, H, W) and labels (N,), `ipc` images of
every class. `run` is one run of an experiment: its `dataset`, `prior`, `seed`, `params`, `initial(ipc)` (real images
and labels that distillation starts from) and `synthetic(space, ipc, **changes)` (a set at iteration 0).
"""

from collections.abc import Callable
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


def coreset(choose: Callable[[Tensor, int], Tensor]) -> Control:
    """Make the control that chooses real images of every class by their latents in the prior's autoencoder."""

    @torch.no_grad()
    def control(run: Any, ipc: int) -> tuple[Tensor, Tensor]:
        train, chosen = run.dataset.train, []
        for label in range(len(train.classes)):
            members = train.of_class(label)
            parts = members.split(prior_chunk_size(train.shape[-1]))
            z = torch.cat([run.prior.encode(train.x(part)) for part in parts])
            chosen.append(members[choose(z.flatten(1).cpu(), ipc)])
        index = torch.cat(chosen)
        return run.dataset.normalization.normalize(train.x(index)), train.labels[index]

    return control


def iteration0(run: Any, ipc: int) -> tuple[Tensor, Tensor]:
    """Render the set that LD3M starts from, real images after the reverse process."""
    synthetic = run.synthetic("ld3m", ipc, start="real")
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
    "herding": coreset(herding),
    "k_center": coreset(k_center),
    "iteration0": iteration0,
    "prior_samples": prior_samples,
}
