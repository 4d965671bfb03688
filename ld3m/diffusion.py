"""The generative prior: a frozen latent diffusion model behind encode, embed, null, denoise, quantize and decode.

On disk it is a diffusers folder: `unet/`, `vqvae/` and `scheduler/` as diffusers writes them, and
`class_embedder/model.safetensors` with the class embeddings, of which the last row is the null class. A prior without
classes (a U-Net that takes no conditioning, such as that of FFHQ) has the null class alone, one zero.
"""

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ld3m.seeds import forked
from ld3m.storage import new_folder

if TYPE_CHECKING:
    from diffusers import (
        DDIMScheduler,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
    )  # takes 3 s, hence inside the functions

PARTS = ("unet", "vqvae", "scheduler", "class_embedder")


@dataclass(frozen=True)
class Prior:
    """A latent diffusion model that predicts noise, class-conditional or not.

    Shapes: pixels (B, C, H, W) in [-1, 1]; latents z (B, c, h, w), scaled to about unit variance;
    conditioning (B, 1, D); labels (B,) int64.
    """

    unet: "UNet2DConditionModel | UNet2DModel"
    autoencoder: "VQModel"
    embedding: nn.Embedding  # (classes + 1, D)
    alpha_bar: Tensor  # (1000,) float64 on the CPU: the products of 1 - beta, eq. 1
    precision: torch.dtype = torch.float32  # in which `denoise` and `decode` compute

    @property
    def classes(self) -> int:
        return self.embedding.num_embeddings - 1

    @property
    def is_conditional(self) -> bool:
        """Whether the U-Net takes a conditioning; where it does not, that is one number (B, 1, 1) without effect."""
        return self.classes > 0

    @property
    def channels(self) -> int:
        return self.autoencoder.config.in_channels

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along one axis."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def latent_shape(self, size_px: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images, or a ValueError where the prior cannot take the size."""
        unit = self.downsampling * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if size_px < unit or size_px % unit:
            raise ValueError(
                f"size_px = {size_px} does not fit this prior, which takes multiples of {unit} px; "
                "set datasets.<name>.size_px in params.yaml, or choose another prior"
            )
        side = size_px // self.downsampling
        return self.autoencoder.config.latent_channels, side, side

    def check(self, *, size_px: int, channels: int, classes: int) -> None:
        """Raises ValueError where the prior and the data set do not fit each other."""
        self.latent_shape(size_px)
        if channels != self.channels:
            raise ValueError(
                f"the data set has {channels} channels, the prior {self.channels}; "
                "set datasets.<name>.channels in params.yaml to the prior's"
            )
        if self.is_conditional and classes != self.classes:
            raise ValueError(
                f"the data set has {classes} classes, the prior was trained on {self.classes}; "
                "restore datasets.<name>.classes in params.yaml, or train a prior on these with `dvc repro prior`"
            )

    def encode(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels).latents * self.autoencoder.config.scaling_factor

    def quantize(self, z: Tensor) -> Tensor:
        """The nearest codebook entries, with the straight-through gradient (identity)."""
        scale = self.autoencoder.config.scaling_factor
        return self.autoencoder.quantize(z / scale)[0] * scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents to pixels, through the quantiser; not clamped."""
        with self._autocast(z):
            return self.autoencoder.decode(z / self.autoencoder.config.scaling_factor).sample.to(z.dtype)

    def embed(self, labels: Tensor) -> Tensor:
        rows = labels if self.is_conditional else torch.zeros_like(labels)
        return self.embedding(rows.to(self.embedding.weight.device))[:, None, :]  # (B, 1, D)

    def null(self, count: int) -> Tensor:
        return self.embedding.weight[-1].expand(count, 1, -1)  # (B, 1, D)

    def denoise(self, z_t: Tensor, t: int | Tensor, c: Tensor) -> Tensor:
        """The noise eps in z_t, (B, c, h, w); t is one timestep or one per sample."""
        t = torch.as_tensor(t, device=z_t.device)  # a number would be compiled in where the U-Net is compiled
        with self._autocast(z_t):
            if not self.is_conditional:  # times zero, so that the gradient for `c` is zero and not absent
                return self.unet(z_t, t, return_dict=False)[0].to(z_t.dtype) + 0 * c[..., None]
            return self.unet(z_t, t, encoder_hidden_states=c, return_dict=False)[0].to(z_t.dtype)

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
        """The same prior whose denoiser and decoder compute in that type; what goes in and comes out keeps its own."""
        return replace(self, precision=getattr(torch, precision))

    def frozen(self) -> "Prior":
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
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(self.alpha_bar.cpu().numpy().tobytes())
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
    return Prior(unet, autoencoder, embedding, _alpha_bar(_schedule()))


def unconditional(prior: Prior) -> Prior:
    """The prior with the null class in the place of every class."""
    null = prior.embedding.weight[-1:].expand_as(prior.embedding.weight)
    return replace(prior, embedding=nn.Embedding.from_pretrained(null.clone())).frozen()


def with_classes(prior: Prior, classes: Sequence[int]) -> Prior:
    """The prior with these of its classes, label k being `classes[k]`, and the null class: of ImageNet's 1000, those of
    a subset. One without classes is given back as it is."""
    if not prior.is_conditional:
        return prior
    if outside := [index for index in classes if not 0 <= index < prior.classes]:
        raise ValueError(f"the classes {outside} are not the prior's, which are 0 to {prior.classes - 1}")
    rows = prior.embedding.weight[[*classes, prior.classes]]
    return replace(prior, embedding=nn.Embedding.from_pretrained(rows.clone())).frozen()


def with_random_unet(prior: Prior, *, seed: int) -> Prior:
    """The prior with trained autoencoder and embeddings and a U-Net of random weights, as in the paper's ablation."""
    with forked(seed, "random unet"):
        unet = type(prior.unet).from_config(prior.unet.config)
    return replace(prior, unet=unet.to(prior.embedding.weight)).frozen()


def save_prior(prior: Prior, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Writes the folder whole or not at all, weights as `dtype`: `load_prior` gives what was stored."""
    with new_folder(folder) as partial:
        for module, name in ((prior.unet, "unet"), (prior.autoencoder, "vqvae")):
            nn.Module.to(deepcopy(module), dtype).save_pretrained(
                partial / name
            )  # diffusers' own `to` warns for nothing
        _schedule().save_pretrained(partial / "scheduler")
        (partial / "class_embedder").mkdir()
        weight = prior.embedding.weight.detach().to(dtype).contiguous()
        save_file({"weight": weight}, partial / "class_embedder/model.safetensors")


def load_prior(folder: Path) -> Prior:
    """The prior in a diffusers folder, frozen, in float32 on the CPU."""
    from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel

    folder = Path(folder)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"no prior in {folder}: {', '.join(missing)} missing. The embedded prior comes with `dvc pull prior`; "
            "`dvc repro -f prior` trains it again"
        )
    try:
        local = {
            "local_files_only": True,
            "use_safetensors": True,
            "torch_dtype": torch.float32,
            "low_cpu_mem_usage": False,
        }
        kind = json.loads((folder / "unet/config.json").read_text())["_class_name"]
        unet_class = {"UNet2DConditionModel": UNet2DConditionModel, "UNet2DModel": UNet2DModel}[kind]
        unet = unet_class.from_pretrained(folder / "unet", **local)
        autoencoder = VQModel.from_pretrained(folder / "vqvae", **local)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        weight = load_file(folder / "class_embedder/model.safetensors")["weight"]
    except Exception as error:  # diffusers and safetensors raise many kinds for a truncated or foreign file
        raise ValueError(
            f"the prior in {folder} cannot be read ({error}); `dvc checkout -f prior` restores it"
        ) from error
    embedding = nn.Embedding.from_pretrained(weight.float())
    return Prior(unet, autoencoder, embedding, _alpha_bar(scheduler)).frozen()


def cin256_alpha_bar() -> Tensor:
    """alpha_bar (1000,) float64 of the noise schedule of `cin256-v2`, which CompVis's other VQ-f4 models share."""
    return _alpha_bar(_schedule())


def _schedule() -> "DDIMScheduler":
    """The noise schedule of `cin256-v2`."""
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


def _alpha_bar(scheduler: "DDIMScheduler") -> Tensor:
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"prediction_type {scheduler.config.prediction_type!r}: only epsilon is supported")
    return torch.cumprod(1 - scheduler.betas.double(), dim=0)
