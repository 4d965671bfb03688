"""The spaces: what is learned, and how it becomes images. `SPACES` names the functions that start a synthetic set.

A synthetic set has `labels` (N,) and `learnables`; `render()` gives its normalized images (N, C, H, W), differentiable
in the learnables, and `tensors()` all that is needed to render them again. `step` is used by redrawn noise only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ld3m.data.dataset import Normalization
from ld3m.method import released
from ld3m.method.recompute import recomputed
from ld3m.method.sampler import Skip, noised, reverse, sample
from ld3m.models.diffusion_prior import Prior
from ld3m.models.gan import Generator
from ld3m.runtime.chunked import in_chunks
from ld3m.runtime.seeds import generator

CLAMPS = {
    "none": lambda x: x,
    "soft": lambda x: x + (x.clamp(-1, 1) - x).detach(),  # the values of "hard", the gradient of "none"
    "hard": lambda x: x.clamp(-1, 1),  # the released code's: saturated pixels have no gradient
}
DEFAULT_LEARNED = {"x0": "z", "mean": "z_T", "none": "z_T"}  # what each skip carries the gradient to
MEAN_W_DRAWS = 1000  # codes of a class that `mean_w` averages


@dataclass(frozen=True)
class Pixels:
    """The images themselves."""

    labels: Tensor  # (N,), on the CPU as all labels
    learnables: dict[str, Tensor]  # {"images": (N, C, H, W)}, normalized

    def render(self, *, step: int | None = None) -> Tensor:
        return self.learnables["images"]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.learnables)


@dataclass(frozen=True)
class LatentCodes:
    """LD3M: a latent and a class conditioning for every image, rendered by the reverse process of a frozen prior."""

    labels: Tensor  # (N,)
    learnables: dict[str, Tensor]  # c (N, 1, D), and z or z_T (N, c, h, w)
    fixed: dict[str, Tensor]  # eps (N, c, h, w), and z where z_T is learned
    prior: Prior
    normalization: Normalization
    steps: int
    guidance: float
    skip: Skip
    clamp: str
    noise: str
    render_batch: int
    uncheckpointed_steps: int
    threads: int
    seed: int

    def render(self, *, step: int | None = None) -> Tensor:
        if self.noise == "stored" or step is None:
            return self._render(self.fixed["eps"])
        return released.redrawn_noise(self._render, self.fixed["eps"], seed=self.seed, step=step)

    def tensors(self) -> dict[str, Tensor]:
        return self.learnables | self.fixed

    @torch.no_grad()
    def path(self, index: Tensor) -> Tensor:
        """Decode z_T and the state after every reverse step, of the images at `index` (n,): (T + 1, n, C, H, W)."""
        states: list[Tensor] = []
        self._reverse({name: tensor[index] for name, tensor in self.tensors().items()}, on_state=states.append)
        return torch.stack([self._decode(z_t) for z_t in states])

    def _render(self, eps: Tensor) -> Tensor:
        codes = self.tensors() | {"eps": eps}
        return in_chunks(self._images, codes, size=self.render_batch, threads=self.threads)

    def _images(self, codes: dict[str, Tensor]) -> Tensor:
        z_0 = self._reverse(codes)
        return recomputed(self._decode, z_0) if self.uncheckpointed_steps == 0 else self._decode(z_0)

    def _reverse(self, codes: dict[str, Tensor], on_state: Callable[[Tensor], None] = lambda z_t: None) -> Tensor:
        z_T = codes["z_T"] if "z_T" in codes else noised(self.prior, codes["z"], codes["eps"], steps=self.steps)
        return reverse(
            self.prior,
            z_T,
            codes["c"],
            z=codes["z"],
            steps=self.steps,
            guidance=self.guidance,
            skip=self.skip,
            uncheckpointed_steps=self.uncheckpointed_steps,
            on_state=on_state,
        )

    def _decode(self, z_0: Tensor) -> Tensor:
        return self.normalization.normalize(CLAMPS[self.clamp](self.prior.decode(z_0)))


@dataclass(frozen=True)
class GeneratorCodes:
    """GLaD: the features that enter one layer of a frozen GAN, and a code for each layer from there on."""

    labels: Tensor  # (N,)
    learnables: dict[str, Tensor]  # f (N, C, h, h) and w (N, layers - layer, w_width)
    gan: Generator
    normalization: Normalization
    layer: int
    render_batch: int
    threads: int

    def render(self, *, step: int | None = None) -> Tensor:
        return in_chunks(self._images, self.learnables, size=self.render_batch, threads=self.threads)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.learnables)

    def _images(self, codes: dict[str, Tensor]) -> Tensor:
        return recomputed(self._synthesize, codes["f"], codes["w"])

    def _synthesize(self, f: Tensor, w: Tensor) -> Tensor:
        return self.normalization.normalize(self.gan.synthesize(f, w, self.layer))


def start_pixels(
    x: Tensor,
    labels: Tensor,
    *,
    normalization: Normalization,
    prior: Prior | None,
    seed: int,
    threads: int,
    start: Literal["real", "herding", "noise"],
) -> Pixels:
    """Start from the real images `x` (N, C, H, W) in [-1, 1], or from standard normal ones of that shape ("noise")."""
    images = _randn(x.shape, seed, "pixels").to(x) if start == "noise" else normalization.normalize(x)
    return Pixels(labels, {"images": images.requires_grad_()})


@torch.no_grad()
def start_latents(
    x: Tensor,
    labels: Tensor,
    *,
    normalization: Normalization,
    prior: Prior,
    seed: int,
    threads: int,
    start: Literal["real", "herding", "prior", "noise"],
    learn: Literal["auto", "z", "z_T"],
    steps: int,
    guidance: float,
    skip: Skip,
    clamp: Literal["none", "soft", "hard"],
    noise: Literal["stored", "redrawn"],
    encoder_input: Literal["x", "normalized"],
    shifted_normalization: bool,
    render_batch: int,
    uncheckpointed_steps: int,
) -> LatentCodes:
    """Start LD3M: one latent and one conditioning for every image.

    Parameters
    ----------
    x, labels
        Real images (N, C, H, W) in [-1, 1] and their classes (N,): with "herding" chosen ones.
    start
        Encode `x`, or samples of the prior, or draw standard normal latents ("noise"); `c` starts from the classes.
    learn
        `z` or `z_T`, beside `c`; "auto" learns `z` with the skip "x0" and `z_T` with the others.
    clamp
        Of the decoded images to [-1, 1]; "soft" passes all of the gradient.
    noise, encoder_input, shifted_normalization
        "redrawn", "normalized", True and `clamp="hard"` are defects of the released code, see `released`.
    render_batch, threads
        Images that each thread takes through the U-Net at once: lower both where memory is short.
    steps, guidance, skip, uncheckpointed_steps
        Of `sampler.reverse`; the graph of the decoder is kept where that of any step is.
    """
    learn = DEFAULT_LEARNED[skip] if learn == "auto" else learn
    size_px = x.shape[-1]
    if start == "prior":
        x = sample(prior, labels, size_px=size_px, steps=steps, guidance=guidance, render_batch=render_batch, seed=seed)
    encoded = x if encoder_input == "x" else normalization.normalize(x)  # the encoder was trained on [-1, 1]
    z = torch.cat([prior.encode(part) for part in encoded.split(render_batch)])
    if start == "noise":
        z = _randn(z.shape, seed, "latents").to(z)
    eps = torch.stack([_randn(prior.latent_shape(size_px), seed, "eps", i) for i in range(len(labels))]).to(z)
    latent = z if learn == "z" else noised(prior, z, eps, steps=steps)
    return LatentCodes(
        labels=labels,
        learnables={learn: latent.requires_grad_(), "c": prior.embed(labels).requires_grad_()},
        fixed={"eps": eps} if learn == "z" else {"eps": eps, "z": z},
        prior=prior,
        normalization=released.shifted_normalization(normalization) if shifted_normalization else normalization,
        steps=steps,
        guidance=guidance,
        skip=skip,
        clamp=clamp,
        noise=noise,
        render_batch=render_batch,
        uncheckpointed_steps=uncheckpointed_steps,
        threads=threads,
        seed=seed,
    )


@torch.no_grad()
def start_generator(
    x: Tensor,
    labels: Tensor,
    *,
    normalization: Normalization,
    prior: Generator,
    seed: int,
    threads: int,
    layer: int,
    mean_w: bool,
    shifted_normalization: bool,
    render_batch: int,
) -> GeneratorCodes:
    """Start GLaD from generated images of the classes `labels` (N,); a GAN has no encoder, so `x` is not used.

    Parameters
    ----------
    layer
        Learned are the features that enter it, and the codes of the layers from it on; 0 is the first.
    mean_w
        With one image per class, start from the mean code of the class, not from the code of random noise. Several
        images per class always start from random codes: equal ones would stay equal.
    shifted_normalization
        A defect of the released code, see `released`.
    """
    if not 0 <= layer < prior.layers:
        raise ValueError(f"layer={layer}: this GAN has the layers 0 to {prior.layers - 1}")
    is_one_a_class = len(labels.unique()) == len(labels)
    draws = MEAN_W_DRAWS if mean_w and is_one_a_class else 1
    codes = []
    for i in range(len(labels)):
        noise = _randn((draws, prior.noise_width), seed, "glad", i).to(next(prior.parameters()))
        codes.append(prior.mapping(noise, labels[i].expand(draws)).mean(0))
    w = torch.stack(codes)[:, None].expand(-1, prior.layers, -1)  # (N, layers, w_width)
    parts = [prior.features(part, layer) for part in w[:, :layer].split(render_batch)]
    learnables = {"f": torch.cat(parts).requires_grad_(), "w": w[:, layer:].clone().requires_grad_()}
    normalization = released.shifted_normalization(normalization) if shifted_normalization else normalization
    return GeneratorCodes(labels, learnables, prior, normalization, layer, render_batch, threads)


def _randn(shape: tuple[int, ...], seed: int, *purpose: str | int) -> Tensor:
    return torch.randn(tuple(shape), generator=generator(seed, *purpose))


SPACES = {"pixel": start_pixels, "ld3m": start_latents, "glad": start_generator}
