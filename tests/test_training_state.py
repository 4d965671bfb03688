"""Losses and weights that are not finite stop a training, and never take the place of a good state."""

import math

import pytest
import torch
from conftest import CLASSES, make_prior, make_split

from ld3m.models.gan import build_generator
from ld3m.models.train_gan import fit_gan
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.training_state import CHECKED_STEPS, TrainingState


def made(steps=5, n=None):
    network = torch.nn.Linear(2, 1)
    return network, TrainingState(
        {"network": network}, losses=torch.zeros(steps, *([n] if n else [])), advice="lower the rate"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite_is_named_before_a_state_is_given(value):
    _, training = made()
    training.record(torch.tensor(1.0))
    training.state()
    training.record(torch.tensor(value))
    training.record(torch.tensor(math.nan))
    with pytest.raises(ValueError, match=f"step 1: the loss is {value}; lower the rate"):
        training.state()


def test_it_stops_soon_and_at_the_end_at_the_latest():
    _, training = made(steps=2 * CHECKED_STEPS)
    with pytest.raises(ValueError, match="step 0: the loss is nan"):
        for _ in range(CHECKED_STEPS):
            training.record(torch.tensor(math.nan))
    assert training.done == CHECKED_STEPS
    _, training = made(steps=2)
    training.record(torch.tensor(0.0))
    with pytest.raises(ValueError, match="step 1: the loss is inf"):
        training.record(torch.tensor(math.inf))


def test_weights_that_are_not_finite_are_no_state_either():
    network, training = made()
    training.record(torch.tensor(1.0))
    with torch.no_grad():
        network.weight[0, 1] = math.inf
    with pytest.raises(ValueError, match="step 0: the network has weights that are not finite; lower the rate"):
        training.state()


def autoencoder(checkpoint):
    shared = dict(steps=9, batch=4, continuous_steps=2, seed=0)
    fit_autoencoder(make_prior(), make_split(6, seed=0), learning_rate=1e30, checkpoint=checkpoint, **shared)


def denoiser(checkpoint):
    shared = dict(steps=9, batch=4, null_share=0.1, ema_decay=0.5, seed=0)
    fit_denoiser(make_prior(), make_split(6, seed=0), learning_rate=1e30, checkpoint=checkpoint, **shared)


def gan(checkpoint):
    generator = build_generator(channels=1, classes=CLASSES, noise_width=4, w_width=4, widths=(4, 4, 4), seed=0)
    shared = dict(steps=9, batch=8, r1=1.0, r1_every=2, ema_decay=0.5, strategy="none", seed=0)
    split = make_split(6, seed=0)
    fit_gan(generator, split, discriminator_widths=(4, 4), learning_rate=1e30, checkpoint=checkpoint, **shared)


@pytest.mark.parametrize("train", [autoencoder, denoiser, gan])
def test_a_training_that_diverges_stops_with_the_step_and_keeps_the_last_good_state(tmp_path, train):
    with pytest.raises(
        ValueError, match=rf"^step \d.* finite|the loss is .*(nan|inf).*lower .*{train.__name__}"
    ) as failed:
        train(Checkpoint(tmp_path / "run.safetensors", minutes=0))
    step = int(str(failed.value).split(":")[0].split()[1])
    states = []
    Checkpoint(tmp_path / "run.safetensors").resume(states.append)
    assert [state["done"] for state in states] == ([step] if step else [])
    assert all(state["losses"].isfinite().all() for state in states)
