"""Train a small class-conditional latent diffusion model on the training split."""

import hashlib
import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ld3m.data.dataset import Split
from ld3m.models.diffusion_prior import (
    HEAD_WIDTH,
    Prior,
    channels_of_latents,
    cin256_alpha_bar,
    downsampling,
    prior_chunk_size,
)
from ld3m.models.prior_variants import remove_label_tables
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.cuda_graphs import GraphedFunction
from ld3m.runtime.memory import explain_out_of_memory
from ld3m.runtime.progress import progress
from ld3m.runtime.seeds import forked, generator
from ld3m.runtime.storage import locked, require_space, tensors_hash
from ld3m.runtime.training_state import TrainingState


def build_prior(
    *,
    size_px: int,
    channels: int,
    classes: int,
    autoencoder: nn.Module | None = None,
    latent_channels: int,
    codebook: int,
    autoencoder_widths: tuple[int, ...],
    kind: Literal["unet", "dit"] = "unet",
    widths: tuple[int, ...],
    blocks: int,
    conditioning_width: int,
    seed: int,
) -> Prior:
    """Build a prior with random weights; the global generator is untouched.

    Each level of the autoencoder, a VQModel with `codebook` entries, has half the resolution of the one before; one
    that is given takes its place. A U-Net, a smaller one than that of `cin256-v2`, has `blocks` residual blocks at each
    of its `widths`, and all levels but the first attend to the class token, of `conditioning_width`. A DiT has `blocks`
    transformer blocks over 2 x 2 positions of the latents, of one width, that of the class token too.
    """
    from diffusers import VQModel

    with forked(seed, "prior"):
        autoencoder = autoencoder or VQModel(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(autoencoder_widths),
            up_block_types=("UpDecoderBlock2D",) * len(autoencoder_widths),
            block_out_channels=autoencoder_widths,
            latent_channels=latent_channels,
            sample_size=size_px,
            num_vq_embeddings=codebook,
            norm_num_groups=8,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
        latents = {"sample_size": size_px // downsampling(autoencoder), "in_channels": channels_of_latents(autoencoder)}
        if kind == "unet":
            denoiser = _unet(widths, blocks, conditioning_width, **latents)
            embedding = nn.Embedding(classes + 1, conditioning_width)
        else:
            denoiser, embedding = _dit(*widths, blocks, classes, **latents)
    return Prior(denoiser, autoencoder, embedding, cin256_alpha_bar())


def _unet(widths: tuple[int, ...], blocks: int, conditioning_width: int, *, in_channels: int, **latents: int) -> Any:
    from diffusers import UNet2DConditionModel

    down = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(widths) - 1)
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=in_channels,
        down_block_types=down,
        up_block_types=tuple(block.replace("Down", "Up") for block in reversed(down)),
        block_out_channels=widths,
        layers_per_block=blocks,
        norm_num_groups=16,
        cross_attention_dim=conditioning_width,
        attention_head_dim=2,
        **latents,
    )


def _dit(width: int, blocks: int, classes: int, *, in_channels: int, **latents: int) -> tuple[Any, nn.Embedding]:
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(
        in_channels=in_channels,
        out_channels=in_channels,
        num_attention_heads=width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        num_layers=blocks,
        num_embeds_ada_norm=classes,
        **latents,
    )
    for block in dit.transformer_blocks:  # each starts as the identity
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    remove_label_tables(dit)
    return dit, nn.Embedding(classes + 1, width)


@explain_out_of_memory("prior.autoencoder.batch")
def fit_autoencoder(
    prior: Prior,
    split: Split,
    *,
    steps: int,
    continuous_steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the VQ autoencoder in place, and set its scaling factor to one over the standard deviation of `z`.

    The loss is the absolute and the squared error of the reconstruction plus the commitment loss of the quantizer; the
    rate of Adam falls as a cosine. The first `continuous_steps` run without the quantizer, whose codebook then starts
    from encoded training images, so that no entry is unused from the start. An interrupted run goes on from
    `checkpoint`, to the same bits. Returns the loss of each step; ValueError if one is not finite.
    """
    autoencoder = prior.autoencoder
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=learning_rate)
    schedule = _cosine(optimizer, steps)
    training = TrainingState(
        {"autoencoder": autoencoder, "optimizer": optimizer, "schedule": schedule},
        losses=torch.zeros(steps, device=split.device),
        advice="lower the learning rate of the autoencoder",
    )
    with checkpoint or Checkpoint() as checkpoint:
        checkpoint.resume(training.restore)
        for step in progress(steps, label="autoencoder", start=training.done, status=training.status):
            with checkpoint.step(training.state):
                draw = generator(seed, "autoencoder", step)
                if step == continuous_steps:
                    _start_codebook(prior, split, draw)
                x = split.x(torch.randint(len(split), (batch,), generator=draw))
                latents = autoencoder.encode(x).latents
                decoded = autoencoder.decode(latents, force_not_quantize=step < continuous_steps)
                loss = l1_loss(decoded.sample, x) + mse_loss(decoded.sample, x) + decoded.commit_loss.mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                training.record(loss)
    autoencoder.requires_grad_(False).eval()
    autoencoder.register_to_config(scaling_factor=1 / encode_split(prior, split).std().item())
    return training.losses.tolist()


def standardize_latents(prior: Prior, split: Split) -> None:
    """Give every channel of the latents of an autoencoder from elsewhere mean 0 and variance 1 on a split, in place."""
    std, mean = torch.std_mean(encode_split(prior, split), dim=(0, 2, 3))
    if not std.min() > 0:  # or NaN
        raise ValueError("a channel of the latents is constant or not finite: take another autoencoder")
    own = {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 1.0, "shift_factor": 0.0}
    prior.autoencoder.register_to_config(**own)


@torch.no_grad()
def encode_split(prior: Prior, split: Split) -> Tensor:
    """Map the autoencoder's own latents (N, c, h, w) of a split, float32 on the CPU, from a file in the cache.

    What the file lacks is encoded: all of it for another autoencoder or other images, which have their own files.
    """
    shape, size = (len(split), *prior.latent_shape(split.shape[-1])), prior_chunk_size(split.shape[-1])
    digest = hashlib.sha256(tensors_hash(prior.autoencoder.state_dict()).encode())
    digest.update(repr((prior.precision, shape)).encode())
    for chunk in split.chunks():
        digest.update(chunk.contiguous().numpy())
    file = paths.LATENTS / f"{digest.hexdigest()[:20]}.float32"
    chunks = torch.arange(len(split)).split(size)
    bytes_a_chunk = 4 * size * math.prod(shape[1:])
    with locked(file, wait=True), file.open("ab") as opened:
        done = min(opened.tell() // bytes_a_chunk, len(chunks))
        if opened.tell() < 4 * math.prod(shape):
            require_space(file.parent, 4 * math.prod(shape))
            opened.truncate(done * bytes_a_chunk)
            for k in progress(len(chunks), label=f"encoding {size} images", start=done):
                opened.write(prior.encode_raw(split.x(chunks[k])).cpu().contiguous().numpy())
    return torch.from_numpy(np.memmap(file, np.float32, "c", shape=shape))


@explain_out_of_memory("prior.denoiser.batch")
def fit_denoiser(
    prior: Prior,
    split: Split,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    null_share: float,
    ema_decay: float,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the U-Net and the class embeddings in place on encoded images; they end as their moving averages (EMA).

    The loss is the squared error of the predicted noise at uniform timesteps, eq. 1; the rate of AdamW falls as a
    cosine. `null_share` of the labels are replaced by the null class, for classifier-free guidance. An interrupted run
    goes on from `checkpoint`, to the same bits. Returns the loss of each step; ValueError if one is not finite.
    """
    raw = encode_split(prior, split)
    alpha_bar = prior.alpha_bar.float()
    trained = torch.nn.ModuleList([prior.unet.train(), prior.embedding])
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = _cosine(optimizer, steps)
    training = TrainingState(
        {"trained": trained, "average": average, "optimizer": optimizer, "schedule": schedule},
        losses=torch.zeros(steps, device=split.device),
        advice="lower the learning rate of the denoiser",
    )

    def loss_of(z_t: Tensor, t: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        return mse_loss(prior.denoise(z_t, t, prior.embed(labels)), eps)

    replayed = GraphedFunction(loss_of, prior.unet, prior.embedding)
    with checkpoint or Checkpoint() as checkpoint:
        checkpoint.resume(training.restore)
        for step in progress(steps, label="denoiser", start=training.done, status=training.status):
            with checkpoint.step(training.state):
                draw = generator(seed, "denoiser", step)
                index = torch.randint(len(split), (batch,), generator=draw)
                t = torch.randint(len(alpha_bar), (batch,), generator=draw)
                z = prior.standardize(raw[index].to(split.device))
                eps = torch.randn(z.shape, generator=draw)
                is_null = torch.rand(batch, generator=draw) < null_share
                labels = torch.where(is_null, prior.classes, split.labels[index]).to(z.device)
                a, eps, t = alpha_bar[t].to(z)[:, None, None, None], eps.to(z), t.to(z.device)
                z_t = a.sqrt() * z + (1 - a).sqrt() * eps  # eq. 1
                loss = replayed(z_t, t, labels, eps)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                average.update_parameters(trained)
                training.record(loss)
    trained.load_state_dict(average.module.state_dict())
    prior.freeze_()
    return training.losses.tolist()


def _start_codebook(prior: Prior, split: Split, draw: torch.Generator) -> None:
    codebook = prior.autoencoder.quantize.embedding.weight
    with torch.no_grad():
        x = split.x(torch.randperm(len(split), generator=draw)[:500])
        latents = prior.autoencoder.encode(x).latents.movedim(1, -1).flatten(0, 2)  # (positions, c)
        codebook.copy_(latents[torch.randperm(len(latents), generator=draw)[: len(codebook)]])


def _cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
