"""Train a small class-conditional latent diffusion model on the training split."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ld3m.data.dataset import Split
from ld3m.models.diffusion_prior import Prior, prior_chunk_size
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.cuda_graphs import GraphedFunction
from ld3m.runtime.memory import explain_out_of_memory
from ld3m.runtime.progress import progress
from ld3m.runtime.seeds import generator
from ld3m.runtime.storage import locked, require_space, tensors_hash
from ld3m.runtime.training_state import TrainingState


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
