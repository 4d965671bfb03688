"""Measures a prior: the share of its samples that a ConvNet trained on real images gives the asked class."""

from functools import partial

import torch
from torch import Tensor

from ld3m.data.dataset import Dataset
from ld3m.evaluation.training import accuracy, train
from ld3m.method.sampler import sample
from ld3m.models.diffusion_prior import Prior, prior_chunk_size
from ld3m.models.gan import Generator
from ld3m.models.networks import build
from ld3m.runtime.seeds import derive, generator


def recognise(
    pixels: Tensor,
    labels: Tensor,
    dataset: Dataset,
    *,
    width: int,
    epochs: int,
    learning_rate: float,
    strategy: str,
    seed: int,
) -> dict[str, float]:
    """How a ConvNet trained on the real training images sees samples: pixels (N, C, H, W), asked labels (N,).

    `recognised` is the share of samples whose class is the asked one, `classifier_accuracy` that of real validation
    images, both in [0, 1].
    """
    real, normalization = dataset.train, dataset.normalization
    channels, size_px = real.shape[:2]
    network = train(
        build(
            "convnet",
            channels=channels,
            size_px=size_px,
            classes=len(real.classes),
            width=width,
            seed=derive(seed, "check"),
            device=real.device,
        ),
        partial(real.normalized, normalization),
        real.labels,
        epochs=epochs,
        batch=64,
        learning_rate=learning_rate,
        momentum=0.9,
        weight_decay=5e-4,
        warm_up=True,
        ema_decay=None,
        strategy=strategy,
        seed=derive(seed, "check"),
    )
    images, validation = normalization.normalize(pixels), partial(dataset.validation.normalized, normalization)
    return {
        "samples": len(labels),
        "recognised": accuracy(network, images.__getitem__, labels),
        "classifier_accuracy": accuracy(network, validation, dataset.validation.labels),
    }


def check_prior(
    prior: Prior,
    dataset: Dataset,
    *,
    samples_per_class: int,
    steps: int,
    guidance: float,
    width: int,
    epochs: int,
    learning_rate: float,
    strategy: str,
    seed: int,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Guided samples, their asked labels, and how a ConvNet trained on the real training images sees them.

    Samples are pixels (samples_per_class * classes, C, H, W), the classes in turn. The record holds `recognised`, the
    share of samples whose class is the asked one, and `classifier_accuracy` on real validation images.
    """
    count, size_px = len(dataset.train.classes), dataset.train.shape[-1]
    labels = torch.arange(count).repeat(samples_per_class)
    drawing = dict(steps=steps, guidance=guidance, render_batch=prior_chunk_size(size_px, count=100), seed=seed)
    pixels = sample(prior, labels, size_px=size_px, **drawing)
    training = dict(width=width, epochs=epochs, learning_rate=learning_rate, strategy=strategy, seed=seed)
    return pixels, labels, recognise(pixels, labels, dataset, **training)


def check_gan(
    gan: Generator, dataset: Dataset, *, samples_per_class: int, seed: int, **training
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Samples, their asked labels, and how a classifier sees them; `training` is what `recognise` needs.

    Samples are pixels (samples_per_class * classes, C, H, W) clamped to [-1, 1], the classes in turn.
    """
    labels = torch.arange(gan.classes).repeat(samples_per_class)
    noise = torch.randn(len(labels), gan.noise_width, generator=generator(seed, "gan samples"))
    noise = noise.to(dataset.train.device)
    pixels = torch.cat([gan(*part) for part in zip(noise.split(100), labels.split(100), strict=True)]).clamp(-1, 1)
    return pixels, labels, recognise(pixels, labels, dataset, seed=seed, **training)
