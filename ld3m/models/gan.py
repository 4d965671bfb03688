"""The generative prior of GLaD: a frozen class-conditional GAN whose synthesis network can be cut at any layer.

On disk it is a folder: `config.json` with the arguments of `Generator`, `weights.safetensors` in half precision.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import conv2d, leaky_relu

from ld3m.models.networks import require_finite_weights
from ld3m.runtime.seeds import forked
from ld3m.runtime.storage import new_folder, write_bytes, write_json

SMALLEST_PX = 4  # side of the constant input
FILES = ("config.json", "weights.safetensors")


class Generator(nn.Module):
    """A small style-based generator (StyleGAN 2) without noise per pixel: the codes determine the image.

    Shapes: noise (B, noise_width), labels (B,) int64, one code w (B, w_width), codes of the layers from n on
    (B, layers - n, w_width), images x (B, channels, size_px, size_px) around [-1, 1], not clamped. Layer n maps
    features f (B, C_n, h_n, h_n) to those that enter layer n + 1; the last layer gives the image. `widths` are the
    channels of the features at 4, 8, 16 ... px; their number sets the size of the image.
    """

    def __init__(self, *, channels: int, classes: int, noise_width: int, w_width: int, widths: tuple[int, ...]):
        super().__init__()
        sizes = {"noise_width": noise_width, "w_width": w_width, "widths": list(widths)}
        self.config = {"channels": channels, "classes": classes, **sizes}
        self.classes, self.noise_width = classes, noise_width
        self.size_px = SMALLEST_PX * 2 ** (len(widths) - 1)
        self.embedding = nn.Embedding(classes, noise_width)
        self.to_w = nn.Sequential(
            *(_linear(2 * noise_width, w_width), nn.LeakyReLU(0.2)), *(_linear(w_width, w_width), nn.LeakyReLU(0.2))
        )
        self.constant = nn.Parameter(torch.randn(widths[0], SMALLEST_PX, SMALLEST_PX))
        layers = [StyleLayer(widths[0], widths[0], w_width)]
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [StyleLayer(inputs, outputs, w_width, doubles=True), StyleLayer(outputs, outputs, w_width)]
        self.synthesis = nn.ModuleList([*layers, StyleLayer(widths[-1], channels, w_width, is_last=True)])
        self.layers = len(self.synthesis)  # and codes w of one image

    def check(self, *, size_px: int, channels: int, classes: int) -> None:
        """Raise ValueError where the generator does not fit the images and the number of classes of a data set."""
        own = {"size_px": self.size_px, "channels": self.config["channels"], "classes": self.classes}
        for key, value in {"size_px": size_px, "channels": channels, "classes": classes}.items():
            if value != own[key]:
                raise ValueError(f"{key}={value}: this GAN has {own[key]}")

    def mapping(self, noise: Tensor, labels: Tensor) -> Tensor:
        """One code w (B, w_width) for standard normal noise (B, noise_width) and labels (B,)."""
        return self.to_w(torch.cat([_unit(noise), _unit(self.embedding(labels.to(noise.device)))], dim=1))

    def features(self, w: Tensor, n: int) -> Tensor:
        """The features that enter layer n, from the codes w (B, n, w_width) of the layers before it."""
        return self._run(self.constant.expand(len(w), -1, -1, -1), w, self.synthesis[:n])

    def synthesize(self, features: Tensor, w: Tensor, n: int) -> Tensor:
        """Images x from the features that enter layer n and the codes w (B, layers - n, w_width) from there on."""
        return self._run(features, w, self.synthesis[n:])

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images x of the classes; all layers get the same code."""
        w = self.mapping(noise, labels)[:, None].expand(-1, self.layers, -1)
        return self.synthesize(self.features(w[:, :0], 0), w, 0)

    @staticmethod
    def _run(features: Tensor, w: Tensor, layers: nn.ModuleList) -> Tensor:
        for layer, code in zip(layers, w.unbind(1), strict=True):
            features = layer(features, code)
        return features

    def freeze_(self) -> "Generator":
        """Set evaluation mode and switch gradients of the weights off, in place."""
        return self.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """sha256 of all weights and the configuration."""
        weights = save({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()})
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode() + weights).hexdigest()


class StyleLayer(nn.Module):
    """A convolution whose kernel is modulated by the code of each image: input channel i is scaled by s_i(w), then each
    output channel to unit norm (StyleGAN 2, eq. 1 and 3). The last layer has a 1x1 kernel, no norm and no activation.
    """

    def __init__(self, inputs: int, outputs: int, w_width: int, *, doubles: bool = False, is_last: bool = False):
        super().__init__()
        side = 1 if is_last else 3
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, side, side))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.style = _linear(w_width, inputs, bias=1.0)
        self.doubles, self.is_last = doubles, is_last
        self.gain = (inputs * side**2) ** -0.5

    def forward(self, features: Tensor, w: Tensor) -> Tensor:
        """(B, inputs, h, h) and codes (B, w_width) to (B, outputs, h, h), or 2h where the layer doubles the side."""
        s = self.style(w)  # (B, inputs)
        kernel = self.gain * self.kernel
        scaled = features * s[:, :, None, None]
        if self.doubles:  # nearest neighbor; torch's interpolate has no deterministic gradient on CUDA
            scaled = scaled.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        maps = conv2d(scaled, kernel, padding=kernel.shape[-1] // 2)
        if self.is_last:
            return maps + self.bias[:, None, None]
        norm = (s.square() @ kernel.square().sum(dim=(2, 3)).T + 1e-8).rsqrt()  # (B, outputs)
        return 2**0.5 * leaky_relu(maps * norm[:, :, None, None] + self.bias[:, None, None], 0.2)


def build_generator(*, seed: int, **config) -> Generator:
    """Build a generator with random weights; `config` are the arguments of `Generator`."""
    with forked(seed, "generator"):
        return Generator(**config)


def save_generator(generator: Generator, folder: Path) -> None:
    """Write the folder, whole or not at all; the weights are rounded to half precision."""
    with new_folder(folder) as partial:
        write_json(partial / "config.json", generator.config)
        state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in generator.state_dict().items()}
        write_bytes(partial / "weights.safetensors", save(state))


def load_generator(folder: Path) -> Generator:
    """Load a generator that `save_generator` wrote, frozen, in float32 on the CPU.

    FileNotFoundError for a missing file, ValueError for a broken one or a weight that is not finite.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"no GAN in {folder}: {', '.join(missing)} missing")
    try:
        config = json.loads((folder / "config.json").read_text())
        with torch.device("meta"):  # nothing is allocated before the shapes of the file fit
            generator = Generator(**config)
        state = {name: tensor.float() for name, tensor in load_file(folder / "weights.safetensors").items()}
        generator.load_state_dict(state, assign=True)
        require_finite_weights(state)
    except Exception as error:  # json, safetensors and torch raise errors of many kinds for a broken file
        raise ValueError(f"the GAN in {folder} cannot be read: {error}") from error
    return generator.freeze_()


def _linear(inputs: int, outputs: int, *, bias: float = 0.0) -> nn.Linear:
    """A layer whose outputs start as large as its inputs: with torch's smaller weights the noise has no effect."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=(2 / inputs) ** 0.5)
    nn.init.constant_(layer.bias, bias)
    return layer


def _unit(x: Tensor) -> Tensor:
    """Rows of mean square 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
