"""DSA: every operation against a plain computation image by image, sharing, derivatives, drawing."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from ld3m.data.augment import OPERATIONS, augment, augment_each, draw, parse_strategy

ALL = "color_crop_cutout_flip_scale_rotate"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count=4, channels=3, height=9, width=9, dtype=torch.float64):
    return torch.randn(count, channels, height, width, dtype=dtype, generator=generator(1))


def plain(image, operation, p):
    """One image (C, H, W) and its parameters as floats, all in numpy."""
    channels, height, width = image.shape
    if operation == "flip":
        return image[:, :, ::-1] if p["position"] < 0.5 else image
    if operation == "color":
        image = image + p["brightness"]
        gray = image.sum(0) / channels
        image = gray + p["saturation"] * (image - gray)
        return image.mean() + p["contrast"] * (image - image.mean())
    if operation == "cutout":

        def covered(fraction, side):
            hole = (side + 1) // 2
            first = math.floor(fraction * (side if hole % 2 else side + 1)) - hole // 2
            return [first <= position < first + hole for position in range(side)]

        return np.where(np.outer(covered(p["y"], height), covered(p["x"], width)), 0, image)
    if operation == "crop":
        pad_x, pad_y = math.floor(width / 8 + 0.5), math.floor(height / 8 + 0.5)
        padded = np.pad(image, ((0, 0), (pad_y, pad_y), (pad_x, pad_x)))
        x, y = math.floor(p["x"] * (2 * pad_x + 1)), math.floor(p["y"] * (2 * pad_y + 1))
        return padded[:, y : y + height, x : x + width]
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            x, y = j + 0.5 - width / 2, i + 0.5 - height / 2
            if operation == "scale":
                x, y = p["x"] * x, p["y"] * y
            else:
                turned = (x + 1j * y) * np.exp(1j * p["angle_rad"])
                x, y = turned.real, turned.imag
            x, y = x - 0.5 + width / 2, y - 0.5 + height / 2
            for row in range(height):
                for column in range(width):
                    out[:, i, j] += image[:, row, column] * max(0, 1 - abs(row - y)) * max(0, 1 - abs(column - x))
    return out


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (7, 12)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_against_a_plain_computation(operation, height, width):
    images = random_images(height=height, width=width)
    for seed, count in ((0, 4), (1, 4), (2, 1), (3, 1)):
        augmentation = draw(operation, count=count, generator=generator(seed))
        for k, result in enumerate(augment(images, augmentation)):
            parameters = {name: values[k % count].item() for name, values in augmentation.parameters.items()}
            np.testing.assert_allclose(result.numpy(), plain(images[k].numpy(), operation, parameters), atol=1e-12)


def test_several_augmentations_are_each_as_alone():
    images, counts, operations = random_images(count=9), [2, 3, 1, 3], ("crop", "rotate", "crop", "none")
    drawn = [draw(name, count=n, generator=generator(n)) for name, n in zip(operations, counts, strict=True)]
    expected = torch.cat([augment(part, one) for part, one in zip(images.split(counts), drawn, strict=True)])
    assert torch.equal(augment_each(images, counts, drawn), expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_first_and_second_derivatives(operation):
    images = random_images(count=2, channels=2, height=5, width=5).requires_grad_()
    augmentation = draw(operation, count=2, generator=generator(3))
    assert torch.autograd.gradcheck(lambda x: augment(x, augmentation), (images,))
    assert torch.autograd.gradgradcheck(lambda x: augment(x, augmentation).pow(3), (images,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_dtype_is_kept(operation, dtype, tolerance):
    images = random_images(height=64, width=64)
    augmentation = draw(operation, count=4, generator=generator(4))
    result = augment(images.to(dtype), augmentation)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), augment(images, augmentation), atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("operation", "ranges"),
    [
        ("color", {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)}),
        ("scale", {"x": (1 / 1.2, 1.2), "y": (1 / 1.2, 1.2)}),
        ("rotate", {"angle_rad": (-math.pi / 12, math.pi / 12)}),
        *((operation, {"x": (0, 1), "y": (0, 1)}) for operation in ("crop", "cutout")),
        ("flip", {"position": (0, 1)}),
    ],
)
def test_parameters_are_uniform_and_independent(operation, ranges):
    parameters = draw(operation, count=20_000, generator=generator()).parameters
    assert list(parameters) == list(ranges)
    for name, (low, high) in ranges.items():
        share = (parameters[name] - low) / (high - low)
        assert 0 <= share.min() and share.max() < 1
        quarters = torch.linspace(0, 1, 5, dtype=torch.float64)
        torch.testing.assert_close(torch.quantile(share, quarters), quarters, atol=0.015, rtol=0)
    correlation = torch.corrcoef(torch.stack([*parameters.values()])).view(len(ranges), -1)
    assert (correlation - torch.eye(len(ranges))).abs().max() < 0.05


def test_every_operation_is_drawn_equally_often_from_the_given_generator():
    before, stream = torch.get_rng_state(), generator()
    for strategy in (ALL, "color_crop_cutout_scale_rotate"):
        counts = Counter(draw(strategy, count=1, generator=stream).operation for _ in range(1800))
        assert set(counts) == set(strategy.split("_"))
        assert max(counts.values()) - min(counts.values()) < 140
    assert torch.equal(torch.get_rng_state(), before) and set(OPERATIONS) == set(ALL.split("_"))


def test_strategies():
    images, augmentation = random_images(), draw("none", count=4, generator=generator())
    assert augmentation.operation == "none" and torch.equal(augment(images, augmentation), images)
    assert parse_strategy("none") == () and parse_strategy("flip_color") == ("flip", "color")
    for wrong in ("", "blur", "color_none", "Color", "color__crop", "color,crop", "flip_flip"):
        with pytest.raises(ValueError, match=r'"none".*each once: color, crop, cutout, flip, scale, rotate'):
            draw(wrong, count=1, generator=generator())
