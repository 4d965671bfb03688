"""The five networks of the dataset distillation literature, one definition each.

A network maps normalized images (N, channels, size_px, size_px) to features (N, F), which DM matches, and by one linear
layer to logits (N, classes). Norms act on one image at a time: there are no buffers, so that a network is its flat
parameter vector alone. All operations have the second derivative that DC and MTT need.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ld3m.runtime import seeds

CACHE_BYTES = 3 * 2**20  # of one map of the images that ConvNet takes at once on a CPU


class Network(nn.Module):
    """`classifier(features(images))`; subclasses define `classifier` and either `body` or `features`."""

    body: nn.Module
    classifier: nn.Linear
    images_in_cache: int | None = None  # `body` takes so many at once on a CPU, which is faster for ConvNet

    def features(self, images: Tensor) -> Tensor:
        """The map before the classifier, flattened: (N, channels, size_px, size_px) -> (N, F)."""
        if self.images_in_cache is None or images.device.type != "cpu":
            return self.body(images).flatten(1)
        return torch.cat([self.body(part).flatten(1) for part in images.split(self.images_in_cache)])

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, size_px, size_px) -> logits (N, classes)."""
        return self.classifier(self.features(images))


class ConvNet(Network):
    """`depth` times [3x3 convolution, norm, ReLU, average pool 2]; linear on the flattened map.

    Depth None leaves a map of 4x4, as published: 3 at 32 px, 5 at 128.
    """

    def __init__(self, *, channels: int, size_px: int, classes: int, width: int = 128, depth: int | None = None):
        super().__init__()
        if depth is None:
            depth = max(1, (size_px - 1).bit_length() - 2)
        side = size_px >> depth
        if side < 1:
            raise ValueError(f"depth={depth}: must be at most {size_px.bit_length() - 1} at size_px={size_px}")
        layers, inputs = [], channels
        for _ in range(depth):
            layers += [*_conv_norm_relu(inputs, width), _AveragePool()]
            inputs = width
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side**2, classes)
        self.images_in_cache = max(1, CACHE_BYTES // (4 * width * size_px**2))


class _AveragePool(nn.Module):
    """`nn.AvgPool2d(2)` in sums of slices, which are vectorized on the CPU."""

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2] // 2 * 2, maps.shape[3] // 2 * 2  # an odd last row or column is left out
        rows = maps[:, :, 0:height:2, :width] + maps[:, :, 1:height:2, :width]
        return (rows[..., ::2] + rows[..., 1::2]) / 4


class AlexNet(Network):
    """Five convolutions, max pools after the first, second and last, one linear layer; no norm, no dropout.

    `width` is that of the first layer; the others keep the published ratios 128, 192, 256, 192, 192.
    """

    def __init__(self, *, channels: int, size_px: int, classes: int, width: int = 128):
        super().__init__()
        if width % 2:
            raise ValueError(f"width={width}: alexnet takes even widths, its second layer is 3/2 as wide")
        middle = width * 3 // 2
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, middle, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(middle, 2 * width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(2 * width, middle, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(middle, middle, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Linear(middle * (size_px // 8) ** 2, classes)
        self.to(memory_format=torch.channels_last)  # a quarter faster on a CPU, where norms, as others have, are slower


class VGG11(Network):
    """Eight 3x3 convolutions with norm, five max pools, one linear layer.

    From 64 px on, as published, the last map is pooled adaptively to 7x7: of a 4x4 map (128 px) 33 of the 49 values are
    maxima of two or four neighbors. `width` is that of the first layer.
    """

    def __init__(self, *, channels: int, size_px: int, classes: int, width: int = 64):
        super().__init__()
        layers, inputs = [], channels
        for stage in ((1,), (2,), (4, 4), (8, 8), (8, 8)):  # multiples of width; a pool ends each stage
            for multiple in stage:
                layers += _conv_norm_relu(inputs, multiple * width)
                inputs = multiple * width
            layers.append(nn.MaxPool2d(2))
        side = 7 if size_px >= 64 else 1
        layers += [nn.AdaptiveMaxPool2d(side)] if side > 1 else []
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs * side**2, classes)


class ResNet18(Network):
    """3x3 stem without stride or pool, four stages of two residual blocks, global average pool.

    `width` is that of the stem and the first stage; each further stage doubles it and halves the map.
    """

    def __init__(self, *, channels: int, size_px: int, classes: int, width: int = 64):
        super().__init__()
        layers, inputs = [*_conv_norm_relu(channels, width, bias=False)], width
        for outputs in (width, 2 * width, 4 * width, 8 * width):
            layers.append(_Residual(inputs, outputs, stride=1 if outputs == width else 2))
            layers.append(_Residual(outputs, outputs, stride=1))
            inputs = outputs
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(inputs, classes)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            *_conv_norm_relu(inputs, outputs, stride=stride, bias=False),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(outputs, outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.GroupNorm(outputs, outputs))

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(self.branch(maps) + self.shortcut(maps))


class ViT(Network):
    """Vision transformer with a class token, pre-norm blocks, dropout 0.1, and positions drawn from N(0, 1).

    The side of a patch is size_px // 8, at most 16. `width` is that of tokens and of the hidden layers of the MLPs, a
    multiple of 32: a head has 64 dimensions if `width` is a multiple of 64 and at least 256, else 32. Depth None is the
    published 6 up to 32 px, 10 above. `norms=False` is the ViT of the released code, which comments every LayerNorm
    out. In training mode dropout draws from the global generator.
    """

    def __init__(
        self, *, channels: int, size_px: int, classes: int, width: int = 512, depth: int | None = None, norms=True
    ):
        super().__init__()
        patch_px = min(size_px // 8, 16)
        if size_px % patch_px:
            raise ValueError(f"size_px={size_px}: vit takes multiples of 8 up to 128, and of 16 above")
        if width % 32:
            raise ValueError(f"width={width}: vit takes multiples of 32, the size of an attention head")
        if depth is None:
            depth = 6 if size_px <= 32 else 10
        heads = width // (64 if width % 64 == 0 and width >= 256 else 32)
        self.patches = nn.Conv2d(channels, width, patch_px, stride=patch_px)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (size_px // patch_px) ** 2 + 1, width))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(_Block(width, heads, norms=norms) for _ in range(depth)))
        self.norm = _layer_norm(width, norms)
        self.classifier = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """The class token after the last block: (N, channels, size_px, size_px) -> (N, width)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)  # (N, patches, width)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        return self.norm(self.blocks(self.dropout(tokens))[:, 0])


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, *, norms: bool):
        super().__init__()
        self.attention = nn.Sequential(_layer_norm(width, norms), _Attention(width, heads), nn.Dropout(0.1))
        self.mlp = nn.Sequential(
            *(_layer_norm(width, norms), nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)),
            *(nn.Linear(width, width), nn.Dropout(0.1)),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        split = self.query_key_value(tokens).unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (N, heads, tokens, head size) each
        # Written out because torch's fused attention has no second derivative.
        weights = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(dim=3)
        return self.output((weights @ value).transpose(1, 2).flatten(2))


def _conv_norm_relu(inputs: int, outputs: int, **options: int | bool) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.GroupNorm(outputs, outputs), nn.ReLU()]


def _layer_norm(width: int, norms: bool) -> nn.Module:
    return nn.LayerNorm(width) if norms else nn.Identity()


ARCHITECTURES = {"convnet": ConvNet, "alexnet": AlexNet, "vgg11": VGG11, "resnet18": ResNet18, "vit": ViT}
SMALLEST_PX = {"alexnet": 8, "vgg11": 32, "resnet18": 16, "vit": 8}


def build(
    name: str,
    *,
    channels: int,
    size_px: int,
    classes: int,
    seed: int,
    device: str = "cpu",
    factory: Callable[..., Network] | None = None,
    **options: int | bool | None,
) -> Network:
    """Build a network with random weights, the same on every device; the global generator is untouched.

    Parameters
    ----------
    name
        A key of `ARCHITECTURES`, or a name for your own `factory`.
    factory
        Called with `channels`, `size_px`, `classes` and the options.
    **options
        Those of `ARCHITECTURES` are `width`, `depth` (convnet, vit) and `norms` (vit); None takes the published value.

    Raises
    ------
    ValueError
        For an unknown name or option, or a value that the architecture cannot have.
    """
    if factory is None and name not in ARCHITECTURES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(ARCHITECTURES)}")
    architecture = factory or ARCHITECTURES[name]
    options = {key: value for key, value in options.items() if value is not None}
    given = {"channels": channels, "size_px": size_px, "classes": classes, **options}
    for key, value in given.items():
        if key in options and key not in inspect.signature(architecture).parameters:
            raise ValueError(f"{key}={value}: {name} has no {key}")
        least = SMALLEST_PX.get(name, 1) if key == "size_px" else 1
        if key != "norms" and factory is None and value < least:
            raise ValueError(f"{key}={value}: {name} takes at least {least}")
    with seeds.forked(seed, "network", name):
        return architecture(**given).to(device)


def flat_parameters(network: nn.Module) -> Tensor:
    """Copy all parameters into one detached vector (P,), in the order of `network.named_parameters()`."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def unflatten(flat: Tensor, network: nn.Module) -> dict[str, Tensor]:
    """Views of `flat` (P,) by parameter name, for `torch.func.functional_call`; gradients reach `flat`."""
    named = dict(network.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]
    return {name: part.view_as(named[name]) for name, part in zip(named, flat.split(sizes), strict=True)}


def require_finite_weights(weights: dict[str, Tensor]) -> None:
    """Raise ValueError with the names of tensors, of a file of weights, that are not finite."""
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{len(broken)} of {len(weights)} tensors are not finite ({', '.join(broken[:5])}): the file is damaged or "
            "its training failed; place a whole file there, or train again"
        )
