"""LD3M's reverse process: DDIM with classifier-free guidance, and a skip from the initial state into every step.

Equations are those of arXiv 2403.03881. T steps, i = T-1 .. 0, go from z_T to z_0; the paper's t is i + 1. Step i,
from noise level a = alpha_bar(t) to a' = alpha_bar(t'), t' < t:

    eps_hat = eps_theta(z_t, null) + guidance (eps_theta(z_t, c) - eps_theta(z_t, null))
    x0_hat  = (z_t - sqrt(1 - a) eps_hat) / sqrt(a)
    x0_hat <- (1 - w) x0_hat + w quantize(Z)            skip "x0", w = i / (T - 1): the authors' released code
    mu      = sqrt(a') x0_hat + sqrt(1 - a') eps_hat    DDIM without noise (eta = 0)
    mu     <- (1 - w) mu + w z_T                        skip "mean", w = (i + 1) / T: the paper, eq. 7 and algorithm 1
    z_t'    = mu

| symbol | here | shape | meaning |
|---|---|---|---|
| `Z` | `z` | (B, c, h, w) | clean latent of the synthetic image |
| `z_T` | `z_T` | (B, c, h, w) | noised latent that the reverse process starts from (eq. 1) |
| `c` | `c` | (B, 1, D) | class conditioning |
| `T` | `steps` | | number of reverse steps |
| `eps` | `eps` | (B, c, h, w) | Gaussian noise, drawn once for every synthetic image |
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ld3m.method.recompute import recomputed
from ld3m.models.diffusion_prior import COMPVIS, Prior, Spacing
from ld3m.runtime.seeds import generator

Skip = Literal["x0", "mean", "none"]


def timesteps(steps: int, *, total: int, spacing: Spacing = COMPVIS) -> list[int]:
    """Choose the DDIM timesteps among the `total` of training, ascending: 1, 101, ..., 901 for ten, as CompVis does.

    Where `steps` does not divide `total`, CompVis's code takes more than asked (31 for 30); this takes `steps`.

    Raises
    ------
    ValueError
        Where `steps` is below 1, or so many do not fit into `total`.
    """
    found = {
        "leading": [i * (total // steps) + spacing.offset for i in range(steps)],
        "trailing": [round(total - i * (total / steps)) - 1 for i in reversed(range(steps))],
        "linspace": [round(i * ((total - 1) / max(1, steps - 1))) for i in range(steps)],
    }[spacing.kind]
    if not 1 <= steps <= total or found[-1] >= total:
        first = f", counted from {spacing.offset}" if spacing.kind == "leading" else ""
        raise ValueError(f"steps={steps}: must be at least 1 and fit into the {total} timesteps of training{first}")
    return found


def skip_weight(skip: Skip, i: int, steps: int) -> float:
    """Weight w of the initial state in reverse step i = T-1 .. 0; it falls linearly with time."""
    if skip == "x0":
        return i / (steps - 1) if steps > 1 else 0.0
    if skip == "mean":
        return (i + 1) / steps
    if skip == "none":
        return 0.0
    raise ValueError(f"skip={skip!r}: must be 'x0', 'mean' or 'none'")


def noised(prior: Prior, z: Tensor, eps: Tensor, *, steps: int) -> Tensor:
    """Noise the latent `z` to the highest timestep used: z_T = sqrt(a) Z + sqrt(1 - a) eps (eq. 1)."""
    a = prior.alpha_bar[timesteps(steps, total=len(prior.alpha_bar), spacing=prior.spacing)[-1]].item()
    return a**0.5 * z + (1 - a) ** 0.5 * eps


def reverse(
    prior: Prior,
    z_T: Tensor,
    c: Tensor,
    *,
    z: Tensor,
    steps: int,
    guidance: float,
    skip: Skip,
    uncheckpointed_steps: int = 0,
    on_state: Callable[[Tensor], None] = lambda z_t: None,
) -> Tensor:
    """Run the reverse process from `z_T` to z_0 (B, c, h, w), differentiable in `z_T`, `z` and `c`.

    Parameters
    ----------
    z_T, c, z
        See the table of symbols. `z` is used by the skip "x0" alone.
    guidance
        Scale of classifier-free guidance; 1 runs the conditional model alone, at half the cost. A prior without
        classes always takes 1.
    skip
        What is mixed in, and where: see the equations; "none" is plain DDIM.
    uncheckpointed_steps
        Number of last steps whose graphs are kept for the backward pass; the others are recomputed.
    on_state
        Called with `z_T`, and with the state (B, c, h, w) after every step.
    """
    ts = timesteps(steps, total=len(prior.alpha_bar), spacing=prior.spacing)
    alpha_bar = prior.alpha_bar.tolist()
    end = 1.0 if prior.spacing.ends_clean else alpha_bar[0]
    guidance = guidance if prior.is_conditional else 1
    conditioning = torch.cat([prior.null(len(c)).to(c), c]) if guidance != 1 else c
    # view_as: an autograd node of its own, in which the steps' gradients are added in the same order, whatever is kept
    mixed_in = prior.quantize(z) if skip == "x0" else z_T.view_as(z_T)
    z_t = z_T
    on_state(z_t.detach())
    for i in reversed(range(steps)):
        levels = {"t": ts[i], "a": alpha_bar[ts[i]], "a_next": alpha_bar[ts[i - 1]] if i else end}
        weight = skip_weight(skip, i, steps)
        step = partial(_step, prior, guidance=guidance, skip=skip, weight=weight, **levels)
        z_t = recomputed(step, z_t, conditioning, mixed_in, keep_graph=i < uncheckpointed_steps)
        on_state(z_t.detach())
    return z_t


def _step(
    prior: Prior,
    z_t: Tensor,
    conditioning: Tensor,
    mixed_in: Tensor,
    *,
    t: int,
    a: float,
    a_next: float,
    guidance: float,
    skip: Skip,
    weight: float,
) -> Tensor:
    """One DDIM step with the skip; the equations are those at the top."""
    if guidance == 1:
        eps_hat = prior.denoise(z_t, t, conditioning)
    else:
        eps_null, eps_c = prior.denoise(torch.cat([z_t, z_t]), t, conditioning).chunk(2)
        eps_hat = eps_null + guidance * (eps_c - eps_null)
    x0_hat = (z_t - (1 - a) ** 0.5 * eps_hat) / a**0.5
    if skip == "x0":
        x0_hat = (1 - weight) * x0_hat + weight * mixed_in
    mu = a_next**0.5 * x0_hat + (1 - a_next) ** 0.5 * eps_hat
    if skip == "mean":
        mu = (1 - weight) * mu + weight * mixed_in
    return mu


@torch.no_grad()
def sample(
    prior: Prior, labels: Tensor, *, size_px: int, steps: int, guidance: float, render_batch: int, seed: int
) -> Tensor:
    """Draw guided samples of the prior by plain DDIM from Gaussian noise, `render_batch` at once.

    Returns
    -------
    Tensor
        One image for each of `labels` (N,): (N, C, size_px, size_px) in [-1, 1].
    """
    z_T = torch.randn(len(labels), *prior.latent_shape(size_px), generator=generator(seed, "prior samples"))
    z_T = z_T.to(prior.embedding.weight.device)
    parts = [
        prior.decode(reverse(prior, z, prior.embed(y), z=z, steps=steps, guidance=guidance, skip="none"))
        for z, y in zip(z_T.split(render_batch), labels.split(render_batch), strict=True)
    ]
    return torch.cat(parts).clamp(-1, 1)
