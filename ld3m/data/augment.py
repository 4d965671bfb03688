"""DSA, differentiable Siamese augmentation (Zhao and Bilen, 2021): one operation a call, replayable on any batch.

Works on normalized images (N, C, H, W). The random parameters are fractions, factors and angles, not pixels:
one `Augmentation` means the same for real and synthetic images of any size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

CROP = 0.125  # largest shift, of the side
CUTOUT = 0.5  # side of the hole, of the side of the image


@dataclass(frozen=True, eq=False)
class Augmentation:
    """One operation, or "none", and its parameters: CPU tensors (count,), a value an image or one for all."""

    operation: str
    parameters: dict[str, Tensor]


def parse_strategy(strategy: str) -> tuple[str, ...]:
    """The operations of e.g. "color_crop_flip", in that order; () for "none".

    ValueError for an unknown or a repeated operation.
    """
    operations = () if strategy == "none" else tuple(strategy.split("_"))
    if not set(operations) <= set(OPERATIONS) or len(set(operations)) < len(operations):
        raise ValueError(f'strategy={strategy!r}: use "none", or join by "_", each once: {", ".join(OPERATIONS)}')
    return operations


def draw(strategy: str, *, count: int, generator: Generator) -> Augmentation:
    """Draw one operation uniformly from the strategy, and its random parameters.

    Parameters
    ----------
    strategy
        "none", or operations joined by "_" (`parse_strategy`).
    count
        Draw parameters for so many images; those of one are shared by every image of any batch.
    generator
        On the CPU.
    """
    operations = parse_strategy(strategy)
    if not operations:
        return Augmentation("none", {})
    operation = operations[int(torch.randint(len(operations), (), generator=generator))]
    parameters = {
        name: low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        for name, (low, high) in OPERATIONS[operation][1].items()
    }
    return Augmentation(operation, parameters)


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """`images` (N, C, H, W) after an augmentation drawn with count 1 or N: same shape, dtype and device; twice
    differentiable."""
    if augmentation.operation == "none":
        return images
    return OPERATIONS[augmentation.operation][0](images, **augmentation.parameters)


def augment_each(images: Tensor, counts: Sequence[int], augmentations: Sequence[Augmentation]) -> Tensor:
    """The first `counts[0]` images after the first augmentation, the next after the second ...; one call an
    operation."""
    if len(augmentations) == 1:
        return augment(images, augmentations[0])
    before, after = images.split(list(counts)), {}
    for operation in dict.fromkeys(augmentation.operation for augmentation in augmentations):
        chosen = [k for k, augmentation in enumerate(augmentations) if augmentation.operation == operation]
        names = augmentations[chosen[0]].parameters
        parameters = {
            name: torch.cat([augmentations[k].parameters[name].expand(counts[k]) for k in chosen]) for name in names
        }
        joined = augment(torch.cat([before[k] for k in chosen]), Augmentation(operation, parameters))
        after |= zip(chosen, joined.split([counts[k] for k in chosen]), strict=True)
    return torch.cat([after[k] for k in range(len(augmentations))])


def _color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    images = images + _per_image(brightness, images)
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * _per_image(saturation, images) + gray
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * _per_image(contrast, images) + mean


def _crop(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    def sources(fraction: Tensor, side: int) -> Tensor:  # (count, side)
        largest = int(CROP * side + 0.5)
        shift = _whole(fraction, 2 * largest + 1, images) - largest
        return torch.arange(side, device=images.device) + shift[:, None]

    height, width = images.shape[2:]
    return _pixels(pad(images, (1, 1, 1, 1)), sources(y, height)[:, :, None], sources(x, width)[:, None, :])


def _cutout(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    def covered(fraction: Tensor, side: int) -> Tensor:  # (count, side)
        hole = int(CUTOUT * side + 0.5)
        center = _whole(fraction, side + 1 - hole % 2, images)  # any pixel; of an even hole, any edge of a pixel
        offset = torch.arange(side, device=images.device) - (center - hole // 2)[:, None]
        return (offset >= 0) & (offset < hole)

    height, width = images.shape[2:]
    return images.masked_fill(covered(y, height)[:, None, :, None] & covered(x, width)[:, None, None, :], 0)


def _flip(images: Tensor, position: Tensor) -> Tensor:
    flipped = (position < 0.5).to(images.device).view(-1, 1, 1, 1)
    return torch.where(flipped, images.flip(3), images)


def _scale(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pixel p shows the source at factor * p from the center: a factor above 1 shrinks the picture. Bilinear, zeros
    outside; each axis by itself, so it is a matrix from either side."""

    def weights(factor: Tensor, side: int) -> Tensor:  # (count, 1, side, side): of each source pixel in each pixel
        pixel = torch.arange(side, device=images.device, dtype=precise)
        source = factor.to(images.device, precise)[:, None] * (pixel - (side - 1) / 2) + (side - 1) / 2
        return (1 - (source[:, :, None] - pixel).abs()).clamp(min=0).to(images.dtype)[:, None]

    precise = torch.promote_types(images.dtype, torch.float32)  # half precision cannot address pixels
    height, width = images.shape[2:]
    return weights(y, height) @ images @ weights(x, width).transpose(2, 3)


def _rotate(images: Tensor, angle_rad: Tensor) -> Tensor:
    """Bilinear samples at the rotated position of every pixel, zeros outside.

    Not torch's grid_sample: its backward pass is not deterministic on CUDA.
    """
    height, width = images.shape[2:]
    precise = torch.promote_types(images.dtype, torch.float32)  # half precision cannot address pixels
    angle = angle_rad.to(images.device)[:, None, None]
    cos, sin = angle.cos().to(precise), angle.sin().to(precise)  # (count, 1, 1)
    x = torch.arange(width, device=images.device, dtype=precise) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=precise)[:, None] - (height - 1) / 2
    columns = cos * x - sin * y + (width - 1) / 2  # (count, height, width)
    rows = sin * x + cos * y + (height - 1) / 2
    left, top = columns.floor(), rows.floor()
    right_weight, bottom_weight = columns - left, rows - top
    framed, sampled = pad(images, (1, 1, 1, 1)), torch.zeros_like(images)
    for down, row_weight in ((0, 1 - bottom_weight), (1, bottom_weight)):
        for across, column_weight in ((0, 1 - right_weight), (1, right_weight)):
            weight = (row_weight * column_weight).to(images.dtype)[:, None]
            sampled = sampled + weight * _pixels(framed, top.long() + down, left.long() + across)
    return sampled


def _pixels(framed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels (N, C, H, W) at whole positions, which broadcast to (count, H, W). The frame of zeros around the
    images stands for all that is outside."""
    count, channels, height, width = framed.shape
    index = (rows.clamp(-1, height - 2) + 1) * width + columns.clamp(-1, width - 2) + 1
    index = index.flatten(1)[:, None].expand(count, channels, -1)
    return framed.flatten(2).gather(2, index).view(count, channels, height - 2, width - 2)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device, images.dtype).view(-1, 1, 1, 1)


def _whole(fraction: Tensor, choices: int, images: Tensor) -> Tensor:
    """Fractions in [0, 1) -> whole numbers in [0, choices), each equally likely, on the images' device."""
    return (fraction * choices).floor().long().to(images.device)


OPERATIONS = {  # name: (apply it, the ranges of its parameters)
    "color": (_color, {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)}),
    "crop": (_crop, {"x": (0, 1), "y": (0, 1)}),  # where in the range of possible whole-pixel positions
    "cutout": (_cutout, {"x": (0, 1), "y": (0, 1)}),
    "flip": (_flip, {"position": (0, 1)}),
    "scale": (_scale, {"x": (1 / 1.2, 1.2), "y": (1 / 1.2, 1.2)}),
    "rotate": (_rotate, {"angle_rad": (-math.radians(15), math.radians(15))}),
}
