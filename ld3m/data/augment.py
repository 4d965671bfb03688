"""DSA, differentiable Siamese augmentation: one operation a call, replayable on any batch.

Works on normalized images (N, C, H, W). The random parameters are fractions, factors and angles, not pixels:
one `Augmentation` means the same for real and synthetic images of any size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

FLIP_PROBABILITY = 0.5
SCALE = 1.2  # each axis by a factor in [1/SCALE, SCALE]
ROTATE_DEGREES = 15.0  # either way
CROP = 0.125  # largest shift, of the side
CUTOUT = 0.5  # side of the hole, of the side of the image
BRIGHTNESS = 1.0  # width of the interval added, centred on 0
SATURATION = 2.0  # factor in [0, SATURATION]
CONTRAST = 0.5  # factor in [CONTRAST, 1 + CONTRAST]


@dataclass(frozen=True, eq=False)
class Augmentation:
    """One operation, or "none", and its parameters: CPU tensors (count,), a value an image or one for all."""

    operation: str
    parameters: dict[str, Tensor]


def parse_strategy(strategy: str) -> tuple[str, ...]:
    """The operations of e.g. "color_crop_flip", in that order; () for "none".

    ValueError for an unknown or a repeated operation.
    """
    if strategy == "none":
        return ()
    operations = tuple(strategy.split("_"))
    allowed = f'use "none" or names joined by "_" out of {", ".join(OPERATIONS)}'
    for operation in operations:
        if operation not in OPERATIONS:
            raise ValueError(f"strategy {strategy!r} has the unknown operation {operation!r}; {allowed}")
    if len(set(operations)) < len(operations):
        raise ValueError(f"strategy {strategy!r} repeats an operation; {allowed}, each once")
    return operations


def draw(strategy: str, *, count: int, generator: Generator) -> Augmentation:
    """One operation drawn uniformly from the strategy, with parameters for `count` images.

    count=1 is one draw shared by every image of any batch. `generator` is a CPU generator. ValueError for a
    strategy that `parse_strategy` refuses or a count below 1.
    """
    operations = parse_strategy(strategy)
    if count < 1:
        raise ValueError(f"count={count} must be the number of images, or 1 to share one draw")
    if not operations:
        return Augmentation("none", {})
    operation = operations[int(torch.randint(len(operations), (), generator=generator))]
    draw_parameters, _ = OPERATIONS[operation]
    return Augmentation(operation, draw_parameters(count, generator))


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """`images` (N, C, H, W) after the augmentation: same shape, dtype, device; twice differentiable.

    ValueError if the parameters were drawn for another count than 1 or N.
    """
    for values in augmentation.parameters.values():
        if len(values) not in (1, len(images)):
            raise ValueError(
                f"the {augmentation.operation} was drawn with count={len(values)}, but the batch has "
                f"{len(images)} images; draw with count={len(images)}, or with count=1 to share one draw"
            )
    if augmentation.operation == "none":
        return images
    _, apply = OPERATIONS[augmentation.operation]
    return apply(images, **augmentation.parameters)


def augment_each(images: Tensor, counts: Sequence[int], augmentations: Sequence[Augmentation]) -> Tensor:
    """The first `counts[0]` images after the first augmentation, the next after the second ...: one call an operation.

    ValueError as `augment`.
    """
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


def _uniform(low: float, high: float, count: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def _draw_color(count: int, generator: Generator) -> dict[str, Tensor]:
    return {
        "brightness": _uniform(-BRIGHTNESS / 2, BRIGHTNESS / 2, count, generator),
        "saturation": _uniform(0, SATURATION, count, generator),
        "contrast": _uniform(CONTRAST, 1 + CONTRAST, count, generator),
    }


def _color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    images = images + _per_image(brightness, images)
    gray = images.mean(dim=1, keepdim=True)
    images = (images - gray) * _per_image(saturation, images) + gray
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * _per_image(contrast, images) + mean


def _draw_position(count: int, generator: Generator) -> dict[str, Tensor]:
    """Where in the range of possible whole-pixel positions, as fractions in [0, 1)."""
    return {"x": _uniform(0, 1, count, generator), "y": _uniform(0, 1, count, generator)}


def _crop(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    def sources(fraction: Tensor, side: int) -> Tensor:  # (count, side)
        largest = _rounded(CROP * side)
        shift = _whole(fraction, 2 * largest + 1, images) - largest
        return torch.arange(side, device=images.device) + shift[:, None]

    height, width = images.shape[2:]
    index = _index(images, sources(y, height)[:, :, None], sources(x, width)[:, None, :])
    return _take(_framed(images), index, images)


def _cutout(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    def covered(fraction: Tensor, side: int) -> Tensor:  # (count, side)
        hole = _rounded(CUTOUT * side)
        centre = _whole(fraction, side + 1 - hole % 2, images)  # any pixel; of an even hole, any edge of a pixel
        first = centre - hole // 2
        offset = torch.arange(side, device=images.device) - first[:, None]
        return (offset >= 0) & (offset < hole)

    height, width = images.shape[2:]
    return images.masked_fill(covered(y, height)[:, None, :, None] & covered(x, width)[:, None, None, :], 0)


def _draw_flip(count: int, generator: Generator) -> dict[str, Tensor]:
    return {"flipped": _uniform(0, 1, count, generator) < FLIP_PROBABILITY}


def _flip(images: Tensor, flipped: Tensor) -> Tensor:
    return torch.where(flipped.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def _draw_scale(count: int, generator: Generator) -> dict[str, Tensor]:
    return {axis: _uniform(1 / SCALE, SCALE, count, generator) for axis in ("x", "y")}


def _scale(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pixel p shows the source at factor * p from the centre: a factor above 1 shrinks the picture. Bilinear, zeros
    outside; each axis by itself, so it is a matrix from either side."""

    def weights(factor: Tensor, side: int) -> Tensor:  # (count, 1, side, side): of each source pixel in each pixel
        pixel = torch.arange(side, device=images.device, dtype=precise)
        source = factor.to(images.device, precise)[:, None] * (pixel - (side - 1) / 2) + (side - 1) / 2
        return (1 - (source[:, :, None] - pixel).abs()).clamp(min=0).to(images.dtype)[:, None]

    precise = torch.promote_types(images.dtype, torch.float32)  # half precision cannot address pixels
    height, width = images.shape[2:]
    return weights(y, height) @ images @ weights(x, width).transpose(2, 3)


def _draw_rotate(count: int, generator: Generator) -> dict[str, Tensor]:
    largest = math.radians(ROTATE_DEGREES)
    return {"angle_rad": _uniform(-largest, largest, count, generator)}


def _rotate(images: Tensor, angle_rad: Tensor) -> Tensor:
    """Bilinear samples at the rotated position of every pixel, zeros outside.

    Not torch's grid_sample: its backward pass is not deterministic on CUDA and, in older releases, not
    differentiable.
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
    framed, index = _framed(images), _index(images, top.long(), left.long())
    sampled = torch.zeros_like(images)
    for down, row_weight in ((0, 1 - bottom_weight), (1, bottom_weight)):
        for across, column_weight in ((0, 1 - right_weight), (1, right_weight)):
            weight = (row_weight * column_weight).to(images.dtype)[:, None]
            sampled = sampled + weight * _take(framed, index + down * (width + 4) + across, images)
    return sampled


def _framed(images: Tensor) -> Tensor:
    """(N, C, (H+4) * (W+4)): the images, flattened, in a frame of two zeros, which stands for all that is outside."""
    return pad(images, (2, 2, 2, 2)).flatten(2)


def _index(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(count, H, W): where in the framed images whole positions are, which broadcast to that shape. One to the right
    or below is where that position's neighbour is."""
    height, width = images.shape[2:]
    return (rows.clamp(-2, height) + 2) * (width + 4) + columns.clamp(-2, width) + 2


def _take(framed: Tensor, index: Tensor, images: Tensor) -> Tensor:
    """The pixels at an index, in the shape of the images."""
    return framed.gather(2, index.flatten(1)[:, None].expand(*images.shape[:2], -1)).view(images.shape)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device, images.dtype).view(-1, 1, 1, 1)


def _whole(fraction: Tensor, choices: int, images: Tensor) -> Tensor:
    """Fractions in [0, 1) -> whole numbers in [0, choices), each equally likely, on the images' device."""
    return (fraction * choices).floor().long().to(images.device)


def _rounded(length_px: float) -> int:
    return int(length_px + 0.5)


OPERATIONS = {  # name: (draw parameters, apply them)
    "color": (_draw_color, _color),
    "crop": (_draw_position, _crop),
    "cutout": (_draw_position, _cutout),
    "flip": (_draw_flip, _flip),
    "scale": (_draw_scale, _scale),
    "rotate": (_draw_rotate, _rotate),
}
