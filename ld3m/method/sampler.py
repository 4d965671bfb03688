"""The reverse process with the LD3M skip, and its exact gradient, at memory flat in the number of steps where wanted.

| symbol | here | meaning |
|---|---|---|
| `Z` | `z` | clean latent of the synthetic image, (B, c, h, w) |
| `z_T` | `z_T` | the state the reverse process starts from |
| `c` | `c` | class conditioning, (B, 1, D) |
| `T` | `steps` | number of reverse steps |
| `eps` | `eps` | Gaussian noise, an input: drawn once for every synthetic image and replayed in every pass |

The forward pass keeps only the `T` small latents; the backward pass walks the chain from its last step to its first
and re-runs one step at a time with gradient. A step so costs two forwards and one backward of the U-Net, the memory is
that of one step, and the result is that of plain autograd through the whole chain.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ld3m.models.diffusion_prior import COMPVIS, Prior, Spacing
from ld3m.runtime.seeds import generator

Skip = Literal["x0", "mean", "none"]


def timesteps(steps: int, *, total: int, spacing: Spacing = COMPVIS) -> list[int]:
    """The DDIM timesteps, ascending, of a `spacing`: CompVis's are 1, 101, ..., 901 for ten steps of a thousand in
    training."""
    found = []
    if 1 <= steps <= total:
        found = {
            "leading": lambda: [i * (total // steps) + spacing.offset for i in range(steps)],
            "trailing": lambda: [round(total - i * (total / steps)) - 1 for i in reversed(range(steps))],
            "linspace": lambda: [round(i * ((total - 1) / max(1, steps - 1))) for i in range(steps)],
        }[spacing.kind]()
    if not found or found[-1] >= total:
        first = f" from {spacing.offset} on" if spacing.kind == "leading" else ""
        raise ValueError(
            f"steps = {steps}: must be at least 1 and fit into the {total} timesteps of training{first}; set "
            "spaces.ld3m.steps in params.yaml"
        )
    return found


def skip_weight(skip: Skip, i: int, steps: int) -> float:
    """Weight of the initial state in reverse step i = T-1 .. 0: i/(T-1) for `x0`, t/T with t = i+1 for `mean`."""
    if skip == "x0":
        return i / (steps - 1) if steps > 1 else 0.0
    if skip == "mean":
        return (i + 1) / steps
    if skip == "none":
        return 0.0
    raise ValueError(f"skip = {skip!r}: must be 'x0', 'mean' or 'none'; set spaces.ld3m.skip in params.yaml")


def noised(prior: Prior, z: Tensor, eps: Tensor, *, steps: int) -> Tensor:
    """z_T: the latent `z` noised with `eps` to the highest used timestep (eq. 1)."""
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
    eta: float = 0.0,
    eps: Tensor | None = None,
    uncheckpointed_steps: int = 0,
    on_state: Callable[[Tensor], None] = lambda z_t: None,
) -> Tensor:
    """Runs the reverse process from `z_T` to the latent that is decoded, (B, c, h, w).

    `skip="x0"` mixes `quantize(z)` into every prediction of x0 (released code); `"mean"` mixes `z_T` into the mean of
    every next state (eq. 7); `"none"` is plain DDIM. `guidance` 1 is the conditional model alone, at half the cost, as
    any guidance is of a prior without classes.
    With `eta` > 0 the noise of the steps is `eps`, (T, B, c, h, w), in the order the steps run.
    Of the last `uncheckpointed_steps` steps, or of all if there are no more, the graph is kept for the gradient.
    `on_state` is called with `z_T` and with the state (B, c, h, w) after every step, the last of which is returned.
    Differentiable in `z_T`, `z` and `c`.
    """
    ts = timesteps(steps, total=len(prior.alpha_bar), spacing=prior.spacing)
    guidance = guidance if prior.is_conditional else 1
    weights = [skip_weight(skip, i, steps) for i in range(steps)]
    alpha_bar = prior.alpha_bar.tolist()
    end = 1.0 if prior.spacing.ends_clean else alpha_bar[0]
    initial = {"x0": lambda: prior.quantize(z), "mean": lambda: z_T, "none": lambda: torch.zeros(())}[skip]()
    conditioning = torch.cat([prior.null(len(c)).to(c), c]) if guidance != 1 else c
    chain = [
        partial(
            _step,
            prior,
            t=ts[i],
            a=alpha_bar[ts[i]],
            a_previous=alpha_bar[ts[i - 1]] if i else end,
            guidance=guidance,
            skip=skip,
            weight=weights[i],
            eta=eta,
            eps=eps[steps - 1 - i] if eta else None,
        )
        for i in reversed(range(steps))
    ]
    kept = set(range(steps)[-uncheckpointed_steps:]) if uncheckpointed_steps and torch.is_grad_enabled() else set()
    return _Chain.apply(chain, kept, on_state, z_T, conditioning, initial)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, made once more for its gradient, so that of several only one is in memory."""
    unused = torch.empty(0)
    return _Chain.apply([lambda x, *_: function(x)], set(), lambda state: None, x, unused, unused)


class _Chain(torch.autograd.Function):
    """`chain[-1](... chain[0](z_T, c, initial) ...)`, whose gradient needs the memory of one step, and of those at the
    places `kept`. Each other step is called once without a graph, and once with one in the backward pass:
    `torch.utils.checkpoint` would do the same, but makes a graph the first time too, a tenth of the time of an
    iteration."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: list[Callable[..., Tensor]],
        kept: set[int],
        on_state: Callable[[Tensor], None],
        z_T: Tensor,
        conditioning: Tensor,
        initial: Tensor,
    ) -> Tensor:
        states = [z_T]
        on_state(z_T)
        ctx.graphs = {}
        for place, step in enumerate(chain):
            if place in kept:
                ctx.graphs[place] = inputs, following = _with_graph(step, states[-1], conditioning, initial)
                states.append(following.detach())
            else:
                states.append(step(states[-1], conditioning, initial))
            on_state(states[-1])
        ctx.chain = chain
        ctx.save_for_backward(conditioning, initial, *states[:-1])
        return states[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        conditioning, initial, *states = ctx.saved_tensors
        grads_shared = [torch.zeros_like(tensor) for tensor in (conditioning, initial)]
        for place in reversed(range(len(states))):
            inputs, following = ctx.graphs.pop(place, None) or _with_graph(
                ctx.chain[place], states[place], conditioning, initial
            )
            grad, *grads = torch.autograd.grad(following, inputs, grad, allow_unused=True)
            for total, part in zip(grads_shared, grads, strict=True):
                if part is not None:  # of `initial` where the skip has no weight
                    total += part
        return None, None, None, grad, *grads_shared


def _with_graph(step: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """Inputs of their own, and what a step makes of them, differentiable in them."""
    own = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        return own, step(*own)


@torch.no_grad()
def sample(
    prior: Prior, labels: Tensor, *, size_px: int, steps: int, guidance: float, render_batch: int, seed: int
) -> Tensor:
    """Guided samples of the prior for labels (N,): pixels (N, C, H, W) in [-1, 1]. Plain DDIM from noise, no skip."""
    z_T = torch.randn(len(labels), *prior.latent_shape(size_px), generator=generator(seed, "prior samples"))
    z_T = z_T.to(prior.embedding.weight.device)
    parts = [
        prior.decode(reverse(prior, z, prior.embed(y), z=z, steps=steps, guidance=guidance, skip="none"))
        for z, y in zip(z_T.split(render_batch), labels.split(render_batch), strict=True)
    ]
    return torch.cat(parts).clamp(-1, 1)


def _step(
    prior: Prior,
    z_t: Tensor,
    conditioning: Tensor,
    initial: Tensor,
    *,
    t: int,
    a: float,
    a_previous: float,
    guidance: float,
    skip: Skip,
    weight: float,
    eta: float,
    eps: Tensor | None,
) -> Tensor:
    """One DDIM step from noise level `a` to `a_previous` (both alpha_bar)."""
    if guidance == 1:
        predicted = prior.denoise(z_t, t, conditioning)
    else:
        null, asked = prior.denoise(torch.cat([z_t, z_t]), t, conditioning).chunk(2)
        predicted = null + guidance * (asked - null)
    x0 = (z_t - (1 - a) ** 0.5 * predicted) / a**0.5
    if skip == "x0":
        x0 = (1 - weight) * x0 + weight * initial
    sigma = eta * ((1 - a_previous) / (1 - a) * (1 - a / a_previous)) ** 0.5
    mu = a_previous**0.5 * x0 + (1 - a_previous - sigma**2) ** 0.5 * predicted
    if skip == "mean":
        mu = (1 - weight) * mu + weight * initial
    return mu if eps is None else mu + sigma * eps
