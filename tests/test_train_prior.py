"""Training the prior: it learns, repeats bit for bit, and measures itself by the formulas."""

import math
from contextlib import nullcontext

import pytest
import torch
from conftest import make_halves
from torch.testing import assert_close

from ld3m.evaluation.prior_quality import check_prior, reconstruct, reconstruction_error, require_classes
from ld3m.models.diffusion_prior import IncompatiblePrior, build_prior
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser


@pytest.fixture(scope="module")
def dataset():
    return make_halves(background=60, brightness=(180, 181))


def untrained():
    widths = dict(autoencoder_widths=(8, 8, 16), unet_widths=(32, 32), unet_blocks=1, conditioning_width=16)
    return build_prior(channels=1, classes=2, latent_size=4, latent_channels=3, codebook=16, seed=0, **widths)


def trained(dataset):
    prior, given = untrained(), dict(batch=16, seed=0)
    images = fit_autoencoder(prior, dataset.train, steps=30, continuous_steps=10, learning_rate=5e-3, **given)
    noise = fit_denoiser(prior, dataset.train, steps=40, learning_rate=2e-3, null_share=0.1, ema_decay=0.9, **given)
    return prior, images, noise


def test_both_losses_fall_the_latents_have_unit_variance_and_a_second_run_gives_the_same_bits(dataset):
    prior, images, noise = trained(dataset)
    assert sum(images[-5:]) < 0.7 * sum(images[:5])
    assert sum(noise[-10:]) < 0.8 * sum(noise[:10])
    assert prior.encode(dataset.train.x()).std().item() == pytest.approx(1, rel=1e-4)
    assert not any(parameter.requires_grad for parameter in prior.unet.parameters())
    again, images_again, noise_again = trained(dataset)
    assert (images_again, noise_again) == (images, noise)
    assert again.fingerprint() == prior.fingerprint()


def test_the_reconstruction_error_is_the_formula(dataset, monkeypatch):
    prior, real = untrained().freeze_(), dataset.validation.x()
    monkeypatch.setattr("ld3m.evaluation.prior_quality.prior_chunk_size", lambda size_px: 5)
    drawn = reconstruct(prior, real)
    assert_close(drawn, prior.decode(prior.encode(real)).clamp(-1, 1))
    error = reconstruction_error(real, drawn)
    mse = sum((a - b) ** 2 for a, b in zip(real.double().flatten().tolist(), drawn.flatten().tolist(), strict=True))
    assert error["mse"] == pytest.approx(mse / real.numel(), rel=1e-5)
    assert error["psnr_db"] == pytest.approx(10 * math.log10(2**2 / error["mse"]))


def test_a_classifier_of_real_images_sees_the_class_of_the_samples(dataset, monkeypatch):
    arguments = dict(steps=2, guidance=2.0, width=8, epochs=6, learning_rate=0.05, strategy="none", seed=0)
    arguments["samples_per_class"] = 3
    pixels, labels, record = check_prior(untrained().freeze_(), dataset, **arguments)
    assert pixels.shape == (6, 1, 16, 16) and labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert record["samples"] == 6 and record["classifier_accuracy"] == 1.0

    def real(prior, labels, **_):
        return dataset.train.x(torch.tensor([int(label) for label in labels]))

    for sample, expected in ((real, 1.0), (lambda prior, labels, **_: real(prior, 1 - labels), 0.0)):
        monkeypatch.setattr("ld3m.evaluation.prior_quality.sample", sample)
        assert check_prior(untrained(), dataset, **arguments)[2]["sample_class_accuracy"] == expected


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ([0, 1, 2, 3, 4], None),
        ([1, 2, 3, 4, 0], r"a shows b, .*e shows a\); list its classes as positions \[4, 0, 1, 2, 3\] of the present"),
        ([2, 2, 2, 2, 2], "20% of the cases, which is chance, .*95% of real images: it is no prior of these classes"),
    ],
)
def test_a_prior_of_other_classes_or_in_another_order_is_refused(seen, message):
    labels = torch.arange(5).repeat(20)
    seen = torch.tensor(seen)[labels]
    record = {"sample_class_accuracy": (seen == labels).double().mean().item(), "classifier_accuracy": 0.95}
    with pytest.raises(IncompatiblePrior, match=message) if message else nullcontext():
        require_classes(record, labels, seen, tuple("abcde"))
