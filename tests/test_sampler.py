"""The reverse process against a plain one, its gradient against plain autograd, its memory."""

import pytest
import torch
from conftest import make_prior, relative_difference
from diffusers import DDIMScheduler

from benchmarks.memory import LiveBytes
from ld3m.method.sampler import noised, reverse, sample, skip_weight, timesteps
from ld3m.models.diffusion_prior import Spacing
from ld3m.runtime.seeds import generator


def plain_reverse(prior, z_T, c, *, z, steps, guidance, skip, on_state=lambda z_t: None):
    """The same process without checkpoints, from the formulas; autograd sees the whole chain."""
    alpha_bar, null = prior.alpha_bar, prior.embedding.weight[-1:].expand(len(c), 1, -1)
    scale = prior.autoencoder.config.scaling_factor
    positions = (z / scale).movedim(1, -1)  # (B, h, w, c)
    codes = prior.autoencoder.quantize.embedding.weight
    nearest = codes[(positions[..., None, :] - codes).square().sum(-1).argmin(-1)].movedim(-1, 1) * scale
    quantized = z + (nearest - z).detach()
    state = z_T
    on_state(state)
    for i in range(steps - 1, -1, -1):
        t = i * (1000 // steps) + 1
        a, a_next = alpha_bar[t], alpha_bar[t - 1000 // steps if i else 0]
        noise = prior.unet(state, t, encoder_hidden_states=c).sample
        if guidance != 1:
            noise_null = prior.unet(state, t, encoder_hidden_states=null).sample
            noise = (1 - guidance) * noise_null + guidance * noise
        x0 = (state - (1 - a).sqrt() * noise) / a.sqrt()
        if skip == "x0":
            x0 = x0 + i / (steps - 1) * (quantized - x0)
        state = a_next.sqrt() * x0 + (1 - a_next).sqrt() * noise
        if skip == "mean":
            state = state + (i + 1) / steps * (z_T - state)
        on_state(state)
    return state


def leaves(prior, randn):
    z = (0.5 * randn(2, 2, 4, 4)).requires_grad_()
    z_T = randn(2, 2, 4, 4).requires_grad_()
    c = (prior.embed(torch.tensor([0, 2])) + 0.1 * randn(2, 1, 8)).requires_grad_()
    return z_T, z, c


def test_timesteps():
    assert timesteps(10, total=1000) == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    for steps in (*range(1, 1000, 37), 999):
        ts = timesteps(steps, total=1000)
        assert len(ts) == steps and ts == sorted(set(ts)) and ts[0] == 1 and ts[-1] < 1000
    assert timesteps(1000, total=1000, spacing=Spacing("leading", 0)) == list(range(1000))
    for steps in (0, -1, 1000, 1001):  # the last of 1000 would be step 1000
        with pytest.raises(ValueError, match=f"steps={steps}: must be at least 1 and fit into the 1000 timesteps"):
            timesteps(steps, total=1000)


@pytest.mark.parametrize("kind, offset", [("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_every_spacing_is_that_of_diffusers(kind, offset):
    scheduler = DDIMScheduler(timestep_spacing=kind, steps_offset=offset)
    for steps in (1, 2, 7, 50, 999):
        scheduler.set_timesteps(steps)
        assert timesteps(steps, total=1000, spacing=Spacing(kind, offset)) == sorted(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("skip", "weights", "of_one_step"),
    [("x0", [1, 3 / 4, 2 / 4, 1 / 4, 0], 0), ("mean", [5 / 5, 4 / 5, 3 / 5, 2 / 5, 1 / 5], 1), ("none", [0] * 5, 0)],
)
def test_skip_weights_in_the_order_the_steps_run(skip, weights, of_one_step):
    assert [skip_weight(skip, i, 5) for i in (4, 3, 2, 1, 0)] == pytest.approx(weights, abs=1e-15)
    assert skip_weight(skip, 0, 1) == of_one_step and skip_weight(skip, 1, 2) == weights[0]
    with pytest.raises(ValueError, match="skip='mu': must be 'x0', 'mean' or 'none'"):
        skip_weight("mu", 0, 5)


def test_noised(prior, randn):
    z, eps = randn(2, 2, 4, 4), randn(2, 2, 4, 4)
    a = torch.cumprod(1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2, 0)[901]
    assert 0.02 < a.sqrt() < 0.04  # the factor that weakens the gradient of z: 0.03 at t = 901
    expected = a.sqrt() * z + (1 - a).sqrt() * eps
    torch.testing.assert_close(noised(prior, z, eps, steps=10), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("skip", ["x0", "mean", "none"])
def test_every_state_and_the_gradient_equal_the_plain_chain(prior, randn, skip, guidance):
    z_T, z, c = leaves(prior, randn)
    weight = randn(2, 2, 4, 4)
    states, gradients = [], []
    for process in (reverse, plain_reverse):
        seen = []
        z_0 = process(prior, z_T, c, z=z, steps=4, guidance=guidance, skip=skip, on_state=seen.append)
        states.append(torch.stack([*seen, z_0]).detach())
        gradients.append(torch.autograd.grad((z_0 * weight).sum(), [z_T, c, z], allow_unused=True))
    if skip != "x0":  # the others do not use z
        assert all(found[2] is None for found in gradients)
        gradients = [found[:2] for found in gradients]
    for ours, plain in zip(*states, strict=True):
        assert relative_difference(ours, plain) < 1e-12
    for exact, plain in zip(*gradients, strict=True):
        assert plain.abs().max() > 1e-6
        assert relative_difference(exact, plain) < 1e-10


def peak_bytes(prior, process, *, steps, side=16, skip="mean"):
    z_T = torch.zeros(1, 2, side, side, dtype=torch.float64, requires_grad=True)
    c = prior.embed(torch.tensor([0])).clone().requires_grad_()
    with LiveBytes() as meter:
        process(prior, z_T, c, z=z_T, steps=steps, guidance=3, skip=skip).sum().backward()
    return meter.peak


def test_memory_is_that_of_one_step_with_gradient_whatever_the_number_of_steps(prior):
    one = peak_bytes(prior, plain_reverse, steps=1)
    assert peak_bytes(prior, reverse, steps=20) < 1.1 * one
    assert peak_bytes(prior, plain_reverse, steps=5) > 3 * one  # the meter sees what the chain saves


@pytest.mark.parametrize(
    ("guidance", "rows", "uncheckpointed_steps", "again"), [(3, 4, 0, 3), (1, 2, 1, 2), (3, 4, 20, 0)]
)
def test_a_step_runs_twice_but_where_its_graph_is_kept_and_without_guidance_at_half_the_cost(
    prior, randn, monkeypatch, guidance, rows, uncheckpointed_steps, again
):
    calls, denoise = [], type(prior).denoise

    def counted(self, z_t, t, c):
        calls.append((t, torch.is_grad_enabled(), len(z_t)))
        return denoise(self, z_t, t, c)

    z_T, z, c = leaves(prior, randn)

    def found(uncheckpointed_steps):
        given = dict(z=z, steps=3, guidance=guidance, skip="x0", uncheckpointed_steps=uncheckpointed_steps)
        z_0 = reverse(prior, z_T, c, **given)
        return z_0, *torch.autograd.grad(z_0.square().sum(), [z_T, z, c])

    expected = found(0)
    monkeypatch.setattr(type(prior), "denoise", counted)
    assert all(map(torch.equal, found(uncheckpointed_steps), expected))
    ts = [667, 334, 1]
    assert calls == [(t, k >= again, rows) for k, t in enumerate(ts)] + [(t, True, rows) for t in ts[:again][::-1]]


def test_kept_steps_are_in_memory_only_where_there_is_a_gradient_to_take(prior, randn):
    z_T, z, c = leaves(prior, randn)

    def peak(uncheckpointed_steps):
        with LiveBytes() as meter:
            reverse(prior, z_T, c, z=z, steps=4, guidance=3, skip="mean", uncheckpointed_steps=uncheckpointed_steps)
        return meter.peak

    assert peak(4) > 1.5 * peak(2) > 2 * peak(0)
    with torch.no_grad():
        assert peak(4) == peak(0)


@pytest.mark.parametrize("uncheckpointed_steps", [0, 2])
def test_the_gradient_can_be_taken_twice(prior, randn, uncheckpointed_steps):
    z_T, z, c = leaves(prior, randn)
    z_0 = reverse(prior, z_T, c, z=z, steps=3, guidance=3, skip="mean", uncheckpointed_steps=uncheckpointed_steps)
    once, again = (torch.autograd.grad(z_0.sum(), [z_T, c], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_samples_are_guided_plain_ddim_from_noise_clamped_whatever_the_batch(monkeypatch):
    prior, labels = make_prior().freeze_(), torch.tensor([0, 2, 0])  # in the float32 of a loaded prior
    monkeypatch.setattr(type(prior), "decode", lambda self, z: 3 * z)  # beyond the range
    noise = torch.randn(3, 2, 4, 4, generator=generator(1, "prior samples"))
    with torch.no_grad():
        z_0 = plain_reverse(prior, noise, prior.embed(labels), z=noise, steps=3, guidance=2.0, skip="none")
    for render_batch in (2, 3):
        samples = sample(prior, labels, size_px=16, steps=3, guidance=2.0, render_batch=render_batch, seed=1)
        torch.testing.assert_close(samples, (3 * z_0).clamp(-1, 1), rtol=0, atol=1e-4)
        assert not samples.requires_grad
