"""The spaces: what a set renders, that it always renders the same, and that its gradient is that of plain autograd."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX, make_prior, relative_difference, start_ld3m

from benchmarks.memory import LiveBytes
from ld3m.data.dataset import Normalization
from ld3m.method import sampler, spaces
from ld3m.method.released import shifted_normalization
from ld3m.method.sampler import noised, reverse, sample
from ld3m.method.spaces import start_generator, start_pixels
from ld3m.models.gan import build_generator
from ld3m.runtime.seeds import generator

IPC = 2
LABELS = torch.arange(CLASSES).repeat_interleave(IPC)


@pytest.fixture
def pixels():
    draw = torch.Generator().manual_seed(2)
    return 2 * torch.rand(len(LABELS), 1, SIZE_PX, SIZE_PX, dtype=torch.float64, generator=draw) - 1


@pytest.fixture(scope="module")
def gan():
    config = dict(channels=1, classes=CLASSES, noise_width=6, w_width=5, widths=(8, 6, 4))
    return build_generator(seed=0, **config).double().freeze_()


def codes(prior, pixels, labels=LABELS, **changes):
    return start_ld3m(pixels, labels, prior, **changes)


def glad(gan, labels=LABELS, **changes):
    options = dict(layer=2, mean_w=False, shifted_normalization=False, render_batch=len(labels), seed=0, threads=1)
    return start_generator(None, labels, normalization=NORMALIZATION, prior=gan, **options | changes)


def draws(shape, *purposes):
    """One draw for each purpose, of a set with seed 1."""
    return torch.stack([torch.randn(shape, generator=generator(1, *purpose)) for purpose in purposes]).double()


def images_and_gradients(made, weight):
    for tensor in made.learnables.values():
        tensor.grad = None
    images = made.render()
    images.backward(weight)
    return images.detach(), {name: tensor.grad.clone() for name, tensor in made.learnables.items()}


def without_checkpoints(monkeypatch):
    for module in (sampler, spaces):
        monkeypatch.setattr(module, "recomputed", lambda function, *inputs, keep_graph=False: function(*inputs))


def test_pixels_from_real_images_and_from_noise(pixels):
    given = dict(normalization=NORMALIZATION, prior=None, seed=1, threads=1)
    made = start_pixels(pixels, LABELS, start="real", **given)
    images = made.render()
    torch.testing.assert_close(images.detach(), ((pixels + 1) / 2 - 0.4) / 0.3)
    assert list(made.learnables) == list(made.tensors()) == ["images"] and torch.equal(made.labels, LABELS)
    weight = torch.randn_like(images)
    images.backward(weight)
    assert torch.equal(made.learnables["images"].grad, weight)
    noise = start_pixels(pixels, LABELS, start="noise", **given).render()
    assert noise.is_leaf and noise.requires_grad and torch.equal(noise, draws(pixels.shape, ["pixels"])[0])


@pytest.mark.parametrize(("skip", "learned"), [("x0", "z"), ("mean", "z_T"), ("none", "z_T")])
def test_every_skip_learns_what_carries_its_gradient_and_another_choice_shows_the_same_images(
    prior, pixels, skip, learned
):
    made, *others = (codes(prior, pixels, skip=skip, learn=learn) for learn in ("auto", "z", "z_T"))
    assert set(made.learnables) == {learned, "c"}
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in made.learnables.values())
    assert not any(tensor.requires_grad for tensor in made.fixed.values())
    assert made.tensors().keys() == {"z", "z_T", "c", "eps"} - ({"z_T"} if learned == "z" else set())
    assert [set(other.learnables) for other in others] == [{"z", "c"}, {"z_T", "c"}]
    for other in others:
        torch.testing.assert_close(other.render().detach(), made.render().detach(), rtol=0, atol=1e-10)


def test_start_from_real_images(prior, pixels):
    made, c = codes(prior, pixels, skip="mean", render_batch=4), prior.embed(LABELS)
    torch.testing.assert_close(made.fixed["z"], prior.encode(pixels), rtol=0, atol=1e-12)
    z_T = noised(prior, made.fixed["z"], made.fixed["eps"], steps=3)
    torch.testing.assert_close(made.learnables["z_T"].detach(), z_T, rtol=0, atol=1e-12)
    assert torch.equal(made.learnables["c"].detach(), c)
    with torch.no_grad():
        made.learnables["c"].add_(1)
    assert torch.equal(prior.embed(LABELS), c)  # the prior is left alone


def test_start_from_noise_with_one_stream_an_image(prior, pixels):
    made = codes(prior, pixels, start="noise", seed=1)
    shape = prior.latent_shape(SIZE_PX)
    assert torch.equal(made.learnables["z"].detach(), draws((len(LABELS), *shape), ["latents"])[0])
    assert torch.equal(made.fixed["eps"], draws(shape, *(["eps", i] for i in range(len(LABELS)))))


def test_start_from_samples_of_the_prior(pixels):
    prior = make_prior().freeze_()
    made = codes(prior, pixels.float(), start="prior")
    drawn = sample(prior, LABELS, size_px=SIZE_PX, steps=3, guidance=3.0, render_batch=4, seed=0)
    torch.testing.assert_close(made.learnables["z"].detach(), prior.encode(drawn))


@pytest.mark.parametrize("skip", ["x0", "mean", "none"])
def test_images_and_gradient_equal_plain_autograd_for_any_render_batch(prior, pixels, randn, monkeypatch, skip):
    made, weight = codes(prior, pixels, skip=skip), randn(*pixels.shape)
    found = [images_and_gradients(replace(made, render_batch=count), weight) for count in (1, 4, 100)]
    without_checkpoints(monkeypatch)
    c, eps = made.learnables["c"], made.fixed["eps"]
    z = made.tensors()["z"]
    z_T = made.learnables["z_T"] if "z_T" in made.learnables else noised(prior, z, eps, steps=3)
    z_0 = reverse(prior, z_T, c, z=z, steps=3, guidance=3.0, skip=skip)
    plain = ((prior.decode(z_0) + 1) / 2 - 0.4) / 0.3
    expected = torch.autograd.grad((plain * weight).sum(), list(made.learnables.values()))
    assert all(gradient.norm() > 1e-6 for gradient in expected)
    for images, gradients in found:
        assert relative_difference(images, plain.detach()) < 1e-12
        for name, gradient in zip(made.learnables, expected, strict=True):
            assert relative_difference(gradients[name], gradient) < 1e-10, name


def test_kept_steps_and_threads_change_no_bit(prior, pixels, randn):
    made, weight = codes(prior, pixels, render_batch=4), randn(*pixels.shape)
    images, gradients = images_and_gradients(made, weight)
    for changes in ({"uncheckpointed_steps": 2}, {"uncheckpointed_steps": 2, "threads": 2}):
        same_images, same_gradients = images_and_gradients(replace(made, **changes), weight)
        assert torch.equal(images, same_images)
        assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)


@pytest.mark.parametrize(("space", "most", "without"), [("ld3m", 1.3, 1.5), ("glad", 1.6, 3)])
def test_memory_of_the_networks_is_that_of_one_render_batch(prior, gan, pixels, monkeypatch, space, most, without):
    def peak(count):
        if space == "ld3m":
            made = codes(prior, pixels[:count], LABELS[:count], render_batch=1, guidance=1.0, steps=2)
        else:
            made = glad(gan, LABELS[:count], render_batch=1, layer=0)
        with LiveBytes() as meter:
            made.render().sum().backward()
        return meter.peak

    assert peak(6) < most * peak(1)
    without_checkpoints(monkeypatch)
    assert peak(6) > without * peak(1)  # the meter sees what the networks would save


def test_the_set_is_a_fixed_set_of_images(prior, pixels, randn):
    made, weight = codes(prior, pixels), randn(*pixels.shape)
    images, gradients = images_and_gradients(made, weight)
    torch.manual_seed(99)  # the global generator has no say
    state = torch.random.get_rng_state()
    again, same = images_and_gradients(made, weight)
    assert torch.equal(again, images) and all(torch.equal(same[name], gradients[name]) for name in gradients)
    with torch.no_grad():
        assert torch.equal(codes(prior, pixels).render(), images)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("skip", ["x0", "mean"])
def test_the_path_starts_at_z_T_and_ends_at_the_rendered_images(prior, pixels, skip):
    made = codes(prior, pixels, skip=skip)
    index = torch.tensor([4, 1])
    path = made.path(index)
    assert path.shape == (4, 2, 1, SIZE_PX, SIZE_PX) and not path.requires_grad
    torch.testing.assert_close(path[-1], made.render().detach()[index])
    tensors = made.tensors()
    z_T = tensors["z_T"] if skip == "mean" else noised(prior, tensors["z"], tensors["eps"], steps=3)
    torch.testing.assert_close(path[0], NORMALIZATION.normalize(prior.decode(z_T[index])).detach())


def test_hard_clamp_stops_the_gradient_outside_the_range(prior, pixels):
    # the decoder of the shared prior stays inside: a copy of it whose last layer is stronger does not
    bright = replace(prior, autoencoder=copy.deepcopy(prior.autoencoder))
    bright.autoencoder.decoder.conv_out.weight.mul_(5)
    free, hard, soft = (codes(bright, pixels, clamp=clamp) for clamp in ("none", "hard", "soft"))
    with torch.no_grad():
        unclamped = NORMALIZATION.denormalize(free.render())
        outside = unclamped.abs() > 1
        assert 0.05 < outside.float().mean() < 0.95
        for clamped in (hard, soft):
            values = NORMALIZATION.denormalize(clamped.render())
            torch.testing.assert_close(values, unclamped.clamp(-1, 1), rtol=0, atol=1e-12)
    beyond = [images_and_gradients(made, outside.double())[1] for made in (free, hard, soft)]
    within = [images_and_gradients(made, (~outside).double())[1] for made in (free, hard)]
    for name in ("z", "c"):
        assert beyond[0][name].norm() > 1e-6 and beyond[1][name].norm() == 0
        assert relative_difference(beyond[2][name], beyond[0][name]) < 1e-12  # all of the gradient
        assert relative_difference(within[1][name], within[0][name]) < 1e-12


def test_redrawn_noise_measures_one_image_and_follows_another(prior, pixels, randn):
    """The released code's defect: the loss is that of one draw, its gradient that of the next."""
    made, weight = codes(prior, pixels, noise="redrawn", seed=1), randn(*pixels.shape)
    made.render(step=7).backward(weight)
    gradient = made.learnables["z"].grad.clone()
    for place in ("loss", "gradient"):
        eps = draws(made.fixed["eps"].shape, ["redrawn", place, 7])[0]
        images, gradients = images_and_gradients(replace(made, noise="stored", fixed={"eps": eps}), weight)
        assert torch.equal(made.render(step=7).detach(), images) == (place == "loss")
        assert (relative_difference(gradients["z"], gradient) < 1e-12) == (place == "gradient")
    assert not torch.equal(made.render(step=8), made.render(step=7))
    assert torch.equal(made.render(), codes(prior, pixels, seed=1).render())  # the set itself keeps its stored noise


def test_the_encoder_can_be_fed_what_the_released_code_feeds_it(prior, pixels):
    z = codes(prior, pixels, encoder_input="normalized", shifted_normalization=True).learnables["z"].detach()
    torch.testing.assert_close(z, prior.encode(((pixels + 1) / 2 - 0.4) / 0.3))  # rendered images alone are shifted


def test_shifted_normalization():
    shifted = shifted_normalization(Normalization((0.485, 0.456, 0.406), (0.2, 0.3, 0.4)))
    assert shifted.mean == pytest.approx((0.4377, 0.4438, 0.4728)) and shifted.std == (0.2, 0.3, 0.4)


def test_sets_are_rendered_with_the_shifted_normalization(prior, pixels, gan):
    for start in (partial(codes, prior, pixels), partial(glad, gan)):
        shifted, plain = (start(shifted_normalization=is_shifted).render() for is_shifted in (True, False))
        torch.testing.assert_close(shifted, plain - (0.4377 - 0.485) / 0.3)


@pytest.mark.parametrize(("layer", "side"), [(0, 4), (3, 8), (5, 16)])
def test_glad_starts_from_generated_images_of_the_classes_whatever_the_layer(gan, layer, side):
    made = glad(gan, layer=layer, render_batch=4, seed=1)
    noise = draws((6,), *(["glad", i] for i in range(len(LABELS))))
    expected = ((gan(noise, LABELS) + 1) / 2 - 0.4) / 0.3
    torch.testing.assert_close(made.render().detach(), expected, rtol=0, atol=1e-12)
    f, w = made.learnables["f"], made.learnables["w"]
    assert f.shape[2] == side and w.shape == (len(LABELS), 6 - layer, 5)
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in (f, w)) and made.tensors().keys() == {"f", "w"}
    with torch.no_grad():
        w.add_(1)  # what a step does: every layer has a code of its own


def test_glad_from_the_mean_code_of_the_class(gan, monkeypatch):
    monkeypatch.setattr(spaces, "MEAN_W_DRAWS", 3)
    labels = torch.arange(CLASSES)
    w = glad(gan, labels, mean_w=True, seed=1).learnables["w"].detach()
    for label, noise in enumerate(draws((3, 6), *(["glad", label] for label in range(CLASSES)))):
        mean = gan.mapping(noise, torch.full((3,), label)).mean(0)
        torch.testing.assert_close(w[label], mean.expand(4, -1), rtol=0, atol=1e-12)
    assert torch.equal(glad(gan, mean_w=True).learnables["w"], glad(gan).learnables["w"])  # several a class


@pytest.mark.parametrize("layer", [-1, 6])
def test_glad_refuses_a_layer_that_is_not_there(gan, layer):
    with pytest.raises(ValueError, match=f"layer={layer}: .* the layers 0 to 5"):
        glad(gan, layer=layer)


def test_the_images_and_gradient_of_glad_equal_plain_autograd_for_any_render_batch(gan, randn):
    weight = randn(len(LABELS), 1, SIZE_PX, SIZE_PX)
    f, w = glad(gan).learnables.values()
    plain = ((gan.synthesize(f, w, 2) + 1) / 2 - 0.4) / 0.3
    expected = dict(zip(("f", "w"), torch.autograd.grad((plain * weight).sum(), (f, w)), strict=True))
    for render_batch in (1, 4, 100):
        images, gradients = images_and_gradients(glad(gan, render_batch=render_batch), weight)
        torch.testing.assert_close(images, plain.detach(), rtol=0, atol=1e-12)
        for name, gradient in expected.items():
            assert gradient.norm() > 1e-6 and relative_difference(gradients[name], gradient) < 1e-12, name
