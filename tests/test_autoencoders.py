"""Autoencoders from elsewhere: TAEF2 is its plain definition, latents are standardized and encoded once."""

import os
from functools import partial

import pytest
import torch
from conftest import directional_derivative, relative_difference
from diffusers import AutoencoderTiny, VQModel
from tiny_priors import make, make_autoencoder, write
from torch.nn.functional import conv2d, group_norm, interpolate

from ld3m.data.dataset import Split
from ld3m.models.diffusers_folder import TAEF2_FILES
from ld3m.models.prior_io import load_autoencoder, load_prior, save_prior
from ld3m.models.tiny_autoencoder import TAEF2
from ld3m.models.train_prior import build_prior, encode_split, fit_denoiser, standardize_latents
from ld3m.runtime import paths

ENCODER = "c b db db db dp dp dp".split()  # c: convolution, d: of stride 2, b: block, p: block with a branch


def released():
    """State dicts with the names and shapes of the released files."""
    model = make(TAEF2)
    encoder = {key.removeprefix("encoder.layers."): value for key, value in model.encoder.layers.state_dict().items()}
    decoder = {}
    for key, value in model.decoder.layers.state_dict().items():
        index, _, name = key.partition(".")
        decoder[f"{int(index) + 1}.{name}"] = value  # a clamp without weights is 0
    return encoder, decoder


@pytest.fixture
def taef2(tmp_path):
    for name, state in zip(TAEF2_FILES, released(), strict=True):
        torch.save({key: value.half() for key, value in state.items()}, tmp_path / name)
    return tmp_path


def block(x, state, k):
    """Block k of TAEF2, from its description alone."""
    if f"{k}.pool.0.weight" in state:
        wide = group_norm(
            conv2d(x, state[f"{k}.pool.0.weight"]), 4, state[f"{k}.pool.1.weight"], state[f"{k}.pool.1.bias"]
        )
        x = x + conv2d(wide.relu(), state[f"{k}.pool.3.weight"])
    y = x
    for layer in (0, 2, 4):
        y = convolved(y.relu() if layer else y, state, f"{k}.conv.{layer}")
    return (x + y).relu()


def convolved(x, state, name, stride=1):
    return conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=stride, padding=1)


def plain_encode(x, state):
    z = block(convolved((x + 1) / 2, state, "0"), state, 1)
    for k in (2, 6, 10):
        z = convolved(z, state, f"{k}", stride=2)
        for j in (1, 2, 3):
            z = block(z, state, k + j)
    return convolved(z, state, "14")


def plain_decode(z, state):
    x = convolved(3 * torch.tanh(z / 3), state, "1").relu()
    for k in (3, 8, 13):
        for j in range(3):
            x = block(x, state, k + j)
        x = convolved(interpolate(x, scale_factor=2), state, f"{k + 4}")
    return 2 * convolved(block(x, state, 18), state, "19") - 1


def test_taef2_is_the_released_model(taef2, randn):
    model = load_autoencoder(str(taef2)).double()
    encoder, decoder = ({key: value.half().double() for key, value in state.items()} for state in released())
    x, z = randn(2, 3, 24, 16), 3 * randn(2, 32, 3, 2)
    assert relative_difference(model.encode(x).latents, plain_encode(x, encoder)) < 1e-12
    assert relative_difference(model.decode(z).sample, plain_decode(z, decoder)) < 1e-12
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def small_prior(autoencoder, *, kind="unet"):
    unused = dict(channels=3, latent_channels=0, codebook=0, autoencoder_widths=())
    sizes = dict(blocks=2, conditioning_width=8, size_px=32, classes=2, seed=0)
    return build_prior(
        autoencoder=autoencoder, kind=kind, widths=(64,) if kind == "dit" else (32, 32), **unused, **sizes
    )


def colored(count=12, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    uint8 = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return Split(uint8, torch.arange(count) % 2, ("a", "b"))


def test_every_channel_of_the_latents_has_mean_0_and_variance_1_and_the_gradient_is_exact(taef2, randn):
    prior, split = small_prior(load_autoencoder(str(taef2))), colored()
    raw = prior.autoencoder.encode(split.x()).latents
    standardize_latents(prior, split)
    z = prior.encode(split.x())
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    torch.testing.assert_close(prior.decode(z), prior.autoencoder.decode(raw).sample, rtol=1e-3, atol=1e-3)
    prior = prior.to(torch.float64).freeze_()
    weights, start, direction = randn(1, 3, 32, 32), randn(1, 32, 4, 4), randn(1, 32, 4, 4)

    def loss(z):
        return (weights * prior.decode(z)).sum()

    start.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(start), start)
    expected = directional_derivative(loss, [start.detach()], [direction])
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "denoiser"), [("taef2", "unet"), ("taef2", "dit"), ("tiny", "unet"), ("kl", "dit"), ("vq", "unet")]
)
def test_a_prior_with_an_autoencoder_from_elsewhere_is_trained_written_and_read(kind, denoiser, taef2, tmp_path):
    if kind == "taef2":
        autoencoder = load_autoencoder(str(taef2))
    elif kind == "vq":  # of a whole prior
        vq = make_autoencoder(VQModel, num_vq_embeddings=16)
        autoencoder = load_autoencoder(str(write(tmp_path / "whole", autoencoder=vq)))
    else:
        made = make(AutoencoderTiny) if kind == "tiny" else make_autoencoder(shift_factor=0.3)
        made.save_pretrained(tmp_path / "alone")
        autoencoder = load_autoencoder(str(tmp_path / "alone"))
    before = [parameter.clone() for parameter in autoencoder.parameters()]
    prior, split = small_prior(autoencoder, kind=denoiser), colored()
    standardize_latents(prior, split)
    losses = fit_denoiser(prior, split, steps=3, batch=4, learning_rate=1e-3, null_share=0.1, ema_decay=0.9, seed=0)
    assert all(map(torch.equal, autoencoder.parameters(), before)) and len(losses) == 3
    save_prior(prior, tmp_path / "prior", dtype=torch.float32)
    again = load_prior(tmp_path / "prior")
    x = split.x(torch.arange(2))
    assert torch.equal(again.encode(x), prior.encode(x)) and again.fingerprint() == prior.fingerprint()
    z, c = again.encode(x), again.embed(torch.tensor([1, 0]))
    assert torch.equal(again.denoise(z, 500, c), prior.denoise(z, 500, c)) and again.latent_shape(32) == z[0].shape
    assert not torch.equal(again.denoise(z, 500, c), again.denoise(z, 500, again.null(2)))


def test_latents_are_encoded_once_for_every_autoencoder_and_split(taef2, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "LATENTS", tmp_path / "latents")
    monkeypatch.setattr("ld3m.models.train_prior.prior_chunk_size", lambda size_px: 5)
    prior, encoded = small_prior(load_autoencoder(str(taef2))), []
    monkeypatch.setattr(
        prior.autoencoder, "encode", lambda x, encode=prior.autoencoder.encode: encoded.append(len(x)) or encode(x)
    )
    z = encode_split(prior, colored()).clone()
    (file,) = (tmp_path / "latents").glob("*.float32")
    assert encoded == [5, 5, 2] and torch.equal(z[:5], prior.encode_raw(colored().x(torch.arange(5))))
    encoded.clear()
    assert torch.equal(encode_split(prior, colored()), z) and not encoded
    os.truncate(file, 7 * z[0].nbytes)  # killed while it wrote the second part
    assert torch.equal(encode_split(prior, colored()), z) and encoded == [5, 2]
    assert not torch.equal(encode_split(prior, colored(seed=1)), z)
    with torch.no_grad():
        prior.autoencoder.encoder.layers[0].bias.add_(1)
    assert not torch.equal(encode_split(prior, colored()), z)


def without(states, part, key):
    del states[part][key]


def not_finite(states):
    states[1]["19.bias"][0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: states[0].clear(), "Missing key"),
        (partial(without, part=1, key="18.conv.2.weight"), "Missing key.*decoder.layers.17.conv.2.weight"),
        (
            lambda states: states[0].update({"0.weight": torch.zeros(64, 1, 3, 3)}),
            "size mismatch for encoder.layers.0.w",
        ),
        (not_finite, "not finite .*decoder.layers.18.bias"),
    ],
)
def test_files_of_another_autoencoder_are_named(tmp_path, change, message):
    states = released()
    change(states)
    for name, state in zip(TAEF2_FILES, states, strict=True):
        torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match=f"(?s){tmp_path} cannot be used: .*{message}"):
        load_autoencoder(str(tmp_path))


def test_broken_and_missing_files_are_named(taef2, tmp_path):
    (taef2 / TAEF2_FILES[1]).write_text("<html>")
    with pytest.raises(ValueError, match="taef2_decoder.pth is broken"):
        load_autoencoder(str(taef2))
    (taef2 / TAEF2_FILES[1]).unlink()
    with pytest.raises(ValueError, match="taef2_decoder.pth"):
        load_autoencoder(str(taef2))
    with pytest.raises(
        FileNotFoundError, match="nothing: it must have config.json .* or taef2_encoder.pth and taef2_d"
    ):
        load_autoencoder(str(tmp_path / "nothing"))
