"""The generative prior: a frozen latent diffusion model behind encode, embed, null, denoise, quantize and decode.

`priors` reads it from disk and writes it there.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ld3m.runtime.cuda_graphs import GraphedFunction
from ld3m.runtime.devices import usable_precision
from ld3m.runtime.seeds import forked

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DiTTransformer2DModel,
        SchedulerMixin,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
    )  # takes 3 s, hence inside the functions

Prediction = Literal["epsilon", "v_prediction", "sample"]  # of the noise, of v or of x0, as diffusers calls them


class IncompatiblePrior(ValueError):
    """A prior that is whole, but not the one that the parameters or the data ask for."""


@dataclass(frozen=True)
class Spacing:
    """Which timesteps of training the sampler takes, in the words of diffusers; by default CompVis's.

    `leading` counts up from `offset`, `trailing` down from the last timestep, `linspace` takes both ends.
    """

    kind: Literal["leading", "trailing", "linspace"] = "leading"
    offset: int = 1
    ends_clean: bool = False  # whether alpha_bar after the last step is 1, or that of the first timestep of training


COMPVIS = Spacing()

# How each kind of denoiser is asked: (denoiser, z_t, t, c) -> its prediction, (B, c, h, w) or with more channels.
DENOISERS = {
    "UNet2DConditionModel": lambda unet, z_t, t, c: unet(z_t, t, encoder_hidden_states=c, return_dict=False)[0],
    # takes no conditioning: times zero, so that the gradient for `c` is zero and not absent
    "UNet2DModel": lambda unet, z_t, t, c: unet(z_t, t, return_dict=False)[0] + 0 * c[..., None],
    # adds c to the embedding of t in every block, see `take_label_table`
    "DiTTransformer2DModel": lambda dit, z_t, t, c: dit(z_t, t.expand(len(z_t)), c[:, 0], return_dict=False)[0],
}


@dataclass(frozen=True)
class Prior:
    """A latent diffusion model, class-conditional or not.

    Shapes: pixels (B, C, H, W) in [-1, 1]; latents z (B, c, h, w), scaled to about unit variance;
    conditioning (B, 1, D); labels (B,) int64.
    """

    unet: "UNet2DConditionModel | UNet2DModel | DiTTransformer2DModel"  # the denoiser, a transformer too
    autoencoder: "VQModel | AutoencoderKL"
    embedding: nn.Embedding  # (classes + 1, D), the last row the null class; without classes that is one number
    alpha_bar: Tensor  # (T,) float64 on the CPU: the products of 1 - beta, eq. 1
    prediction: Prediction = "epsilon"  # what the denoiser was trained to predict
    spacing: Spacing = COMPVIS
    precision: torch.dtype = torch.float32  # in which `denoise` and `decode` compute
    recordings: dict[str, GraphedFunction] = field(default_factory=dict)  # of `with_cuda_graphs`

    @property
    def classes(self) -> int:
        return self.embedding.num_embeddings - 1

    @property
    def is_conditional(self) -> bool:
        """Whether the denoiser takes a conditioning; where it does not, that is one number (B, 1, 1) without effect."""
        return self.classes > 0

    @property
    def has_quantizer(self) -> bool:
        """Whether latents are those of a codebook (VQModel) or the modes of a posterior (AutoencoderKL)."""
        return hasattr(self.autoencoder, "quantize")

    @property
    def channels(self) -> int:
        return self.autoencoder.config.in_channels

    @property
    def latent_channels(self) -> int:
        given = self.autoencoder.config
        return given.get("vq_embed_dim") or given.latent_channels

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along one axis."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def latent_shape(self, size_px: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images, or an `IncompatiblePrior` where the prior cannot take the size."""
        given = self.unet.config
        is_fixed = "block_out_channels" not in given  # a transformer knows the positions of one size
        unit = self.downsampling * (given.sample_size if is_fixed else 2 ** (len(given.block_out_channels) - 1))
        if size_px < unit or size_px % unit or is_fixed and size_px != unit:
            raise IncompatiblePrior(
                f"size_px = {size_px} does not fit this prior, which takes {'' if is_fixed else 'multiples of '}{unit} "
                "px; set datasets.<name>.size_px in params.yaml, or choose another prior"
            )
        side = size_px // self.downsampling
        return self.latent_channels, side, side

    def check(self, *, size_px: int, channels: int, classes: int) -> None:
        """Raises `IncompatiblePrior` where the prior and the data set do not fit each other."""
        self.latent_shape(size_px)
        if channels != self.channels:
            raise IncompatiblePrior(
                f"the data set has {channels} channels, the prior {self.channels}; "
                "set datasets.<name>.channels in params.yaml to the prior's"
            )
        if self.is_conditional and classes != self.classes:
            raise IncompatiblePrior(
                f"the data set has {classes} classes, the prior was trained on {self.classes}; "
                "restore datasets.<name>.classes in params.yaml, or train a prior on these with `dvc repro prior`"
            )

    def encode(self, pixels: Tensor) -> Tensor:
        encoded = self.autoencoder.encode(pixels)
        z = encoded.latents if self.has_quantizer else encoded.latent_dist.mode()
        return (z - self._shift) * self.autoencoder.config.scaling_factor

    def quantize(self, z: Tensor) -> Tensor:
        """The nearest codebook entries, with the straight-through gradient (identity); without a codebook, `z`."""
        if not self.has_quantizer:
            return z
        scale = self.autoencoder.config.scaling_factor
        return self.autoencoder.quantize(z / scale)[0] * scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents to pixels, through the quantiser where there is one; not clamped."""
        return self.recordings.get("decode", self._decode)(z)

    def _decode(self, z: Tensor) -> Tensor:
        with self._autocast(z):
            unscaled = z / self.autoencoder.config.scaling_factor + self._shift
            return self.autoencoder.decode(unscaled).sample.to(z.dtype)

    def embed(self, labels: Tensor) -> Tensor:
        rows = labels if self.is_conditional else torch.zeros_like(labels)
        return self.embedding(rows.to(self.embedding.weight.device))[:, None, :]  # (B, 1, D)

    def null(self, count: int) -> Tensor:
        return self.embedding.weight[-1].expand(count, 1, -1)  # (B, 1, D)

    def denoise(self, z_t: Tensor, t: int | Tensor, c: Tensor) -> Tensor:
        """The noise eps in z_t, (B, c, h, w); t is one timestep or one per sample."""
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

    @property
    def _shift(self) -> float:
        return self.autoencoder.config.get("shift_factor") or 0.0

    def _autocast(self, z: Tensor) -> torch.autocast:
        return torch.autocast(z.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def to(self, *args, **kwargs) -> "Prior":
        """The same prior on another device or with weights of another type (the modules are moved in place)."""
        for module in (self.unet, self.autoencoder, self.embedding):
            module.to(*args, **kwargs)
        if self.embedding.weight.is_cuda:  # the order of the memory in which tensor cores convolve
            self.unet.to(memory_format=torch.channels_last)
            self.autoencoder.to(memory_format=torch.channels_last)
        return self

    def in_precision(self, precision: Literal["float32", "bfloat16"]) -> "Prior":
        """The same prior whose denoiser and decoder compute in that type, where its device has it; what goes in and
        comes out keeps its own."""
        usable = usable_precision(precision, self.embedding.weight.device)
        return replace(self, precision=getattr(torch, usable), recordings={})

    def with_cuda_graphs(self) -> "Prior":
        """The same prior, frozen, whose denoiser and decoder are each one launch on CUDA, see `GraphedFunction`: for
        callers that take the gradient of a call before the next. On a CPU it is the same."""
        return replace(
            self, recordings={"predict": GraphedFunction(self._predict), "decode": GraphedFunction(self._decode)}
        )

    def freeze_(self) -> "Prior":
        """In evaluation mode and without parameter gradients."""
        for module in (self.unet, self.autoencoder, self.embedding):
            module.eval().requires_grad_(False)
        return self

    def fingerprint(self) -> str:
        """sha256 over every weight and the configuration: what the prior computes follows from it."""
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


def build_prior(
    *,
    channels: int,
    classes: int,
    latent_size: int,
    latent_channels: int,
    codebook: int,
    autoencoder_widths: tuple[int, ...],
    unet_widths: tuple[int, ...],
    unet_blocks: int,
    conditioning_width: int,
    seed: int,
) -> Prior:
    """A prior with random weights, of the kind of `cin256-v2`: a VQ autoencoder that halves the resolution between
    its widths, and a U-Net with `unet_blocks` residual blocks a level that attends to one class-embedding token below
    its first level."""
    from diffusers import UNet2DConditionModel, VQModel

    down = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(unet_widths) - 1)
    with forked(seed, "prior"):
        autoencoder = VQModel(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(autoencoder_widths),
            up_block_types=("UpDecoderBlock2D",) * len(autoencoder_widths),
            block_out_channels=autoencoder_widths,
            latent_channels=latent_channels,
            sample_size=latent_size * 2 ** (len(autoencoder_widths) - 1),
            num_vq_embeddings=codebook,
            norm_num_groups=8,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
        unet = UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            down_block_types=down,
            up_block_types=tuple(block.replace("Down", "Up") for block in reversed(down)),
            block_out_channels=unet_widths,
            layers_per_block=unet_blocks,
            norm_num_groups=16,
            cross_attention_dim=conditioning_width,
            attention_head_dim=2,
        )
        embedding = nn.Embedding(classes + 1, conditioning_width)
    return Prior(unet, autoencoder, embedding, cin256_alpha_bar())


def take_label_table(dit: "DiTTransformer2DModel") -> nn.Embedding:
    """Takes the label table (classes + 1, D) out of a DiT, which then wants rows of it as `class_labels`, (B, D).

    In diffusers every block has a table of its own. In a released model they are copies of one; ValueError for tables
    that differ, where no one vector stands for a class.
    """
    table, *others = [block.norm1.emb.class_embedder.embedding_table for block in dit.transformer_blocks]
    if any(not torch.equal(other.weight, table.weight) for other in others):
        raise ValueError("the label tables of the DiT's blocks differ: only models whose blocks share one can be used")
    _remove_label_tables(dit)
    return table


def _remove_label_tables(dit: "DiTTransformer2DModel") -> None:
    for block in dit.transformer_blocks:
        block.norm1.emb.class_embedder = nn.Identity()


def unconditional(prior: Prior) -> Prior:
    """The prior with the null class in the place of every class."""
    null = prior.embedding.weight[-1:].expand_as(prior.embedding.weight)
    return replace(prior, embedding=nn.Embedding.from_pretrained(null.clone())).freeze_()


def with_classes(prior: Prior, classes: Sequence[int]) -> Prior:
    """The prior with these of its classes, label k being `classes[k]`, and the null class: of ImageNet's 1000, those of
    a subset. One without classes is given back as it is."""
    if not prior.is_conditional:
        return prior
    if outside := [index for index in classes if not 0 <= index < prior.classes]:
        raise ValueError(
            f"prior.classes: {outside} are not of the prior, which has 0 to {prior.classes - 1}; null takes those of "
            "the subset, or all"
        )
    rows = prior.embedding.weight[[*classes, prior.classes]]
    return replace(prior, embedding=nn.Embedding.from_pretrained(rows.clone())).freeze_()


def with_random_unet(prior: Prior, *, seed: int) -> Prior:
    """The prior with a denoiser of random weights, as in the paper's ablation; autoencoder and embeddings stay."""
    with forked(seed, "random unet"):
        unet = type(prior.unet).from_config(prior.unet.config)
    if hasattr(unet, "transformer_blocks"):
        _remove_label_tables(unet)
    return replace(prior, unet=unet.to(prior.embedding.weight), recordings={}).freeze_()


def with_random_weights(prior: Prior, *, seed: int) -> Prior:
    """`with_random_unet` with autoencoder and embeddings of random weights too."""
    weight = prior.embedding.weight
    with forked(seed, "random autoencoder"):
        autoencoder = type(prior.autoencoder).from_config(prior.autoencoder.config)
        embedding = nn.Embedding(*weight.shape)
        if prior.has_quantizer:
            spread_codes(autoencoder)
    made = replace(prior, autoencoder=autoencoder.to(weight), embedding=embedding.to(weight))
    return with_random_unet(made, seed=seed)


@torch.no_grad()
def spread_codes(autoencoder: "VQModel") -> None:
    """Draws the codes of an untrained quantiser so that scaled latents have unit variance. Its own are next to zero,
    and the gradient through many steps from there leaves the range of float32."""
    autoencoder.quantize.embedding.weight.normal_(std=1 / autoencoder.config.scaling_factor)


def prior_chunk_size(size_px: int, *, count: int = 250) -> int:
    """How many images go through a prior at once where no gradient is kept: `count` of 32 px, fewer of larger ones."""
    return max(1, count * 32**2 // size_px**2)


def cin256_schedule() -> "DDIMScheduler":
    """The noise schedule of `cin256-v2`, which CompVis's other VQ-f4 models share."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def alpha_bar_of(scheduler: "SchedulerMixin") -> Tensor:
    """The products of 1 - beta, (T,) float64."""
    return torch.cumprod(1 - scheduler.betas.double(), dim=0)


def cin256_alpha_bar() -> Tensor:
    """alpha_bar (1000,) float64 of `cin256_schedule`."""
    return alpha_bar_of(cin256_schedule())
