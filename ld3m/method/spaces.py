"""The spaces: what is learned, and how it becomes images. A synthetic set has `labels`, `learnables` and `render()`.

Classes are contiguous: image i has class i // ipc. `render()` returns images (N, C, H, W) that are differentiable
in the learnables; `images.backward(grad_images)` therefore fills their gradients. The iteration `step` matters only
to the released code's redrawn noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ld3m.data.dataset import Normalization
from ld3m.method.sampler import Skip, noised, recomputed, reverse, sample
from ld3m.models.diffusion_prior import Prior
from ld3m.models.gan import Generator
from ld3m.runtime.chunked import in_chunks
from ld3m.runtime.seeds import generator

Clamp = Literal["none", "hard", "soft"]
Noise = Literal["stored", "redrawn"]
CLAMPS = {
    "none": lambda pixels: pixels,
    "hard": lambda pixels: pixels.clamp(-1, 1),  # no gradient where it saturates
    "soft": lambda pixels: pixels + (pixels.clamp(-1, 1) - pixels).detach(),  # the same values, all of the gradient
}
DEFAULT_LEARNED = {"x0": "z", "mean": "z_T", "none": "z_T"}  # what each skip carries the gradient to
MEAN_W_DRAWS = 1000  # codes of a class that `mean_w` averages


@dataclass(frozen=True)
class Pixels:
    """The images themselves."""

    labels: Tensor  # (N,), on the CPU as all labels
    learnables: dict[str, Tensor]  # {"images": (N, C, H, W)}

    def render(self, *, step: int | None = None) -> Tensor:
        return self.learnables["images"]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is needed to render the set again."""
        return dict(self.learnables)


@dataclass(frozen=True)
class LatentCodes:
    """A latent and a class conditioning for every image, rendered by the reverse process of a frozen prior."""

    labels: Tensor  # (N,)
    learnables: dict[str, Tensor]  # c (N, 1, D) and z or z_T (N, c, h, w)
    fixed: dict[str, Tensor]  # eps (N, S, c, h, w), and z where z_T is learned
    prior: Prior
    normalization: Normalization
    steps: int
    guidance: float
    skip: Skip
    eta: float
    clamp: Clamp
    noise: Noise
    render_batch: int  # images that go through the U-Net at once: lower it where memory is short
    seed: int
    uncheckpointed_steps: int = 0  # whose graphs, and the decoder's, are kept for the backward pass
    threads: int = 1  # so many such batches at once

    def render(self, *, step: int | None = None) -> Tensor:
        if self.noise == "stored" or step is None:
            return self._render(self.tensors())
        # The released code: the loss is measured in one draw of the noise, its gradient taken in another.
        measured, followed = (self.tensors() | {"eps": self._redrawn(step, place)} for place in ("loss", "gradient"))
        with torch.no_grad():
            images = self._render(measured)
        followed = self._render(followed)
        return images + (followed - followed.detach())

    def _redrawn(self, step: int, place: str) -> Tensor:
        return _noise(self.fixed["eps"].shape, self.seed, "redrawn", place, step).to(self.fixed["eps"])

    def _render(self, tensors: dict[str, Tensor]) -> Tensor:
        return in_chunks(self._part, tensors, size=self.render_batch, threads=self.threads)

    @torch.no_grad()
    def path(self, index: Tensor) -> Tensor:
        """Images (T+1, n, C, H, W) decoded from z_T and from the state after every reverse step, of the set's images
        at `index` (n,); the last are those that `render` gives."""
        states: list[Tensor] = []
        self._reverse({name: tensor[index] for name, tensor in self.tensors().items()}, on_state=states.append)
        return torch.stack([self._decode(z_t) for z_t in states])

    def _part(self, codes: dict[str, Tensor]) -> Tensor:
        z_0 = self._reverse(codes)
        return (
            self._decode(z_0) if self.uncheckpointed_steps else recomputed(self._decode, z_0)
        )  # the decoder is one more step

    def _reverse(self, codes: dict[str, Tensor], on_state: Callable[[Tensor], None] = lambda z_t: None) -> Tensor:
        eps = codes["eps"].transpose(0, 1)  # (S, B, c, h, w)
        z_T = codes["z_T"] if "z_T" in codes else noised(self.prior, codes["z"], eps[0], steps=self.steps)
        return reverse(
            self.prior,
            z_T,
            codes["c"],
            z=codes["z"],
            steps=self.steps,
            guidance=self.guidance,
            skip=self.skip,
            eta=self.eta,
            eps=eps[1:],
            uncheckpointed_steps=self.uncheckpointed_steps,
            on_state=on_state,
        )

    def _decode(self, z_0: Tensor) -> Tensor:
        pixels = self.prior.decode(z_0)
        return self.normalization.normalize(CLAMPS[self.clamp](pixels))

    def tensors(self) -> dict[str, Tensor]:
        return self.learnables | self.fixed


@dataclass(frozen=True)
class GeneratorCodes:
    """What enters one layer of a frozen GAN, and a code for each layer from there on, for every image."""

    labels: Tensor  # (N,)
    learnables: dict[str, Tensor]  # f (N, C, h, h) and w (N, layers - layer, w_width)
    gan: Generator
    normalization: Normalization
    layer: int
    render_batch: int  # images that go through the generator at once: lower it where memory is short
    threads: int = 1  # so many such batches at once

    def render(self, *, step: int | None = None) -> Tensor:
        return in_chunks(self._part, self.learnables, size=self.render_batch, threads=self.threads)

    def _part(self, codes: dict[str, Tensor]) -> Tensor:
        return checkpoint(self._render, codes["f"], codes["w"], use_reentrant=False, preserve_rng_state=False)

    def _render(self, f: Tensor, w: Tensor) -> Tensor:
        return self.normalization.normalize(self.gan.synthesize(f, w, self.layer))

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.learnables)


def start_pixels(pixels: Tensor, labels: Tensor, *, normalization: Normalization, start: str, seed: int) -> Pixels:
    """Starts from real pixels (N, C, H, W) in [-1, 1], or from standard normal images of that shape."""
    images = normalization.normalize(pixels) if start == "real" else _noise(pixels.shape, seed, "pixels").to(pixels)
    return Pixels(labels, {"images": images.requires_grad_()})


@torch.no_grad()
def start_ld3m(
    pixels: Tensor,
    labels: Tensor,
    *,
    prior: Prior,
    normalization: Normalization,
    start: str,
    learn: Literal["auto", "z", "z_T"],
    steps: int,
    guidance: float,
    skip: Skip,
    eta: float,
    clamp: Clamp,
    noise: Noise,
    encoder_input: Literal["pixels", "images"],
    render_batch: int,
    seed: int,
    uncheckpointed_steps: int = 0,
    threads: int = 1,
) -> LatentCodes:
    """Starts from the encoded real pixels (N, C, H, W) in [-1, 1], from samples of the prior, or from standard normal
    latents; the conditioning starts from the class embeddings.

    `learn="auto"` learns `z` with the skip `x0` and `z_T` with the others. Defects of the released code:
    `encoder_input="images"` feeds the encoder normalised images, `noise="redrawn"` draws new noise in every pass.
    """
    learn = DEFAULT_LEARNED[skip] if learn == "auto" else learn
    shape = prior.latent_shape(pixels.shape[-1])
    if start == "prior":
        drawing = dict(steps=steps, guidance=guidance, render_batch=render_batch, seed=seed)
        pixels = sample(prior, labels, size_px=pixels.shape[-1], **drawing)
    encoded = pixels if encoder_input == "pixels" else normalization.normalize(pixels)
    z = torch.cat([prior.encode(part) for part in encoded.split(render_batch)])
    if start == "noise":
        z = _noise(z.shape, seed, "latents").to(z)
    count = 1 + (steps if eta else 0)
    eps = torch.stack([_noise((count, *shape), seed, "eps", i) for i in range(len(labels))]).to(z)
    codes = {"z": z} if learn == "z" else {"z_T": noised(prior, z, eps[:, 0], steps=steps)}
    learnables = codes | {"c": prior.embed(labels)}
    for tensor in learnables.values():
        tensor.requires_grad_()
    return LatentCodes(
        labels=labels,
        learnables=learnables,
        fixed={"eps": eps} | ({} if learn == "z" else {"z": z}),
        prior=prior,
        normalization=normalization,
        steps=steps,
        guidance=guidance,
        skip=skip,
        eta=eta,
        clamp=clamp,
        noise=noise,
        render_batch=render_batch,
        seed=seed,
        uncheckpointed_steps=uncheckpointed_steps,
        threads=threads,
    )


@torch.no_grad()
def start_glad(
    labels: Tensor,
    *,
    gan: Generator,
    normalization: Normalization,
    layer: int,
    mean_w: bool | Literal["auto"],
    render_batch: int,
    seed: int,
    threads: int = 1,
) -> GeneratorCodes:
    """Starts from generated images of the classes, as GLaD does; a GAN has no encoder, so real images are not used.

    The codes are those of random noise, one stream an image, or with `mean_w` the mean code of the class: the images
    of a class would then start, and stay, alike, so it takes one image a class, where `mean_w="auto"` chooses it. The
    feature maps are what the layers before `layer` make of the codes.
    """
    if not 0 <= layer < gan.layers:
        raise ValueError(f"spaces.glad.layer = {layer}: this GAN has the layers 0 to {gan.layers - 1}")
    is_one_a_class = len(labels.unique()) == len(labels)
    if mean_w is True and not is_one_a_class:
        raise ValueError("spaces.glad.mean_w starts all images of a class alike: set it to auto for ipc above 1")
    draws = MEAN_W_DRAWS if mean_w and is_one_a_class else 1
    codes = []
    for i in range(len(labels)):
        noise = _noise((draws, gan.noise_width), seed, "glad", i).to(next(gan.parameters()))
        codes.append(gan.mapping(noise, labels[i].expand(draws)).mean(0))
    w = torch.stack(codes)[:, None].expand(-1, gan.layers, -1)  # (N, layers, w_width)
    parts = [gan.features(part, layer) for part in w[:, :layer].split(render_batch)]
    learnables = {"f": torch.cat(parts).clone(), "w": w[:, layer:].clone()}
    for tensor in learnables.values():
        tensor.requires_grad_()
    return GeneratorCodes(labels, learnables, gan, normalization, layer, render_batch, threads)


def shifted(normalization: Normalization) -> Normalization:
    """What the released code normalises synthetic images with: a mean that is not the real images'. It subtracts
    (0.4377, 0.4438, 0.4728) from them and (0.485, 0.456, 0.406) from real ones; here is that difference."""
    off = (0.4377 - 0.485, 0.4438 - 0.456, 0.4728 - 0.406)
    return replace(normalization, mean=tuple(m + o for m, o in zip(normalization.mean, off, strict=False)))


def _noise(shape: tuple[int, ...], seed: int, *purpose: str | int) -> Tensor:
    return torch.randn(tuple(shape), generator=generator(seed, *purpose))
