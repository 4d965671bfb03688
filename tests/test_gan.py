"""The GAN prior: cut anywhere it is the uncut generator, its folder is not trusted, its training repeats."""

import json

import pytest
import torch
from conftest import make_halves
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, leaky_relu

from ld3m.data.augment import OPERATIONS
from ld3m.data.dataset import Dataset
from ld3m.evaluation.prior_quality import check_gan, spread
from ld3m.models.gan import Generator, build_generator, load_generator, save_generator
from ld3m.models.train_gan import GROUP, Discriminator, fit_gan

CONFIG = dict(channels=1, classes=2, noise_width=6, w_width=5, widths=(8, 6, 4))


def made(**changes) -> Generator:
    return build_generator(seed=0, **CONFIG | changes)


@pytest.fixture
def gan() -> Generator:
    return made().double().freeze_()


def codes(gan, count, randn):
    """Another code for every layer, so that a code at the wrong layer is seen."""
    return randn(count, gan.layers, gan.config["w_width"])


def test_cut_at_any_layer_it_gives_the_same_pixels(gan, randn):
    noise, labels, w = randn(3, 6), torch.tensor([0, 1, 1]), codes(gan, 3, randn)
    shared = gan.mapping(noise, labels)[:, None].expand(-1, gan.layers, -1)
    sides = []
    for each, whole in ((shared, gan(noise, labels)), (w, gan.synthesize(gan.features(w[:, :0], 0), w, 0))):
        for n in range(6):
            features = gan.features(each[:, :n], n)
            sides.append(tuple(features.shape[1:]))
            torch.testing.assert_close(gan.synthesize(features, each[:, n:], n), whole, rtol=0, atol=1e-13)
    assert sides[:6] == [(8, 4, 4), (8, 4, 4), (6, 8, 8), (6, 8, 8), (4, 16, 16), (4, 16, 16)]
    assert whole.shape == (3, 1, 16, 16) and (gan.layers, gan.size_px, gan.classes) == (6, 16, 2)
    with pytest.raises(ValueError):  # a code too many
        gan.features(w[:, :4], 3)


def test_a_layer_is_the_modulated_convolution_of_the_paper(gan, randn):
    """One kernel an image: scaled by the style, normed over its inputs (StyleGAN 2, eq. 1 and 3)."""
    for layer in gan.synthesis:
        inputs, side = layer.kernel.shape[1:3]
        maps, w = randn(3, inputs, 4, 4), randn(3, 5)
        for image, code, given in zip(maps, w, layer(maps, w), strict=True):
            s = layer.style.weight @ code + layer.style.bias
            kernel = layer.kernel * s[:, None, None] / (inputs * side**2) ** 0.5
            if layer.doubles:
                image = image.kron(torch.ones(2, 2))
            if not layer.is_last:
                kernel = kernel / (kernel.flatten(1).norm(dim=1)[:, None, None, None] ** 2 + 1e-8).sqrt()
            expected = conv2d(image[None], kernel, layer.bias, padding=side // 2)[0]
            expected = expected if layer.is_last else leaky_relu(expected, 0.2) * 2**0.5
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [0, 3, 5])
def test_the_gradient_is_that_of_finite_differences(gan, randn, n):
    w = codes(gan, 2, randn)
    points = [gan.features(w[:, :n], n).clone().requires_grad_(), w[:, n:].clone().requires_grad_()]
    exact = dict(atol=1e-12, rtol=1e-5, fast_mode=True)
    assert torch.autograd.gradcheck(lambda features, w: gan.synthesize(features, w, n), points, **exact)


def test_what_is_loaded_is_what_was_saved_in_half_precision(tmp_path):
    gan = made()
    save_generator(gan, tmp_path / "gan")
    loaded = load_generator(tmp_path / "gan")
    assert loaded.config == gan.config and not any(p.requires_grad for p in loaded.parameters())
    assert {tensor.dtype for tensor in load_file(tmp_path / "gan/weights.safetensors").values()} == {torch.float16}
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, gan.state_dict()[name].half().float())
    save_generator(loaded, tmp_path / "again")
    assert load_generator(tmp_path / "again").fingerprint() == loaded.fingerprint() != gan.fingerprint()
    for name in ("config.json", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "gan" / name).read_bytes()
    assert made().fingerprint() == gan.fingerprint()
    gan.embedding.weight.data = gan.embedding.weight.data.flip(0)  # the order of the classes
    assert made().fingerprint() != gan.fingerprint()


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"widths": [10**7, 10**7, 10**7]}, {}, "size mismatch"),  # 3.6 EB: must not be allocated
        ({}, {"constant": None}, "constant"),
        ({}, {"constant": torch.full((8, 4, 4), torch.nan)}, "not finite .constant.: the file is damaged"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused(tmp_path, config, tensors, message):
    with pytest.raises(FileNotFoundError, match="config.json, weights.safetensors missing"):
        load_generator(tmp_path)
    save_generator(made(), tmp_path)
    file, weights = tmp_path / "config.json", tmp_path / "weights.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    state = {name: tensor for name, tensor in (load_file(weights) | tensors).items() if tensor is not None}
    save_file(state, weights)
    with pytest.raises(ValueError, match=rf"(?s)the GAN in .* cannot be read.*{message}"):
        load_generator(tmp_path)


def test_other_data_is_refused(gan):
    fits = {"size_px": 16, "channels": 1, "classes": 2}
    gan.check(**fits)
    for key, value in {"size_px": 32, "channels": 3, "classes": 10}.items():
        with pytest.raises(ValueError, match=rf"{key}={value}: this GAN has {fits[key]}"):
            gan.check(**fits | {key: value})


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return make_halves(background=30, brightness=(100, 220))


def trained(dataset, **changes):
    gan = made()
    settings = dict(steps=150, batch=16, learning_rate=5e-3, r1=1.0, r1_every=4, ema_decay=0.9, strategy="none", seed=0)
    settings["discriminator_widths"] = (8, 8)
    return gan, fit_gan(gan, dataset.train, **settings | changes)


def test_it_learns_the_classes_and_a_classifier_sees_it(dataset):
    gan, losses = trained(dataset)
    judging = dict(width=8, epochs=6, learning_rate=0.05, strategy="none")
    pixels, labels, record = check_gan(gan, dataset, samples_per_class=20, seed=0, **judging)
    assert pixels.shape == (40, 1, 16, 16) and labels.tolist() == [0, 1] * 20 and pixels.abs().max() <= 1
    assert record["sample_class_accuracy"] >= 0.9 and record["samples"] == 40 and len(losses) == 150
    assert not any(parameter.requires_grad for parameter in gan.parameters())
    untrained = check_gan(made().freeze_(), dataset, samples_per_class=20, seed=0, **judging)[2]
    assert untrained["sample_class_accuracy"] < 0.9


def test_training_repeats_bit_for_bit_and_every_part_of_it_has_its_effect(dataset):
    shared = dict(steps=3, strategy="crop_scale")
    (first, losses), (again, same) = (trained(dataset, **shared) for _ in range(2))
    assert same == losses and again.fingerprint() == first.fingerprint()
    for changes in ({"seed": 1}, {"r1": 0.0}, {"ema_decay": 0.0}, {"strategy": "_".join(OPERATIONS)}):
        assert trained(dataset, **shared | changes)[0].fingerprint() != first.fingerprint(), changes


def test_the_discriminator_sees_that_all_images_of_a_group_are_alike(randn):
    torch.manual_seed(0)
    discriminator = Discriminator(channels=1, classes=2, widths=(8, 8)).double()
    pixels, labels = randn(2 * GROUP, 1, 16, 16), torch.tensor([0] * GROUP + [1] * GROUP)
    logits = discriminator(pixels, labels)
    alike = pixels.clone()
    alike[:GROUP] = pixels[0]
    changed = discriminator(alike, labels)
    assert not torch.isclose(changed[0], logits[0])  # the same image, another company
    assert torch.equal(changed[GROUP:], logits[GROUP:])
    assert not torch.isclose(discriminator(pixels, 1 - labels), logits).any()


def test_the_spread_is_the_mean_distance_within_a_class():
    pixels = torch.tensor([0.0, 3.0, 6.0, 100.0, 101.0]).view(5, 1, 1, 1)
    assert spread(pixels, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx((4 + 1) / 2)
    assert spread(torch.ones(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])) == 0
