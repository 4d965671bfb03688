"""Is a prior good enough? A ConvNet trained on the real images says which class its samples show."""

from functools import partial

from torch import Tensor

from ld3m.data.dataset import Dataset
from ld3m.models.networks import build
from ld3m.runtime.seeds import derive
from ld3m.evaluation.training import accuracy, train


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
