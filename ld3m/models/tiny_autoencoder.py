"""TAEF2, the tiny autoencoder of FLUX.2's latents (github.com/madebyollin/taesd, MIT): of 1.3 M weights each way."""

from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import Tensor, nn


class PooledBlock(AutoencoderTinyBlock):
    """A block that first adds a branch normalized over the whole image; only TAEF2 has it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, "relu")
        wide = 4 * width
        branch = nn.Conv2d(width, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU()
        self.pool = nn.Sequential(*branch, nn.Conv2d(wide, width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))


class TAEF2(AutoencoderTiny):
    """Images x (B, 3, H, W) in [-1, 1] to latents (B, 32, H/8, W/8) and back: an `AutoencoderTiny` of diffusers whose
    three blocks at the lowest resolution, on both sides, are a `PooledBlock`."""

    def __init__(self, **_) -> None:
        super().__init__(latent_channels=32)
        for layers, blocks in (self.encoder.layers, (11, 12, 13)), (self.decoder.layers, (2, 3, 4)):
            for k in blocks:
                layers[k] = PooledBlock(64)


def of_released(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of the two released files as `TAEF2` does, whose decoder does not count the clamp."""
    renamed = {f"encoder.layers.{key}": tensor for key, tensor in encoder.items()}
    for key, tensor in decoder.items():
        index, _, name = key.partition(".")
        renamed[f"decoder.layers.{int(index) - 1}.{name}"] = tensor
    return renamed
