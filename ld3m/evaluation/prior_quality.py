"""Measures a prior: what its autoencoder loses, and whether its samples show the class they were asked for."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ld3m.data.dataset import Dataset
from ld3m.evaluation.training import accuracy, train
from ld3m.method.sampler import sample
from ld3m.models.diffusion_prior import IncompatiblePrior, Prior, prior_chunk_size
from ld3m.models.gan import Generator
from ld3m.models.networks import build
from ld3m.runtime.seeds import derive, generator

Check = tuple[Tensor, Tensor, dict[str, float]]


def check_prior(
    prior: Prior, dataset: Dataset, *, samples_per_class: int, steps: int, guidance: float, seed: int, **classifier: Any
) -> Check:
    """Draw guided samples of a diffusion prior in `steps` steps and measure how often a ConvNet, trained on the real
    training images, sees the requested class in them.

    `classifier` holds the ConvNet's `width` and the `epochs`, `learning_rate` and `strategy` of its training.

    Returns
    -------
    The samples (samples_per_class * classes, C, H, W) in [-1, 1] with the classes in turn; their labels; and a record
    with their number `samples`, the accuracy on them `sample_class_accuracy`, and that on real validation images
    `classifier_accuracy`, which is the ceiling. Both are in [0, 1].

    Raises
    ------
    IncompatiblePrior
        Samples show the class asked for no more often than by chance while the ConvNet knows real images: the prior is
        none of these classes, or in another order, which is then proposed.
    """
    labels = torch.arange(len(dataset.train.classes)).repeat(samples_per_class)
    size_px = dataset.train.shape[-1]
    chunk = prior_chunk_size(size_px, count=100)
    x = sample(prior, labels, size_px=size_px, steps=steps, guidance=guidance, render_batch=chunk, seed=seed)
    record, seen = _classified(x, labels, dataset, seed=seed, **classifier)
    require_classes(record, labels, seen, dataset.train.classes)
    return x, labels, record


def check_gan(gan: Generator, dataset: Dataset, *, samples_per_class: int, seed: int, **classifier: Any) -> Check:
    """Do what `check_prior` does with samples of a GAN, clamped to [-1, 1]."""
    labels = torch.arange(gan.classes).repeat(samples_per_class)
    noise = torch.randn(len(labels), gan.noise_width, generator=generator(seed, "gan samples"))
    noise = noise.to(dataset.train.device)
    x = torch.cat([gan(*part) for part in zip(noise.split(100), labels.split(100), strict=True)]).clamp(-1, 1)
    return x, labels, _classified(x, labels, dataset, seed=seed, **classifier)[0]


def _classified(
    x: Tensor, labels: Tensor, dataset: Dataset, *, width: int, seed: int, **recipe: Any
) -> tuple[dict[str, float], Tensor]:
    """The record, and the classes (N,) that the ConvNet sees in the samples."""
    real, validation, normalization = dataset.train, dataset.validation, dataset.normalization
    seed, (channels, size_px, _) = derive(seed, "check"), real.shape
    size = {"channels": channels, "size_px": size_px, "classes": len(real.classes), "width": width}
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
    return record, seen


def require_classes(record: dict[str, float], labels: Tensor, seen: Tensor, names: tuple[str, ...]) -> None:
    """IncompatiblePrior where the samples of the classes `labels` (N,) show others, `seen` (N,): see `check_prior`."""
    chance = 1 / len(names)
    if record["sample_class_accuracy"] > 1.5 * chance or record["classifier_accuracy"] < 3 * chance:
        return
    counts = torch.stack([torch.bincount(seen[labels == label], minlength=len(names)) for label in range(len(names))])
    shown = counts.argmax(1)  # the class that most samples of each class show
    problem = (
        f"the prior's samples show the class asked for in {record['sample_class_accuracy']:.0%} of the cases, which is "
        f"chance, while the classifier knows {record['classifier_accuracy']:.0%} of real images"
    )
    if len(shown.unique()) == len(names) and counts.max(1).values.sum() > len(labels) / 2:
        asked = ", ".join(f"{name} shows {names[k]}" for name, k in zip(names, shown.tolist(), strict=True))
        order = f"list its classes as positions {shown.argsort().tolist()} of the present list"
        raise IncompatiblePrior(f"{problem}: its classes are in another order ({asked}); {order}")
    raise IncompatiblePrior(f"{problem}: it is no prior of these classes, or is not trained")


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
