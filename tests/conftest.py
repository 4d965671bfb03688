"""Shared by the tests of the mathematics: a tiny prior in float64 and a tiny data set."""

import shutil
import time

import pytest
import torch

from ld3m.data.dataset import Dataset, Normalization, Split, measure_normalization
from ld3m.method.spaces import start_latents
from ld3m.models.diffusion_prior import build_prior
from ld3m.runtime import paths

SIZE_PX = 16
CLASSES = 3
NORMALIZATION = Normalization((0.4,), (0.3,))


@pytest.fixture(scope="session", autouse=True)
def decoded(tmp_path_factory):
    """Where decoded images, and their latents, go while testing."""
    paths.DECODED = paths.LATENTS = tmp_path_factory.mktemp("decoded")
    return paths.DECODED


def make_prior(*, seed=0, scaling_factor=0.7, channels=1, latent_channels=2):
    """A random prior in float32: 16 px <-> latents (2, 4, 4), 3 classes, a codebook with a spread like its inputs'."""
    prior = build_prior(
        channels=channels,
        classes=CLASSES,
        size_px=SIZE_PX,
        latent_channels=latent_channels,
        codebook=16,
        autoencoder_widths=(8, 8, 8),
        unet_widths=(32, 32),
        unet_blocks=1,
        conditioning_width=8,
        seed=seed,
    )
    prior.autoencoder.register_to_config(scaling_factor=scaling_factor)  # not 1, so that leaving it out is seen
    with torch.no_grad():
        prior.autoencoder.quantize.embedding.weight.mul_(8)
    return prior


def make_split(per_class, *, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat(per_class)  # interleaved: nothing may rely on an order
    uint8 = torch.randint(256, (len(labels), 1, SIZE_PX, SIZE_PX), dtype=torch.uint8, generator=draw)
    return Split(uint8, labels, ("a", "b", "c"))


def make_halves(*, background, brightness):
    """Two classes that differ at a glance: a bright upper or lower half, of a brightness in that range."""
    draw = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.arange(count) % 2
        images = torch.randint(0, background, (count, 1, 16, 16), generator=draw, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 8 * label : 8 * label + 8] += int(torch.randint(*brightness, (), generator=draw))
        return Split(images, labels, ("upper", "lower"))

    train = split(64)
    return Dataset("halves", train, split(16), split(16), measure_normalization(train))


def start_ld3m(x, labels, prior, **changes):
    """LD3M's codes in three steps, with other options where they are named."""
    options = {
        "normalization": NORMALIZATION,
        "seed": 0,
        "threads": 1,
        "start": "real",
        "learn": "auto",
        "steps": 3,
        "guidance": 3.0,
        "skip": "x0",
        "clamp": "none",
        "noise": "stored",
        "encoder_input": "x",
        "shifted_normalization": False,
        "render_batch": len(labels),
        "uncheckpointed_steps": 0,
    }
    return start_latents(x, labels, prior=prior, **options | changes)


@pytest.fixture(scope="session")
def prior():
    """Shared by all tests: do not change it."""
    return make_prior().to(torch.float64).freeze_()


def make_dataset():
    splits = {name: make_split(count, seed=count) for name, count in {"train": 6, "validation": 3, "test": 2}.items()}
    return Dataset("toy", normalization=NORMALIZATION, **splits)


@pytest.fixture(scope="session")
def dataset():
    return make_dataset()


@pytest.fixture
def randn():
    """Standard normal float64 tensors of the shapes asked for; the same in every test."""
    draw = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, dtype=torch.float64, generator=draw)


def relative_difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def directional_derivative(function, points, directions, *, h=1e-6):
    """Central difference of a scalar function of several tensors."""
    with torch.no_grad():
        ahead = function(*(p + h * d for p, d in zip(points, directions, strict=True)))
        behind = function(*(p - h * d for p, d in zip(points, directions, strict=True)))
    return (float(ahead) - float(behind)) / (2 * h)


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory):
    """A DiT and an AutoencoderKL in a folder, laid out as the released DiT-XL/2. Do not change it."""
    from tiny_priors import write  # imports diffusers, which takes 3 s

    return write(tmp_path_factory.mktemp("priors") / "dit")


@pytest.fixture
def dit_copy(dit_folder, tmp_path):
    return shutil.copytree(dit_folder, tmp_path / "copied")


def wait_until(holds, *, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
