"""The prior: its quantizer, its fingerprint, its variants. test_compvis compares its functions with the original."""

from dataclasses import replace

import pytest
import torch
from conftest import make_prior

from ld3m.models.prior_io import load_prior
from ld3m.models.prior_variants import unconditional, with_random_unet

SCALE = 0.7  # of make_prior


def nearest_codes(prior, z):
    codes = prior.autoencoder.quantize.embedding.weight  # (codebook, c)
    return torch.stack([codes[(codes - p).square().sum(1).argmin()] for p in z.movedim(1, -1).reshape(-1, z.shape[1])])


def test_quantize_takes_the_nearest_codes_and_passes_the_gradient(prior, randn):
    z = randn(3, 2, 4, 4).requires_grad_()
    quantized = prior.quantize(z)
    nearest = SCALE * nearest_codes(prior, z / SCALE)
    torch.testing.assert_close(quantized.movedim(1, -1).reshape(-1, 2), nearest)
    assert len(nearest.unique(dim=0)) > 3
    weight = randn(3, 2, 4, 4)
    torch.testing.assert_close(torch.autograd.grad((quantized * weight).sum(), z)[0], weight, rtol=0, atol=1e-15)


def test_decode_goes_through_the_quantizer(prior, randn):
    z, autoencoder = randn(3, 2, 4, 4), prior.autoencoder
    pixels = prior.decode(z)
    assert pixels.shape == (3, 1, 16, 16)
    torch.testing.assert_close(prior.decode(prior.quantize(z)), pixels)
    codes = nearest_codes(prior, z / SCALE).view(3, 4, 4, 2).movedim(-1, 1)
    torch.testing.assert_close(autoencoder.decoder(autoencoder.post_quant_conv(codes)), pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_px": 4}, "size_px=4: .*multiples of 8"),
        ({"size_px": 20}, "size_px=20: .*multiples of 8"),
        ({"channels": 3}, "channels=3: this prior has 1"),
        ({"classes": 2}, "classes=2: this prior has 3"),
    ],
)
def test_a_data_set_that_does_not_fit(prior, change, message):
    for size_px in (8, 16, 40):
        prior.check(size_px=size_px, channels=1, classes=3)
        assert prior.latent_shape(size_px) == (2, size_px // 4, size_px // 4)
    with pytest.raises(ValueError, match=message):
        prior.check(**{"size_px": 16, "channels": 1, "classes": 3} | change)


def test_build_depends_on_the_seed_alone():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = make_prior().fingerprint()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert make_prior().fingerprint() == first != make_prior(seed=1).fingerprint()


def test_fingerprint_changes_with_scale_schedule_and_any_weight_but_not_with_the_order_of_memory():
    prior, other, changed = make_prior(), make_prior(), make_prior().alpha_bar.clone()
    other.unet.to(memory_format=torch.channels_last)  # as on CUDA
    assert other.fingerprint() == prior.fingerprint()
    changed[-1] *= 1.001
    others = prior, make_prior(scaling_factor=0.8), replace(prior, alpha_bar=changed)
    found = {each.fingerprint() for each in others}
    for part in (prior.unet, prior.autoencoder, prior.embedding):
        with torch.no_grad():
            list(part.parameters())[-1].view(-1)[-1] += 1e-3
        found.add(prior.fingerprint())
    assert len(found) == 6


def test_the_prior_without_classes(prior):
    made, labels = unconditional(prior), torch.tensor([0, 1])
    assert torch.equal(made.embed(labels), prior.null(2)) and torch.equal(made.null(2), prior.null(2))
    assert not torch.equal(prior.embed(labels), prior.null(2))  # the given prior keeps its classes


@pytest.mark.parametrize("is_dit", [False, True])
def test_the_prior_with_a_random_unet(prior, dit_folder, randn, is_dit):
    given = load_prior(dit_folder) if is_dit else prior
    weight = given.embedding.weight
    z = randn(2, *given.latent_shape(32)).to(weight)
    made, again, other = (with_random_unet(given, seed=seed) for seed in (0, 0, 1))
    null, predicted = given.null(2), made.denoise(z, 1, given.null(2))
    assert torch.equal(again.denoise(z, 1, null), predicted) and predicted.dtype == z.dtype
    assert not any(torch.allclose(each.denoise(z, 1, null), predicted) for each in (given, other))
    assert made.autoencoder is given.autoencoder and torch.equal(made.embedding.weight, weight)
    assert not any(parameter.requires_grad for parameter in made.unet.parameters())


def test_a_replayed_prior_is_no_longer_one_once_it_is_changed():
    replayed = make_prior().freeze_().with_cuda_graphs()
    assert replayed.recordings and not replayed.in_precision("bfloat16").recordings
    assert not with_random_unet(replayed, seed=0).recordings
