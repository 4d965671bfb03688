"""Losses and weights that are not finite stop a training, and never take the place of a good state."""

import math
from functools import partial

import pytest
import torch
from conftest import CLASSES, make_prior, make_split

from ld3m.models.gan import build_generator
from ld3m.models.train_gan import fit_gan
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.training_state import CHECKED_STEPS, TrainingState

GAN = partial(build_generator, channels=1, classes=CLASSES, noise_width=4, w_width=4, widths=(4, 4, 4), seed=0)


def training_of(*losses, steps=5):
    network = torch.nn.Linear(2, 1)
    training = TrainingState({"network": network}, losses=torch.zeros(steps), advice="lower the rate")
    for loss in losses:
        training.record(torch.tensor(loss))
    return network, training


@pytest.mark.parametrize("steps", [2, CHECKED_STEPS + 2])
def test_it_stops_soon_and_at_the_end_at_the_latest(steps):
    checked = min(steps, CHECKED_STEPS)
    training_of(*[math.nan] * (checked - 1), steps=steps)
    with pytest.raises(ValueError, match="step 0: the loss is nan"):
        training_of(*[math.nan] * checked, steps=steps)


def test_losses_and_weights_that_are_not_finite_are_no_state():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"step 1: the loss is {value}; lower the rate"):
            training_of(1.0, value, math.nan)[1].state()
    network, training = training_of(1.0)
    assert training.state()["done"] == 1
    with torch.no_grad():
        network.weight[0, 1] = math.inf
    with pytest.raises(ValueError, match="step 0: the network has weights that are not finite; lower the rate"):
        training.state()


@pytest.mark.parametrize(
    "fit, network, options",
    [
        (fit_autoencoder, make_prior, dict(batch=4, continuous_steps=2)),
        (fit_denoiser, make_prior, dict(batch=4, null_share=0.1, ema_decay=0.5)),
        (fit_gan, GAN, dict(batch=8, discriminator_widths=(4, 4), r1=1.0, r1_every=2, ema_decay=0.5, strategy="none")),
    ],
)
def test_a_training_that_diverges_stops_with_the_step_and_keeps_the_last_good_state(tmp_path, fit, network, options):
    checkpoint, name = Checkpoint(tmp_path / "run.safetensors", minutes=0), fit.__name__.removeprefix("fit_")
    with pytest.raises(ValueError, match=rf"^step \d.* finite|the loss is .*(nan|inf).*lower .*{name}") as failed:
        fit(network(), make_split(6, seed=0), steps=9, learning_rate=1e30, seed=0, checkpoint=checkpoint, **options)
    step = int(str(failed.value).split(":")[0].split()[1])
    states = []
    Checkpoint(tmp_path / "run.safetensors").resume(states.append)
    assert [state["done"] for state in states] == ([step] if step else [])
    assert all(state["losses"].isfinite().all() for state in states)
