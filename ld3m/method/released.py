"""Reproduce defects of the code that the authors released, each a switch of the spaces for the ablations.

Two more are in `spaces`: `encoder_input="normalized"` (the encoder was trained on [-1, 1]) and `clamp="hard"`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ld3m.data.dataset import Normalization
from ld3m.runtime.seeds import generator

REAL_MEAN, SYNTHETIC_MEAN = (0.485, 0.456, 0.406), (0.4377, 0.4438, 0.4728)


def shifted_normalization(normalization: Normalization) -> Normalization:
    """Shift the mean as the released code does: it subtracts another one from rendered images than from real ones."""
    shift = [synthetic - real for synthetic, real in zip(SYNTHETIC_MEAN, REAL_MEAN, strict=True)]
    return replace(normalization, mean=tuple(m + s for m, s in zip(normalization.mean, shift, strict=False)))


def redrawn_noise(render: Callable[[Tensor], Tensor], eps: Tensor, *, seed: int, step: int) -> Tensor:
    """Render with one new draw of `eps`, and take the gradient at another, which is the gradient of no loss."""
    measured, followed = (
        torch.randn(eps.shape, generator=generator(seed, "redrawn", place, step)).to(eps)
        for place in ("loss", "gradient")
    )
    with torch.no_grad():
        images = render(measured)
    images_followed = render(followed)
    return images + (images_followed - images_followed.detach())
