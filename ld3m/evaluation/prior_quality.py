"""Measure a prior: what its autoencoder loses, and whether its samples show the class they were asked for."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ld3m.data.dataset import Dataset
from ld3m.evaluation.training import accuracy, train
from ld3m.method.sampler import sample
from ld3m.models.diffusion_prior import Prior, prior_chunk_size
from ld3m.models.gan import Generator
from ld3m.models.networks import build
from ld3m.runtime.seeds import derive, generator


def sample_class_accuracy(
    x: Tensor,
    labels: Tensor,
    dataset: Dataset,
    *,
    width: int,
    epochs: int,
    learning_rate: float,
    strategy: str,
    seed: int,
) -> dict[str, float]:
    """Measure how often a ConvNet trained on the real training images sees the requested class in samples.

    Parameters
    ----------
    x, labels : samples (N, C, H, W) in [-1, 1] and the requested labels (N,)
    dataset : of the real images
    width, epochs, learning_rate, strategy, seed : of the ConvNet and its training

    Returns
    -------
    `samples`, their number; `sample_class_accuracy`, the accuracy on them; and `classifier_accuracy`, that on real
    validation images, which is the ceiling. Both are in [0, 1].
    """
    real, normalization = dataset.train, dataset.normalization
    channels, size_px = real.shape[:2]
    seed = derive(seed, "check")
    network = build(
        "convnet",
        channels=channels,
        size_px=size_px,
        classes=len(real.classes),
        width=width,
        seed=seed,
        device=real.device,
    )
    network = train(
        network,
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
        seed=seed,
    )
    samples, validation = normalization.normalize(x), partial(dataset.validation.normalized, normalization)
    return {
        "samples": len(labels),
        "sample_class_accuracy": accuracy(network, samples.__getitem__, labels),
        "classifier_accuracy": accuracy(network, validation, dataset.validation.labels),
    }


def check_prior(
    prior: Prior, dataset: Dataset, *, samples_per_class: int, steps: int, guidance: float, seed: int, **classifier
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Draw guided samples of a diffusion prior and measure them.

    Parameters
    ----------
    steps, guidance : of the sampler
    classifier : the further arguments of `sample_class_accuracy`

    Returns
    -------
    The samples (samples_per_class * classes, C, H, W) in [-1, 1] with the classes in turn, their labels, and the record
    of `sample_class_accuracy`.
    """
    count, size_px = len(dataset.train.classes), dataset.train.shape[-1]
    labels = torch.arange(count).repeat(samples_per_class)
    chunk = prior_chunk_size(size_px, count=100)
    x = sample(prior, labels, size_px=size_px, steps=steps, guidance=guidance, render_batch=chunk, seed=seed)
    return x, labels, sample_class_accuracy(x, labels, dataset, seed=seed, **classifier)


def check_gan(
    gan: Generator, dataset: Dataset, *, samples_per_class: int, seed: int, **classifier
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Draw samples of a GAN, clamped to [-1, 1], and measure them; returns what `check_prior` returns."""
    labels = torch.arange(gan.classes).repeat(samples_per_class)
    noise = torch.randn(len(labels), gan.noise_width, generator=generator(seed, "gan samples"))
    noise = noise.to(dataset.train.device)
    x = torch.cat([gan(*part) for part in zip(noise.split(100), labels.split(100), strict=True)]).clamp(-1, 1)
    return x, labels, sample_class_accuracy(x, labels, dataset, seed=seed, **classifier)


@torch.no_grad()
def reconstruct(prior: Prior, x: Tensor) -> Tensor:
    """Encode, quantise and decode images x, clamped to [-1, 1]."""
    parts = x.split(prior_chunk_size(x.shape[-1]))
    return torch.cat([prior.decode(prior.encode(part)).clamp(-1, 1) for part in parts])


def reconstruction_error(x: Tensor, reconstructed: Tensor) -> dict[str, float]:
    """Mean squared error on the scale [-1, 1], and the peak signal-to-noise ratio in dB (peak to peak is 2)."""
    mse = mse_loss(reconstructed, x).item()
    return {"mse": mse, "psnr_db": 10 * math.log10(4 / mse)}


def spread(x: Tensor, labels: Tensor) -> float:
    """The mean Euclidean distance between two images x (N, C, H, W) of one class, averaged over the classes."""
    distances = [torch.pdist(x[labels == label].flatten(1)).mean() for label in labels.unique()]
    return torch.stack(distances).mean().item()
