"""The diffusion prior: a frozen latent diffusion model behind encode, embed, null, denoise, quantize and decode."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from ld3m.runtime.cuda_graphs import GraphedFunction
from ld3m.runtime.devices import usable_precision

Prediction = Literal["epsilon", "v_prediction", "sample"]  # of the noise, of v or of x0, as diffusers calls them


class IncompatiblePrior(ValueError):
    """The prior can be read, but does not fit the data set or the settings."""


@pydantic.dataclasses.dataclass(frozen=True)
class Spacing:
    """The timesteps of training that the sampler takes, in the words of diffusers; the default is CompVis's.

    `leading` counts up from `offset`, `trailing` down from the last timestep, `linspace` takes both ends.
    """

    kind: Literal["leading", "trailing", "linspace"] = "leading"
    offset: pydantic.NonNegativeInt = 1
    ends_clean: bool = False  # whether alpha_bar after the last step is 1, or that of the first timestep of training


COMPVIS = Spacing()

HEAD_WIDTH = 64  # of the attention of a DiT that is trained here

# How each kind of denoiser is called: (denoiser, z_t, t, c) -> its prediction, (B, c, h, w) or with more channels.
DENOISERS = {
    "UNet2DConditionModel": lambda unet, z_t, t, c: unet(z_t, t, encoder_hidden_states=c, return_dict=False)[0],
    # takes no conditioning: times zero, so that the gradient of `c` is zero and not missing
    "UNet2DModel": lambda unet, z_t, t, c: unet(z_t, t, return_dict=False)[0] + 0 * c[..., None],
    # adds c to the embedding of t in every block, see `take_label_table`
    "DiTTransformer2DModel": lambda dit, z_t, t, c: dit(z_t, t.expand(len(z_t)), c[:, 0], return_dict=False)[0],
}


@dataclass(frozen=True)
class Prior:
    """A latent diffusion model, class-conditional or not.

    Images x are (B, C, H, W) in [-1, 1]; latents z (B, c, h, w) with about unit variance; the conditioning c is
    (B, 1, D); labels are (B,) int64. `to` and `freeze_` change the modules in place, as in torch; all other methods
    that return a Prior return a new one with the same modules.
    """

    unet: nn.Module  # the denoiser, of a class in `DENOISERS`
    autoencoder: nn.Module  # with a codebook (VQModel), a posterior (AutoencoderKL) or neither (AutoencoderTiny)
    embedding: nn.Embedding  # (classes + 1, D), the last row is the null class; (1, 1) for a denoiser without classes
    alpha_bar: Tensor  # (T,) float64 on the CPU, the products of 1 - beta of eq. 1
    prediction: Prediction = "epsilon"  # what the denoiser was trained for
    spacing: Spacing = COMPVIS  # the timesteps that the sampler takes
    precision: torch.dtype = torch.float32  # in which `denoise` and `decode` compute, see `in_precision`
    recordings: dict[str, GraphedFunction] = field(default_factory=dict)  # see `with_cuda_graphs`

    @property
    def classes(self) -> int:
        return self.embedding.num_embeddings - 1

    @property
    def is_conditional(self) -> bool:
        """Whether the denoiser takes a conditioning; without, c is (B, 1, 1) and has no effect."""
        return self.classes > 0

    @property
    def has_quantizer(self) -> bool:
        return hasattr(self.autoencoder, "quantize")

    def latent_shape(self, size_px: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images; IncompatiblePrior for a size that the prior cannot take."""
        given = self.unet.config
        is_fixed = "block_out_channels" not in given  # a transformer knows the positions of one size
        factor = downsampling(self.autoencoder)
        unit = factor * (given.sample_size if is_fixed else 2 ** (len(given.block_out_channels) - 1))
        if size_px < unit or size_px % unit or is_fixed and size_px != unit:
            raise IncompatiblePrior(f"size_px={size_px}: this prior takes {'' if is_fixed else 'multiples of '}{unit}")
        return channels_of_latents(self.autoencoder), size_px // factor, size_px // factor

    def check(self, *, size_px: int, channels: int, classes: int) -> None:
        """Raise IncompatiblePrior where the prior does not fit the images and the number of classes of a data set."""
        self.latent_shape(size_px)
        if channels != (own := self.autoencoder.config.in_channels):
            raise IncompatiblePrior(f"channels={channels}: this prior has {own}")
        if self.is_conditional and classes != self.classes:
            raise IncompatiblePrior(f"classes={classes}: this prior has {self.classes}")

    def encode(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W) to latents z (B, c, h, w), before the quantizer."""
        return self.standardize(self.encode_raw(x))

    def encode_raw(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W) to the autoencoder's own latents (B, c, h, w), of any mean and variance."""
        with self._autocast(x):
            encoded = self.autoencoder.encode(x)
        return (encoded.latents if "latents" in encoded else encoded.latent_dist.mode()).to(x.dtype)

    def standardize(self, raw: Tensor) -> Tensor:
        """The autoencoder's own latents (B, c, h, w) to z."""
        shift, scale = self._statistics(raw.device)
        return (raw - shift) * scale

    def _destandardize(self, z: Tensor) -> Tensor:
        shift, scale = self._statistics(z.device)
        return z / scale + shift

    def quantize(self, z: Tensor) -> Tensor:
        """The nearest codebook entries, with the straight-through gradient (identity); without a codebook, `z`."""
        if not self.has_quantizer:
            return z
        return self.standardize(self.autoencoder.quantize(self._destandardize(z))[0])

    def decode(self, z: Tensor) -> Tensor:
        """Latents z to images x, through the quantizer if there is one; not clamped."""
        return self.recordings.get("decode", self._decode)(z)

    def _decode(self, z: Tensor) -> Tensor:
        with self._autocast(z):
            return self.autoencoder.decode(self._destandardize(z)).sample.to(z.dtype)

    def embed(self, labels: Tensor) -> Tensor:
        """Labels (B,) to the conditioning c (B, 1, D)."""
        rows = labels if self.is_conditional else torch.zeros_like(labels)
        return self.embedding(rows.to(self.embedding.weight.device))[:, None, :]  # (B, 1, D)

    def null(self, count: int) -> Tensor:
        """The conditioning (count, 1, D) of the null class, for classifier-free guidance."""
        return self.embedding.weight[-1].expand(count, 1, -1)  # (B, 1, D)

    def denoise(self, z_t: Tensor, t: int | Tensor, c: Tensor) -> Tensor:
        """The noise eps in z_t (B, c, h, w); t is one timestep, or one per image."""
        on_device = torch.as_tensor(t, device=z_t.device)
        predicted = self.recordings.get("predict", self._predict)(z_t, on_device, c)
        if self.prediction == "epsilon":
            return predicted
        a = self.alpha_bar[torch.as_tensor(t).cpu()].view(-1, 1, 1, 1)
        signal, noise = a.sqrt().to(z_t), (1 - a).sqrt().to(z_t)
        if self.prediction == "sample":
            return (z_t - signal * predicted) / noise
        return signal * predicted + noise * z_t  # of v = signal * eps - noise * x0

    def _predict(self, z_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        with self._autocast(z_t):
            predicted = DENOISERS[type(self.unet).__name__](self.unet, z_t, t, c)
        return predicted[:, : z_t.shape[1]].to(z_t.dtype)  # further channels are a learned sigma

    def _statistics(self, device: torch.device) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """Shift and scale of the autoencoder's own latents: numbers, or (c, 1, 1) where each channel has its own."""
        given = self.autoencoder.config
        shift, scale = given.get("shift_factor") or 0.0, given.scaling_factor
        if given.get("latents_mean") is None:
            return shift, scale
        return _channels(tuple(given.latents_mean), device), scale / _channels(tuple(given.latents_std), device)

    def _autocast(self, z: Tensor) -> torch.autocast:
        return torch.autocast(z.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def to(self, *args, **kwargs) -> "Prior":
        """Move the modules to another device or type, in place."""
        for module in (self.unet, self.autoencoder, self.embedding):
            module.to(*args, **kwargs)
        if self.embedding.weight.is_cuda:  # the order of the memory in which tensor cores convolve
            self.unet.to(memory_format=torch.channels_last)
            self.autoencoder.to(memory_format=torch.channels_last)
        return self

    def in_precision(self, precision: Literal["float32", "bfloat16"]) -> "Prior":
        """A prior whose denoiser and decoder compute in that type, if its device supports it; results keep theirs."""
        usable = usable_precision(precision, self.embedding.weight.device)
        return replace(self, precision=getattr(torch, usable), recordings={})

    def with_cuda_graphs(self) -> "Prior":
        """A prior whose denoiser and decoder are CUDA graphs, see `GraphedFunction`: the gradient of a call must be
        taken before the next call. On a CPU nothing changes."""
        recordings = {"predict": GraphedFunction(self._predict), "decode": GraphedFunction(self._decode)}
        return replace(self, recordings=recordings)

    def freeze_(self) -> "Prior":
        """Set evaluation mode and switch gradients of the weights off, in place."""
        for module in (self.unet, self.autoencoder, self.embedding):
            module.eval().requires_grad_(False)
        return self

    def fingerprint(self) -> str:
        """sha256 of all weights and the configuration."""
        digest = hashlib.sha256()
        for module in (self.unet, self.autoencoder):
            public = {key: value for key, value in module.config.items() if not key.startswith("_")}
            digest.update(json.dumps(public, sort_keys=True, default=str).encode())
        for module in (self.unet, self.autoencoder, self.embedding):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digest.update(self.alpha_bar.cpu().numpy().tobytes())
        if self.prediction != "epsilon":
            digest.update(self.prediction.encode())
        if self.spacing != COMPVIS:
            digest.update(repr(self.spacing).encode())
        return digest.hexdigest()


def downsampling(autoencoder: nn.Module) -> int:
    """How many pixels of a side one position of the latents stands for."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def channels_of_latents(autoencoder: nn.Module) -> int:
    return autoencoder.config.get("vq_embed_dim") or autoencoder.config.latent_channels


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values (c, 1, 1) on a device, copied once: a CUDA graph cannot record the copy."""
    return torch.tensor(values, device=device)[:, None, None]


def prior_chunk_size(size_px: int, *, count: int = 250) -> int:
    """How many images pass through a prior at once without gradient: `count` of 32 px, fewer of larger ones."""
    return max(1, count * 32**2 // size_px**2)


def cin256_schedule() -> Any:
    """The noise schedule of `cin256-v2`, a DDIMScheduler."""
    from diffusers import DDIMScheduler  # takes 3 s

    betas = {"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def schedule_of(scheduler: Any) -> tuple[Tensor, Prediction, Spacing]:
    """alpha_bar (T,) float64, what the denoiser predicts, and the timesteps that a DDIMScheduler takes.

    ValueError for what the sampler cannot follow.
    """
    given, alpha_bar = scheduler.config, torch.cumprod(1 - scheduler.betas.double(), dim=0)
    prediction = pydantic.TypeAdapter(Prediction).validate_python(given.prediction_type)
    spacing = Spacing(given.timestep_spacing, given.steps_offset, given.set_alpha_to_one)
    if not ((alpha_bar >= 0) & (alpha_bar <= 1)).all():
        raise ValueError("its betas must be in 0 .. 1")
    if spacing.kind != "leading" and alpha_bar[-1] == 0:
        raise ValueError("its last alpha_bar is 0: no latent can be learned where no signal is left")
    return alpha_bar, prediction, spacing


def cin256_alpha_bar() -> Tensor:
    """alpha_bar (1000,) float64 of `cin256_schedule`."""
    return schedule_of(cin256_schedule())[0]
