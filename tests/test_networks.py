"""The networks: published sizes, features, seeds, flat parameters, second derivatives."""

import pytest
import torch
from conftest import directional_derivative
from torch.func import functional_call
from torch.nn import functional

from ld3m.models import networks
from ld3m.models.networks import ARCHITECTURES, build, flat_parameters, unflatten

TINY_WIDTH = {"convnet": 4, "alexnet": 4, "vgg11": 2, "resnet18": 2, "vit": 64}


def tiny(name, *, size_px=32, channels=2, classes=3, seed=0, **options):
    options |= {"depth": 2} if name == "vit" else {}
    given = {"channels": channels, "size_px": size_px, "classes": classes, "seed": seed}
    return build(name, width=TINY_WIDTH[name], **given, **options).eval()


def random_images(count=2, *, size_px=32, channels=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, channels, size_px, size_px, dtype=dtype, generator=generator)


@pytest.mark.parametrize(
    ("name", "size_px", "options", "count"),
    [
        ("convnet", 32, {}, 320_010),
        ("convnet", 128, {}, 615_690),
        # by layer: convolutions (k*k*in + 1)*out, then the linear layer on 192 maps of 4x4
        ("alexnet", 32, {}, 76 * 128 + 3201 * 192 + 1729 * 256 + 2305 * 192 + 1729 * 192 + 3073 * 10),
        # the widely used CIFAR versions of the two; GroupNorm has as many parameters as BatchNorm
        ("vgg11", 32, {}, 9_231_114),
        ("vgg11", 64, {}, 9_476_874),
        ("resnet18", 32, {}, 11_173_962),
        ("vit", 32, {}, 9_523_722),
        ("vit", 128, {}, 16_198_154),
        ("vit", 128, {"norms": False}, 16_198_154 - 21 * 1024),  # two norms a block and the last, 2 * 512 each
        ("vit", 256, {}, 16_198_154 + 192 * 512),  # 192 more positions
    ],
)
def test_published_parameter_counts(name, size_px, options, count):
    network = build(name, channels=3, size_px=size_px, classes=10, seed=0, **options)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_vit_heads():
    for width, heads in {32: 1, 96: 3, 192: 6, 256: 4, 288: 9, 512: 8}.items():
        network = build("vit", channels=1, size_px=32, classes=2, width=width, depth=1, seed=0)
        assert network.blocks[0].attention[1].heads == heads


def test_vit_without_norms_has_none_and_drops_out_in_training_only():
    network, images = tiny("vit", norms=False), random_images()
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in network.modules())
    assert torch.equal(network(images), network(images))
    network.train()
    assert not torch.equal(network(images), network(images))


def test_convnet_takes_a_few_images_at_a_time(monkeypatch):
    monkeypatch.setattr(networks, "CACHE_BYTES", 2 * 4 * 4 * 32**2)
    network, images, taken = tiny("convnet").double(), random_images(5, dtype=torch.float64), []
    network.body.register_forward_pre_hook(lambda module, given: taken.append(len(given[0])))
    few, whole = network.features(images), network.body(images).flatten(1)
    assert taken == [2, 2, 1, 5]
    torch.testing.assert_close(few, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size_px", [32, 64, 256])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_then_classifier(name, size_px):
    network, images = tiny(name, size_px=size_px), random_images(size_px=size_px)
    features, logits = network.features(images), network(images)
    assert features.ndim == 2 and logits.shape == (2, 3) and logits.std() > 1e-4
    torch.testing.assert_close(network.classifier(features), logits, atol=0, rtol=0)
    torch.testing.assert_close(network(images[1:]), logits[1:])  # no image sees the rest of its batch


def test_vgg11_pools_to_seven_by_seven():
    network, images = tiny("vgg11", size_px=128), random_images(size_px=128)
    expected = functional.adaptive_max_pool2d(network.body[:-1](images), 7).flatten(1)
    torch.testing.assert_close(network.features(images), expected)


class Plain:
    """The networks once more, as plain calls that use up the parameters in order, with instance norm."""

    def __init__(self, network):
        self.left = list(network.parameters())

    def take(self, count):
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def norm(self, maps):
        weight, bias = self.take(2)
        return functional.instance_norm(maps, weight=weight, bias=bias)

    def layer_norm(self, tokens):
        return functional.layer_norm(tokens, tokens.shape[-1:], *self.take(2))

    def linear(self, maps):
        return functional.linear(maps.flatten(1), *self.take(2))

    def convnet(self, maps):
        for _ in range(3):
            maps = functional.conv2d(maps, *self.take(2), padding=1)
            maps = functional.avg_pool2d(self.norm(maps).relu(), 2)
        return self.linear(maps)

    def alexnet(self, maps):
        for padding, pool in ((2, 2), (2, 2), (1, 1), (1, 1), (1, 2)):
            maps = functional.max_pool2d(functional.conv2d(maps, *self.take(2), padding=padding).relu(), pool)
        return self.linear(maps)

    def vgg11(self, maps):
        for pool in (2, 2, 1, 2, 1, 2, 1, 2):
            maps = functional.conv2d(maps, *self.take(2), padding=1)
            maps = functional.max_pool2d(self.norm(maps).relu(), pool)
        return self.linear(maps)

    def resnet18(self, maps):
        maps = self.norm(functional.conv2d(maps, *self.take(1), padding=1)).relu()
        for block in range(8):
            halve = block in (2, 4, 6)
            branch = functional.conv2d(maps, *self.take(1), padding=1, stride=2 if halve else 1)
            branch = functional.conv2d(self.norm(branch).relu(), *self.take(1), padding=1)
            branch = self.norm(branch)
            if halve:
                maps = self.norm(functional.conv2d(maps[:, :, ::2, ::2], *self.take(1)))
            maps = (branch + maps).relu()
        return self.linear(maps.mean((2, 3)))

    def vit(self, images):
        class_token, positions, weight, bias = self.take(4)
        patches = functional.unfold(images, 4, stride=4).transpose(1, 2) @ weight.flatten(1).T + bias
        tokens = torch.cat([class_token.expand(len(images), 1, -1), patches], 1) + positions
        for _ in range(2):
            parts = (self.layer_norm(tokens) @ self.take(1)[0].T).chunk(6, dim=2)  # of two heads, 32 each
            mixed = [functional.scaled_dot_product_attention(*parts[head::2]) for head in range(2)]
            tokens = tokens + functional.linear(torch.cat(mixed, 2), *self.take(2))
            hidden = functional.gelu(functional.linear(self.layer_norm(tokens), *self.take(2)))
            tokens = tokens + functional.linear(hidden, *self.take(2))
        return self.linear(self.layer_norm(tokens[:, 0]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_against_a_plain_forward_pass(name):
    network, generator = tiny(name).double(), torch.Generator().manual_seed(1)
    images, plain = random_images(dtype=torch.float64), Plain(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(network(images), getattr(plain, name)(images))
    assert not plain.left


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_seed_decides_the_weights_and_the_global_generator_is_untouched(name):
    before = torch.get_rng_state()
    first, other = flat_parameters(tiny(name, seed=3)), flat_parameters(tiny(name, seed=4))
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(first, other)
    torch.rand(3)
    assert torch.equal(first, flat_parameters(tiny(name, seed=3)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flat_parameters_make_the_same_network(name):
    network, other, images = tiny(name, seed=1), tiny(name, seed=2), random_images()
    flat = flat_parameters(network)
    assert not flat.requires_grad and flat.data_ptr() != next(network.parameters()).data_ptr()
    parts = unflatten(flat.requires_grad_(), other)
    assert all(torch.equal(parts[key], value) for key, value in network.named_parameters())
    ours, theirs = functional_call(other, parts, (images,)), network(images)
    torch.testing.assert_close(ours, theirs)
    (ours.square().sum() + theirs.square().sum()).backward()
    torch.testing.assert_close(flat.grad, torch.cat([p.grad.flatten() for p in network.parameters()]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_second_derivative(name):
    """DC and MTT differentiate a parameter gradient again: compare with a central difference."""
    network, draw = tiny(name).double(), torch.Generator().manual_seed(5)
    leaves = flat_parameters(network).requires_grad_(), random_images(dtype=torch.float64).requires_grad_()
    along, *steps = (torch.randn(like.shape, dtype=like.dtype, generator=draw) for like in (leaves[0], *leaves))

    @torch.enable_grad()
    def gradient_along(flat, images):
        flat = flat if flat.requires_grad else flat.clone().requires_grad_()
        logits = functional_call(network, unflatten(flat, network), (images,))
        loss = functional.cross_entropy(logits, torch.tensor([0, 2]))
        return torch.autograd.grad(loss, flat, create_graph=True)[0] @ along

    gradients = torch.autograd.grad(gradient_along(*leaves), leaves)
    for k, step in enumerate(steps):
        only = [step if i == k else torch.zeros_like(leaf) for i, leaf in enumerate(leaves)]
        change = directional_derivative(lambda *at: gradient_along(*at).detach(), leaves, only, h=1e-7)
        assert (gradients[k] * step).sum().item() == pytest.approx(change, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {}, "name='mlp': must be one of convnet, alexnet, vgg11, resnet18, vit"),
        ("convnet", {"depth": 6}, "depth=6: must be at most 5 at size_px=32"),
        ("convnet", {"width": 0}, "width=0: convnet takes at least 1"),
        ("alexnet", {"depth": 3}, "depth=3: alexnet has no depth"),
        ("alexnet", {"width": 5}, "width=5: alexnet takes even widths"),
        ("vgg11", {"size_px": 31}, "size_px=31: vgg11 takes at least 32"),
        ("resnet18", {"size_px": 8}, "size_px=8: resnet18 takes at least 16"),
        ("vit", {"size_px": 100}, "size_px=100: vit takes multiples of 8 up to 128, and of 16 above"),
        ("vit", {"width": 40}, "width=40: vit takes multiples of 32"),
    ],
)
def test_errors_name_the_argument(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **{"channels": 3, "size_px": 32, "classes": 10, "seed": 0, **options})
