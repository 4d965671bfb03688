"""CompVis checkpoints: numerically the published model, every tensor accounted for, nothing in them executed."""

import os
import pickle
import runpy
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from compvis_original import LatentDiffusion
from conftest import NORMALIZATION, relative_difference, start_ld3m

from ld3m.data.dataset import Normalization
from ld3m.method.sampler import sample
from ld3m.models import compvis
from ld3m.models.compvis import KINDS, Kind, build, build_full_size, load_checkpoint
from ld3m.models.diffusion_prior import with_classes, with_random_unet
from ld3m.models.prior_io import load_prior, save_prior
from ld3m.runtime.paths import ROOT

SMALL = {
    "cin256-v2": replace(
        KINDS["cin256-v2"],
        unet_widths=(32, 64, 96, 160),
        classes=10,
        conditioning_width=24,
        autoencoder_widths=(32, 32, 64),
        codebook=64,
    ),
    "ffhq-ldm-vq-4": replace(
        KINDS["ffhq-ldm-vq-4"],
        unet_widths=(32, 64, 96, 128),
        head_width=16,
        autoencoder_widths=(32, 32, 64),
        codebook=64,
    ),
}
FULL_SIZE = pytest.mark.skipif("LD3M_FULL_SIZE" not in os.environ, reason="set LD3M_FULL_SIZE=1: minutes and 8 GB")
BETAS = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
MISSING = "model.diffusion_model.middle_block.0.in_layers.0.weight"


def original(kind: Kind) -> LatentDiffusion:
    """CompVis's model with random weights, none of them at the value where a confusion would not show."""
    width = kind.unet_widths[0]
    torch.manual_seed(0)
    model = LatentDiffusion(
        width=width,
        multipliers=[level // width for level in kind.unet_widths],
        classes=kind.classes,
        context_width=kind.conditioning_width,
        head_width=kind.head_width,
        first_stage_widths=kind.autoencoder_widths,
        codebook=kind.codebook,
    ).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at one and zero
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session", params=SMALL)
def pair(request, tmp_path_factory):
    """A kind, CompVis's model of it, and the file of that model. Do not change them."""
    kind = SMALL[request.param]
    model = original(kind)
    file = tmp_path_factory.mktemp("compvis") / "model.ckpt"
    torch.save({"state_dict": model.state_dict()}, file)
    return kind, model, file


@pytest.fixture(scope="session")
def state():
    """The tensors of a small class-conditional model."""
    return original(SMALL["cin256-v2"]).state_dict()


@pytest.fixture
def write(tmp_path):
    """Saves an object as model.ckpt."""

    def to_file(content):
        torch.save(content, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return to_file


def load(file, **options):
    return load_checkpoint(file, kind=SMALL["cin256-v2"], **options)


def differences(prior, model, *, size_px, dtype):
    """Relative differences of all that the prior computes from what CompVis's model does."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, size_px, size_px, generator=draw).clamp(-1, 1).to(dtype)
    z = torch.randn(2, 3, size_px // 4, size_px // 4, generator=draw).to(dtype)
    t, labels, context = torch.tensor([401, 901]), torch.tensor([3, 7]), None
    found = {}
    with torch.no_grad():
        c = prior.embed(labels)
        if prior.is_conditional:
            context = model.cond_stage_model.embedding(labels)[:, None]
            found["embed"] = relative_difference(c, context)
            null = model.cond_stage_model.embedding.weight[-1].expand(2, 1, -1)
            found["null"] = relative_difference(prior.null(2), null)
        found["denoise"] = relative_difference(prior.denoise(z, t, c), model.unet(z, t, context))
        found["encode"] = relative_difference(prior.encode(pixels), model.encode(pixels))
        found["quantize"] = relative_difference(prior.quantize(z), model.quantize(z))
        found["decode"] = relative_difference(prior.decode(z), model.decode(z))
    return found


def test_equal_to_the_published_model(pair):
    """In float64, where even a wrong epsilon of a norm shows."""
    kind, model, file = pair
    prior = load_checkpoint(file, kind=kind).to(torch.float64)
    found = differences(prior, model.double(), size_px=32, dtype=torch.float64)
    model.float()
    assert len(found) == (6 if kind.classes else 4) and max(found.values()) < 1e-12, found


@pytest.mark.parametrize("size_px", [128, 256])
@pytest.mark.parametrize("name", KINDS)
@FULL_SIZE
def test_equal_to_the_published_model_at_full_size(name, size_px, tmp_path):
    model = original(KINDS[name])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    command = [sys.executable, "-m", "ld3m.models.compvis", str(tmp_path / "model.ckpt"), str(tmp_path / "prior")]
    subprocess.run(command, cwd=ROOT, check=True)
    found = differences(load_prior(tmp_path / "prior"), model, size_px=size_px, dtype=torch.float32)
    print(name, size_px, found)
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize(
    ("name", "unet", "autoencoder"), [("cin256-v2", 400.92, 55.32), ("ffhq-ldm-vq-4", 274.06, 55.32)]
)
def test_the_sizes_of_the_released_models(name, unet, autoencoder):
    """Millions of parameters, as CompVis's code prints them when it loads its checkpoints."""
    with torch.device("meta"):
        modules = compvis._modules(KINDS[name], scale=1.0)
    counts = [sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in modules[:2]]
    assert [round(count, 2) for count in counts] == [unet, autoencoder]


def test_it_is_a_prior(pair):
    kind, _, file = pair
    prior = load_checkpoint(file, kind=kind)
    torch.testing.assert_close(prior.alpha_bar, (1 - BETAS).cumprod(0), rtol=1e-4, atol=0)
    assert (prior.classes, prior.is_conditional) == (kind.classes, bool(kind.classes))
    assert prior.downsampling == 4 and prior.latent_shape(128) == (3, 32, 32) and prior.latent_shape(256) == (3, 64, 64)
    prior.check(size_px=128, channels=3, classes=10)
    with pytest.raises(ValueError, match="multiples of 32 px"):
        prior.check(size_px=48, channels=3, classes=10)
    for module in (prior.unet, prior.autoencoder, prior.embedding):
        assert not any(part.training for part in module.modules())
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_converted_once(pair, tmp_path, dtype):
    kind, _, file = pair
    prior = load_checkpoint(file, kind=kind)
    save_prior(prior, tmp_path / "prior", dtype=dtype)
    assert load_prior(tmp_path / "prior").fingerprint() == prior.to(dtype).to(torch.float32).fingerprint()


@pytest.mark.parametrize("folder", [".", "model.ckpt"])
def test_a_checkpoint_is_not_converted_over_itself(write, monkeypatch, tmp_path, folder):
    file = write({"state_dict": {}})
    content = file.read_bytes()
    monkeypatch.setattr(sys, "argv", ["compvis.py", str(file), str(tmp_path / folder)])
    monkeypatch.delitem(sys.modules, "ld3m.models.compvis")
    with pytest.raises(SystemExit, match="model.ckpt.* name a new"):  # before the checkpoint, which is none, is read
        runpy.run_module("ld3m.models.compvis", run_name="__main__")
    assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]


def test_the_file_may_go_once_it_is_loaded(state, write):
    file = write({"state_dict": state})
    prior = load(file)
    before = prior.fingerprint()
    file.write_bytes(bytes(file.stat().st_size))
    assert prior.fingerprint() == before


def test_half_precision_is_read_as_float32(state, write):
    halved = load(write({"state_dict": {key: tensor.half() for key, tensor in state.items()}}))
    assert all(parameter.dtype == torch.float32 for parameter in halved.unet.parameters())


# the moving average, and what a checkpoint holds besides the model


def average_of(state, *, factor):
    return {
        "model_ema." + key.removeprefix("model.").replace(".", ""): factor * tensor
        for key, tensor in state.items()
        if key.startswith("model.")
    } | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


@pytest.mark.parametrize(("weights", "factor"), [("auto", 2), ("ema", 2), ("model", 1)])
def test_the_moving_average(state, write, weights, factor):
    prior = load(write({"state_dict": state | average_of(state, factor=2)}), weights=weights)
    torch.testing.assert_close(prior.unet.conv_in.bias, factor * state["model.diffusion_model.input_blocks.0.0.bias"])
    torch.testing.assert_close(prior.autoencoder.quant_conv.bias, state["first_stage_model.quant_conv.bias"])


def test_no_moving_average(state, write):
    file = write({"state_dict": state})
    torch.testing.assert_close(load(file).unet.conv_in.bias, state["model.diffusion_model.input_blocks.0.0.bias"])
    with pytest.raises(ValueError, match=r"missing: model_ema.diffusion_modelinput_blocks00bias"):
        load(file, weights="ema")
    with pytest.raises(ValueError, match="weights = 'last': must be 'auto', 'ema' or 'model'"):
        load(file, weights="last")


def test_what_a_checkpoint_holds_besides(state, write):
    buffers = {
        **{name: torch.ones(1000) for name in compvis.SCHEDULE - {"scale_factor", "alphas_cumprod"}},
        "betas": BETAS.float(),
        "alphas_cumprod": (1 - BETAS).cumprod(0).float(),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(3),
        "first_stage_model.loss.perceptual_loss.net.slice1.0.weight": torch.ones(3),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    plain = load(write({"state_dict": state}))
    full = load(write({"state_dict": state | buffers, "global_step": 3, "epoch": 1}))
    assert full.fingerprint() == plain.fingerprint()


def test_the_scale_of_the_latents(state, write, randn):
    scaled = load(write({"state_dict": state | {"scale_factor": torch.tensor(0.5)}}))
    plain, pixels = load(write({"state_dict": state})), randn(1, 3, 32, 32).float()
    torch.testing.assert_close(scaled.encode(pixels), 0.5 * plain.encode(pixels))


def test_another_schedule(state, write):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    with pytest.raises(ValueError, match="another noise schedule.*0.0015.*0.0195"):
        load(write({"state_dict": state | {"alphas_cumprod": (1 - betas).cumprod(0)}}))


# files that are not what they should be


def test_missing_unknown_and_misshapen_tensors_are_all_named(state, write):
    changed = {key: tensor for key, tensor in state.items() if key != MISSING}
    changed["model.diffusion_model.label_emb.weight"] = torch.zeros(2)
    changed["first_stage_model.quant_conv.bias"] = torch.zeros(4)
    with pytest.raises(ValueError) as caught:
        load(write({"state_dict": changed}))
    message = str(caught.value)
    assert f"1 missing: {MISSING}" in message
    assert "1 unknown: model.diffusion_model.label_emb.weight" in message
    assert "1 misshapen: first_stage_model.quant_conv.bias (4,) instead of (3,)" in message


def test_long_lists_are_not_cut(state, write):
    changed = {key: tensor for key, tensor in state.items() if "first_stage_model" not in key}
    gone = sorted(state.keys() - changed.keys())
    with pytest.raises(ValueError, match=f"{len(gone)} missing: {', '.join(gone)}$"):
        load(write({"state_dict": changed}))


@pytest.mark.parametrize(
    "key",
    [
        *("model_ema.garbage", "model_ema.diffusion_modelfoo", "loss.x", "sqrt_foo", "posterior_", "betas_old"),
        *("first_stage_model.loss_weight", "first_stage_model.loss.x", "logvar.weight", "model_ema.decay.x"),
    ],
)
def test_a_key_that_is_like_those_of_training_is_unknown(state, write, key):
    for weights in ("auto", "model"):
        changed = state | average_of(state, factor=2) | {key: torch.ones(1)}
        with pytest.raises(ValueError, match=f"1 unknown: {key}$"):
            load(write({"state_dict": changed}), weights=weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [MISSING, "first_stage_model.quant_conv.bias", "cond_stage_model.embedding.weight"])
def test_weights_that_are_not_finite_are_named(state, write, value, part):
    changed = state | {part: state[part].clone()}
    changed[part].view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"1 not finite: {part}$"):
        load(write({"state_dict": changed}))
    average = average_of(state, factor=2) | {MISSING: torch.full_like(state[MISSING], value)}
    assert load(write({"state_dict": state | average})).unet.conv_in.bias.isfinite().all()  # what is taken counts


@pytest.mark.filterwarnings("ignore")  # of PyTorch, which is to lose quantized tensors
@pytest.mark.parametrize("kind", ["meta", "quantized"])
def test_tensors_without_numbers_of_their_own_are_refused(state, write, kind):
    other = torch.zeros(3, device="meta")
    if kind == "quantized":
        other = torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)
    with pytest.raises(ValueError, match="no 'state_dict' of tensors"):
        load(write({"state_dict": state | {"first_stage_model.quant_conv.bias": other}}))


def test_the_kind_is_seen_from_the_shapes(write):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    for width, expected in {192: (960, 960, 3, 3), 224: (896, 896, 3, 3)}.items():
        unfinished = {name: torch.zeros(width, 3, 3, 3), "model.diffusion_model.middle_block.0.in_layers.2.weight": 0}
        unfinished = {key: torch.as_tensor(value) for key, value in unfinished.items()}
        with pytest.raises(ValueError) as caught:
            load_checkpoint(write({"state_dict": unfinished}))
        assert f"() instead of {expected}" in str(caught.value) and name not in str(caught.value)
    with pytest.raises(ValueError, match=r"a U-Net 320 wide; .* cin256-v2 \(192 wide\), ffhq-ldm-vq-4 \(224 wide\)"):
        load_checkpoint(write({"state_dict": {name: torch.zeros(320, 4, 3, 3)}}))
    with pytest.raises(ValueError, match="no U-Net, but other.weight"):
        load_checkpoint(write({"state_dict": {"other.weight": torch.zeros(3)}}))


@pytest.mark.parametrize(
    "content",
    [{"model": 1}, [1], {"state_dict": {"a": "text"}}, {"state_dict": [1]}, {"state_dict": {1: torch.ones(1)}}],
)
def test_no_state_dict(write, content):
    with pytest.raises(ValueError, match="no 'state_dict' of tensors"):
        load(write(content))


@pytest.mark.parametrize("scale", [torch.ones(2), torch.tensor(0.0), torch.tensor(float("nan"))])
def test_a_scale_that_is_none(state, write, scale):
    with pytest.raises(ValueError, match=r"model\.ckpt has the scale_factor .*must be one positive number"):
        load(write({"state_dict": state | {"scale_factor": scale}}))


def test_a_file_of_an_older_pytorch(state, tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is no checkpoint of PyTorch.*one of PyTorch before 1.6 has to be saved anew"):
        load(file)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file(state, write, kept):
    file = write({"state_dict": state})
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="model.ckpt is no checkpoint of PyTorch, or a broken one.*download it again"):
        load(file)


def test_a_foreign_file(tmp_path):
    for name, content in {"text": b"<html>not found</html>", "pickle": pickle.dumps({"state_dict": {}})}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no checkpoint of PyTorch"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere is missing: place"):
        load(tmp_path / "nowhere")


class Runs:
    """A pickle of it runs a program when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_code_is_refused_and_not_run(state, write, tmp_path):
    file = write({"state_dict": state, "callbacks": Runs(tmp_path / "ran")})
    with pytest.raises(ValueError, match=r"holds (posix|nt)\.system, which could run code.*nothing of it was run"):
        load(file)
    assert not (tmp_path / "ran").exists()


def test_objects_of_the_training_program_are_dropped(state, write, monkeypatch):
    """Lightning keys its callbacks by class; the class is not there when the file is read."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    exec("class ModelCheckpoint:\n  def __init__(self): self.score = 1", module.__dict__)
    module.ModelCheckpoint.__module__ = module.__name__
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        kept = {module.ModelCheckpoint: {"best": torch.zeros(1)}, "object": module.ModelCheckpoint()}
        file = write({"state_dict": state, "callbacks": kept})
    prior = load(file)
    assert module.__name__ not in sys.modules
    assert prior.fingerprint() == load(write({"state_dict": state})).fingerprint()


def test_the_command_says_what_is_wrong(tmp_path):
    for arguments, message in ((["nowhere.ckpt", "prior"], "is missing: place"), ([], "python -m ld3m.models.compvis")):
        command = [sys.executable, "-m", "ld3m.models.compvis", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


# how the rest of the library uses such a prior


def test_random_weights_depend_on_the_seed_alone():
    kind = SMALL["ffhq-ldm-vq-4"]
    assert build(kind, seed=0).fingerprint() == build(kind, seed=0).fingerprint() != build(kind, seed=1).fingerprint()
    with pytest.raises(ValueError, match="kind = 'cin512': must be one of cin256-v2, ffhq-ldm-vq-4"):
        build_full_size("cin512", seed=0)


def test_a_random_unet_keeps_the_trained_autoencoder(pair):
    kind, model, file = pair
    prior = load_checkpoint(file, kind=kind)
    made = with_random_unet(prior, seed=0)
    assert made.autoencoder is prior.autoencoder and type(made.unet) is type(prior.unet)
    z, t = torch.zeros(1, 3, 8, 8), torch.tensor([5])
    given = [one.denoise(z, t, one.null(1)) for one in (made, with_random_unet(prior, seed=0), prior)]
    assert torch.equal(given[0], given[1]) and not torch.allclose(given[0], given[2])


def test_some_of_the_classes():
    prior = build(SMALL["cin256-v2"], seed=0)
    subset = with_classes(prior, [7, 2])
    assert subset.classes == 2 and torch.equal(subset.null(1), prior.null(1))
    assert torch.equal(subset.embed(torch.tensor([0, 1])), prior.embed(torch.tensor([7, 2])))
    subset.check(size_px=32, channels=3, classes=2)
    with pytest.raises(ValueError, match=r"prior\.classes: \[10\].*0 to 9"):
        with_classes(prior, [0, 10])
    unconditional = build(SMALL["ffhq-ldm-vq-4"], seed=0)
    assert with_classes(unconditional, [7, 2]) is unconditional


def render(prior, *, guidance, classes=3):
    draw = torch.Generator().manual_seed(2)
    labels = torch.arange(classes)
    x = torch.rand(classes, 3, 32, 32, generator=draw) * 2 - 1
    three = Normalization(NORMALIZATION.mean * 3, NORMALIZATION.std * 3)
    codes = start_ld3m(x, labels, prior, normalization=three, steps=2, guidance=guidance, clamp="soft", render_batch=2)
    images = codes.render()
    images.backward(torch.randn(images.shape, generator=draw))
    return images.detach(), {name: tensor.grad for name, tensor in codes.learnables.items()}


def test_a_set_is_rendered_and_learned(pair):
    kind, _, file = pair
    images, gradients = render(load_checkpoint(file, kind=kind), guidance=3.0)
    assert images.shape == (3, 3, 32, 32) and images.isfinite().all()
    assert gradients["z"].isfinite().all() and gradients["z"].norm() > 0
    assert gradients["c"].shape == (3, 1, kind.conditioning_width) and gradients["c"].isfinite().all()
    assert (gradients["c"].norm() > 0) == (kind.classes > 0)


def test_guidance_is_nothing_to_a_prior_without_classes():
    prior = build(SMALL["ffhq-ldm-vq-4"], seed=0)
    guided, plain = (render(prior, guidance=guidance) for guidance in (3.0, 1.0))
    assert torch.equal(guided[0], plain[0])
    # Not equal: on two threads oneDNN sums the gradient of so small a convolution in an order of its own.
    torch.testing.assert_close(guided[1]["z"], plain[1]["z"])
    options = dict(size_px=32, steps=2, guidance=3.0, render_batch=2, seed=0)
    assert torch.equal(*(sample(prior, torch.tensor(labels), **options) for labels in ([0, 1], [4, 4])))
