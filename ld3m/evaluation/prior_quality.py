"""Measures a prior: what its autoencoder loses, and whether its samples show the class they were asked for."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ld3m.data.dataset import Dataset
from ld3m.data.subsets import imagenet_indices
from ld3m.evaluation.statistics import permutation
from ld3m.evaluation.training import accuracy, train
from ld3m.method.sampler import sample
from ld3m.models.diffusion_prior import IncompatiblePrior, Prior, prior_chunk_size
from ld3m.models.gan import Generator
from ld3m.models.networks import build
from ld3m.runtime.seeds import derive, generator

Check = tuple[Tensor, Tensor, dict[str, float]]


def check_prior(
    prior: Prior,
    dataset: Dataset,
    *,
    classes: Sequence[int] | None,
    samples_per_class: int,
    steps: int,
    guidance: float,
    seed: int,
    **classifier: Any,
) -> Check:
    """Draw guided samples of a diffusion prior and measure how often a ConvNet sees the class asked for in them.

    The ConvNet is trained on the real training images.

    Parameters
    ----------
    classes
        Of a prior from elsewhere, its class for each class of the data set; None for a prior that was trained here.
    steps, guidance
        Of `sampler.reverse`.
    **classifier
        The ConvNet's `width`, and `epochs`, `learning_rate` and `strategy` of its training.

    Returns
    -------
    tuple
        The samples (samples_per_class * classes, C, H, W) in [-1, 1], with the classes in turn; their labels; and a
        record: the number of samples, the accuracy on them, and on real validation images (the ceiling), in [0, 1].

    Raises
    ------
    IncompatiblePrior
        Where the samples show other classes, see `require_classes`.
    """
    labels = torch.arange(len(dataset.train.classes)).repeat(samples_per_class)
    size_px = dataset.train.shape[-1]
    chunk = prior_chunk_size(size_px, count=100)
    x = sample(prior, labels, size_px=size_px, steps=steps, guidance=guidance, render_batch=chunk, seed=seed)
    record, counts = _classified(x, labels, dataset, seed=seed, **classifier)
    if prior.is_conditional:
        require_classes(counts, record["classifier_accuracy"], names=dataset.train.classes, classes=classes)
    return x, labels, record


def check_gan(gan: Generator, dataset: Dataset, *, samples_per_class: int, seed: int, **classifier: Any) -> Check:
    """Measure samples of a GAN, clamped to [-1, 1], as `check_prior` does."""
    labels = torch.arange(gan.classes).repeat(samples_per_class)
    noise = torch.randn(len(labels), gan.noise_width, generator=generator(seed, "gan samples"))
    noise = noise.to(dataset.train.device)
    x = torch.cat([gan(*part) for part in zip(noise.split(100), labels.split(100), strict=True)]).clamp(-1, 1)
    return x, labels, _classified(x, labels, dataset, seed=seed, **classifier)[0]


def _classified(
    x: Tensor, labels: Tensor, dataset: Dataset, *, width: int, seed: int, **recipe: Any
) -> tuple[dict[str, float], Tensor]:
    """The record, and how many samples of each class (row) show each class (column)."""
    real, validation, normalization = dataset.train, dataset.validation, dataset.normalization
    seed, (channels, size_px, _), classes = derive(seed, "check"), real.shape, len(real.classes)
    size = {"channels": channels, "size_px": size_px, "classes": classes, "width": width}
    network = build("convnet", **size, seed=seed, device=real.device)
    recipe |= {"batch": 64, "momentum": 0.9, "weight_decay": 5e-4, "warm_up": True, "ema_decay": None}
    network = train(network, partial(real.normalized, normalization), real.labels, seed=seed, **recipe)
    with torch.no_grad():
        seen = torch.cat([network(normalization.normalize(part)).argmax(1).cpu() for part in x.split(50)])
    record = {
        "samples": len(labels),
        "sample_class_accuracy": (seen == labels).double().mean().item(),
        "classifier_accuracy": accuracy(network, partial(validation.normalized, normalization), validation.labels),
    }
    return record, torch.bincount(labels * classes + seen, minlength=classes**2).view(classes, classes)


def require_classes(
    counts: Tensor, known: float, *, names: Sequence[str], classes: Sequence[int] | None = None
) -> None:
    """Raise IncompatiblePrior where the samples of a prior show other classes than those asked for.

    Classes may be exchanged (`statistics.permutation`). A prior is at chance if 20 samples or more show the class asked
    for hardly more often than 1 in K, while real images are recognized.

    Parameters
    ----------
    counts
        (K, K): how many samples of each class (row) show each class (column) to a classifier.
    known
        The share of real images that this classifier recognizes, in [0, 1].
    classes
        Of `check_prior`.
    """
    chance, counts = 1 / len(names), counts.double()
    if shown := permutation(counts):
        moved = [k for k, seen in enumerate(shown) if seen != k]
        pairs = [f"{names[k]} shows {names[shown[k]]} in {counts[k, shown[k]] / counts[k].sum():.0%}" for k in moved]
        if classes is None or tuple(classes) == imagenet_indices(names):  # trained here, or found by name
            cure = "it has its classes in another order: train it again, or change prior.source"
        else:
            cure = f"write prior.classes: {[classes[shown.index(k)] for k in range(len(names))]}"
        shortened = pairs[:10] + ["..."] * (len(pairs) > 10)
        raise IncompatiblePrior(f"classes of the prior are exchanged ({', '.join(shortened)}): {cure}")
    recognized = (counts.trace() / counts.sum()).item()
    is_known = known >= min(3 * chance, (1 + chance) / 2)
    if counts.sum() >= 20 and is_known and recognized <= min(1.5 * chance, chance + (known - chance) / 8):
        raise IncompatiblePrior(
            f"{recognized:.0%} of the prior's samples show the class asked for, which is chance, but the classifier "
            f"recognizes {known:.0%} of real images: the prior has other classes or is not trained; change "
            "prior.source or prior.classes, or train longer"
        )


@torch.no_grad()
def reconstruct(prior: Prior, x: Tensor) -> Tensor:
    """Encode, quantize and decode images x (N, C, H, W) in [-1, 1], to which the result is clamped."""
    parts = x.split(prior_chunk_size(x.shape[-1]))
    return torch.cat([prior.decode(prior.encode(part)).clamp(-1, 1) for part in parts])


def reconstruction_error(x: Tensor, reconstructed: Tensor) -> dict[str, float]:
    """Compute the mean squared error on [-1, 1], and the peak signal-to-noise ratio in dB (peak to peak is 2)."""
    mse = mse_loss(reconstructed, x).item()
    return {"mse": mse, "psnr_db": 10 * math.log10(4 / mse)}


def spread(x: Tensor, labels: Tensor) -> float:
    """Compute the mean Euclidean distance between two images x (N, C, H, W) of a class, averaged over the classes."""
    distances = [torch.pdist(x[labels == label].flatten(1)).mean() for label in labels.unique()]
    return torch.stack(distances).mean().item()
