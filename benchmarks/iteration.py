"""One LD3M iteration: the reverse process, forward and backward, from `z` and `c` to their gradients.

Counted in forward passes of the U-Net, with both halves of guidance in one batch, and a backward pass as two:

| way | passes | memory |
|---|---|---|
| ours: a pass without a graph, then one step at a time with one | T + T + 2T = 4T | of one step |
| ours, every step kept (`uncheckpointed_steps`) | T + 2T = 3T | grows with T |
| 4T floor: the same passes of the U-Net alone | 4T | of one step |
| plain autograd through the whole chain | T + 2T = 3T | grows with T |
| released scheme: sampling pass, checkpointed pass, recomputation | T + T + T + 2T = 5T | of one step |

The floor is T times a forward pass of the U-Net without a graph, one with a graph, and its backward pass to the latents
and the conditioning. It has nothing else: noising, the quantizer, guidance, the skip and the arithmetic of DDIM are in
ours. Decoder and objective are in neither, for they are the same in every way.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.table import Row, in_turns, less_is_better, main, require_same
from ld3m.method.sampler import noised, reverse
from ld3m.models.diffusion_prior import Prior
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params

STEPS = 10
Gradients = tuple[Tensor, ...]


def gradients(chain: Callable[[Tensor, Tensor], Tensor], z: Tensor, c: Tensor, grad: Tensor) -> Gradients:
    """Those of `z` (B, c, h, w) and `c` (B, 1, D), where the gradient of the chain's result is `grad`."""
    z, c = z.detach().requires_grad_(), c.detach().requires_grad_()
    return torch.autograd.grad(chain(z, c), (z, c), grad)


def ours(
    prior: Prior, z: Tensor, c: Tensor, *, eps: Tensor, steps: int, guidance: float, uncheckpointed_steps: int = 0
) -> Tensor:
    z_T = noised(prior, z, eps, steps=steps)
    return reverse(
        prior, z_T, c, z=z, steps=steps, guidance=guidance, skip="x0", uncheckpointed_steps=uncheckpointed_steps
    )


def plain(
    prior: Prior, z: Tensor, c: Tensor, *, eps: Tensor, steps: int, guidance: float, checkpointed: bool = False
) -> Tensor:
    """The chain as one would write it: nothing is kept from step to step, and autograd does the rest. The skip's latent
    is quantized in every step, as in the released code."""
    ts = list(range(1, 1000, 1000 // steps))[:steps]
    a = prior.alpha_bar[ts[-1]].item()
    z_t = a**0.5 * z + (1 - a) ** 0.5 * eps
    for i in reversed(range(steps)):
        step = partial(_plain_step, prior, ts=ts, i=i, guidance=guidance)
        z_t = checkpoint(step, z_t, z, c, use_reentrant=False) if checkpointed else step(z_t, z, c)
    return z_t


def _plain_step(prior: Prior, z_t: Tensor, z: Tensor, c: Tensor, *, ts: list[int], i: int, guidance: float) -> Tensor:
    a, a_previous = (prior.alpha_bar[t].item() for t in (ts[i], ts[i - 1] if i else 0))
    halves = prior.denoise(torch.cat([z_t, z_t]), ts[i], torch.cat([prior.null(len(c)), c]))
    null, asked = halves.chunk(2)
    predicted = null + guidance * (asked - null)
    x0 = (z_t - (1 - a) ** 0.5 * predicted) / a**0.5
    weight = i / (len(ts) - 1) if len(ts) > 1 else 0.0
    x0 = (1 - weight) * x0 + weight * prior.quantize(z)
    return a_previous**0.5 * x0 + (1 - a_previous) ** 0.5 * predicted


def released(prior: Prior, z: Tensor, c: Tensor, **given) -> Tensor:
    with torch.no_grad():
        plain(prior, z, c, **given)  # the images whose loss is measured
    return plain(prior, z, c, **given, checkpointed=True)


def floor(prior: Prior, z: Tensor, c: Tensor, *, steps: int) -> None:
    z_t = torch.cat([z, z]).detach().requires_grad_()
    conditioning = torch.cat([c, c]).detach().requires_grad_()
    grad = torch.ones_like(z_t)
    for _ in range(steps):
        with torch.no_grad():
            prior.denoise(z_t, 1, conditioning)
        torch.autograd.grad(prior.denoise(z_t, 1, conditioning), (z_t, conditioning), grad)


def start(experiment: Experiment, *, ipc: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`z` (N, c, h, w), `c` (N, 1, D) and `eps` of the first iteration."""
    codes = experiment.synthetic("ld3m", ipc, learn="z", skip="x0")
    return codes.learnables["z"].detach(), codes.learnables["c"].detach(), codes.fixed["eps"]


def measure(*, smoke: bool) -> list[Row]:
    experiment = Experiment(load_params())
    prior, device = experiment.prior, experiment.params.on_device
    z, c, eps = start(experiment)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    given = dict(eps=eps, steps=2 if smoke else STEPS, guidance=experiment.params.spaces.ld3m.guidance)
    kept = partial(ours, uncheckpointed_steps=given["steps"])
    chains = {"ours": ours, "every step kept": kept, "plain autograd": plain, "released scheme": released}
    ways = {name: partial(gradients, partial(chain, prior, **given), z, c, grad) for name, chain in chains.items()}
    found = {name: way() for name, way in ways.items()}
    for name, others in found.items():
        require_same(found["ours"], others, what=f"the gradients of ours and of {name}", within=1e-3)
    ways["4T floor"] = partial(floor, prior, z, c, steps=given["steps"])
    seconds = in_turns(ways, rounds=1 if smoke else 9)
    own = {"ld3m_iteration": seconds.pop("ours"), "ld3m_iteration_kept": seconds.pop("every step kept")}
    return [
        less_is_better(row, name, ours=mine, other=other, unit="s", device=device)
        for row, mine in own.items()
        for name, other in seconds.items()
    ]


if __name__ == "__main__":
    main(measure)
