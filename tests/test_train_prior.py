"""Training the prior: it learns, repeats bit for bit, and measures itself by the formulas."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import make_halves
from torch.testing import assert_close

from ld3m.data.subsets import imagenet_classes
from ld3m.evaluation.prior_quality import check_prior, reconstruct, reconstruction_error, require_classes
from ld3m.models.diffusion_prior import IncompatiblePrior, build_prior
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser


@pytest.fixture(scope="module")
def dataset():
    return make_halves(background=60, brightness=(180, 181))


def untrained():
    widths = dict(autoencoder_widths=(8, 8, 16), unet_widths=(32, 32), unet_blocks=1, conditioning_width=16)
    return build_prior(channels=1, classes=2, size_px=16, latent_channels=3, codebook=16, seed=0, **widths)


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
    arguments |= dict(samples_per_class=12, classes=[7, 3])
    prior = untrained().freeze_()
    with pytest.raises(IncompatiblePrior, match="which is chance, but the classifier recognizes 100% of real images"):
        check_prior(prior, dataset, **arguments)
    without_classes = replace(prior, embedding=torch.nn.Embedding.from_pretrained(torch.zeros(1, 16)))
    pixels, labels, record = check_prior(without_classes, dataset, **arguments)  # nothing can be asked for
    assert pixels.shape == (24, 1, 16, 16) and labels.tolist() == [0, 1] * 12
    assert record["samples"] == 24 and record["classifier_accuracy"] == 1.0

    def real(prior, labels, **_):
        return dataset.train.x(torch.tensor([int(label) for label in labels]))

    monkeypatch.setattr("ld3m.evaluation.prior_quality.sample", real)
    assert check_prior(prior, dataset, **arguments)[2]["sample_class_accuracy"] == 1
    monkeypatch.setattr("ld3m.evaluation.prior_quality.sample", lambda prior, labels, **_: real(prior, 1 - labels))
    with pytest.raises(IncompatiblePrior, match=r"upper shows lower in 100%, .*write prior.classes: \[3, 7\]"):
        check_prior(prior, dataset, **arguments)


def confusion(shown, share, *, samples=50, classes=10, confused=0.0):
    """Class k shows class `shown[k]` in a share of its samples, the next of these in another, and the rest evenly."""
    rows = torch.full((classes, classes), (1 - share - confused) / classes)
    for k, seen in enumerate(shown):
        rows[k, seen] += share
        rows[k, seen ^ 1] += confused
    return (samples * rows).round()


@pytest.mark.parametrize(
    ("counts", "known", "moved"),
    [
        (confusion([0, 1, 5, 3, 4, 2, 6, 7, 8, 9], 0.9), 0.95, "c shows f in 100%, f shows c in 100%"),
        (confusion([1, 2, 0, 3, 4, 6, 5, 7, 8, 9], 0.5), 0.5, "a shows b in .*b shows c.*c shows a.*f shows g.*g sho"),
        (confusion([1, 2, 3, 4, 5, 6, 7, 0, 8, 9], 0.9), 0.95, "a shows b .*h shows a in 100%"),
        (confusion(range(10), 0.45, confused=0.45), 0.6, None),  # the classifier tells no cat from a dog
        (confusion(range(10), 0.3, confused=0.4), 0.6, None),
        (confusion(range(10), 0.3), 0.35, None),
        (confusion([1, 0, *range(2, 10)], 0.9, samples=3), 0.95, None),  # may be by chance
        (torch.zeros(10, 10).index_fill_(1, torch.tensor(4), 50), 0.95, "10% of the prior's samples .*chance"),
        (confusion([0, 0], 0.9, classes=2), 0.95, "50% of the prior's samples .*chance"),
        (torch.zeros(10, 10).index_fill_(1, torch.tensor(4), 50), 0.2, None),  # the classifier knows nothing
    ],
)
def test_a_prior_of_other_classes_or_in_another_order_is_refused(counts, known, moved):
    names = "abcdefghij"[: len(counts)]
    with pytest.raises(IncompatiblePrior, match=moved) if moved else nullcontext():
        require_classes(counts, known, names=names, classes=range(len(counts)))


def test_the_order_of_exchanged_classes_is_proposed_where_it_is_not_known_by_name():
    shown, given = torch.tensor([3, 1, 0, 2]), [40, 41, 42, 43]
    proposed = [42, 41, 43, 40]  # class 0 is what 42, asked for as class 2, shows
    with pytest.raises(IncompatiblePrior, match=re.escape(f"write prior.classes: {proposed}")):
        require_classes(confusion(shown.tolist(), 0.9, classes=4), 0.9, names="abcd", classes=given)
    names = [imagenet_classes()[index]["wnid"] for index in given]
    for classes in (None, given):
        with pytest.raises(IncompatiblePrior, match="in another order: train it again, or change prior.source"):
            require_classes(confusion(shown.tolist(), 0.9, classes=4), 0.9, names=names, classes=classes)
