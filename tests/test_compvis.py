"""CompVis checkpoints: numerically the published model, every tensor of it used, nothing in the file executed."""

import os
import sys
import types

import pytest
import torch
from compvis_original import LatentDiffusion
from conftest import relative_difference

from ld3m.models import compvis
from ld3m.models.compvis import CIN256, Kind, load_checkpoint
from ld3m.models.prior_io import load_prior, save_prior

SMALL = Kind((32, 64, 96, 160), classes=10, conditioning_width=24, autoencoder_widths=(32, 32, 64), codebook=64)
FULL_SIZE = pytest.mark.skipif("LD3M_FULL_SIZE" not in os.environ, reason="set LD3M_FULL_SIZE=1: minutes and 8 GB")
BETAS = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
WEIGHT = "model.diffusion_model.middle_block.0.in_layers.0.weight"


def original(kind: Kind) -> LatentDiffusion:
    torch.manual_seed(0)
    widths = kind.unet_widths, kind.classes, kind.conditioning_width, kind.autoencoder_widths
    return LatentDiffusion(*widths, kind.codebook)


@pytest.fixture(scope="module")
def state():
    """Do not change it."""
    return original(SMALL).state


@pytest.fixture
def load(tmp_path):
    """Load the prior from a checkpoint with these tensors."""

    def through_file(state, **further):
        torch.save({"state_dict": state, **further}, tmp_path / "model.ckpt")
        return load_checkpoint(tmp_path / "model.ckpt", kind=SMALL)

    return through_file


def differences(prior, model, *, size_px, dtype):
    """Relative differences between what the prior and CompVis's model compute."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size_px, size_px, generator=draw).clamp(-1, 1).to(dtype)
    z = torch.randn(2, 3, size_px // 4, size_px // 4, generator=draw).to(dtype)
    t, labels = torch.tensor([401, 901]), torch.tensor([3, 7])
    with torch.no_grad():
        table = model.state["cond_stage_model.embedding.weight"]
        c, context = prior.embed(labels), table[labels][:, None]
        pairs = [
            (c, context),
            (prior.null(2), table[-1].expand(2, 1, -1)),
            (prior.denoise(z, t, c), model.unet(z, t, context)),
            (prior.encode(x), model.encode(x)),
            (prior.quantize(z), model.quantize(z)),
            (prior.decode(z), model.decode(z)),
        ]
    return [relative_difference(ours, theirs) for ours, theirs in pairs]


def test_equal_to_the_published_model(state, load, tmp_path):
    """In float64, where even a wrong epsilon of a norm shows; the file may change once it is loaded."""
    prior = load(state)
    (tmp_path / "model.ckpt").write_bytes(bytes((tmp_path / "model.ckpt").stat().st_size))
    for module in (prior.unet, prior.autoencoder, prior.embedding):
        assert not any(p.requires_grad or p.dtype != torch.float32 for p in module.parameters())
    double = original(SMALL).double()
    assert max(differences(prior.to(torch.float64), double, size_px=32, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("size_px", [128, 256])
@FULL_SIZE
def test_equal_to_the_published_model_at_full_size(size_px, tmp_path):
    model = original(CIN256)
    torch.save({"state_dict": model.state}, tmp_path / "model.ckpt")
    assert max(differences(load_prior(tmp_path / "model.ckpt"), model, size_px=size_px, dtype=torch.float32)) < 1e-4


def test_the_sizes_of_the_released_model():
    """Millions of parameters, as CompVis's code prints them when it loads its checkpoint."""
    with torch.device("meta"):
        unet, autoencoder, embedding = compvis._modules(CIN256, scale=1.0)
    counts = [sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in (unet, autoencoder)]
    assert [round(count, 2) for count in counts] == [400.92, 55.32] and embedding.weight.shape == (1001, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_converted_checkpoint_is_the_same_prior(state, load, tmp_path, randn, dtype):
    prior, x = load(state | {"scale_factor": torch.tensor(0.5)}), randn(1, 3, 32, 32).float()
    torch.testing.assert_close(prior.encode(x), 0.5 * load(state).encode(x))
    save_prior(prior, tmp_path / "prior", dtype=dtype)
    assert load_prior(tmp_path / "prior").fingerprint() == prior.to(dtype).to(torch.float32).fingerprint()


def test_the_moving_average(state, load):
    of_unet = [key for key in state if key.startswith("model.")]
    average = {"model_ema." + key.removeprefix("model.").replace(".", ""): 2 * state[key] for key in of_unet}
    prior = load(state | average | {"model_ema.decay": torch.tensor(0.9999)})
    torch.testing.assert_close(prior.unet.conv_in.bias, 2 * state["model.diffusion_model.input_blocks.0.0.bias"])
    torch.testing.assert_close(prior.autoencoder.quant_conv.bias, state["first_stage_model.quant_conv.bias"])
    del average["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ValueError, match=r"missing: model_ema.diffusion_modelout2bias$"):
        load(state | average)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("scale_factor", torch.tensor(float("nan")), "scale_factor=.*must be one positive number"),
        ("alphas_cumprod", (1 - 2 * BETAS).cumprod(0), "another noise schedule.*0.0015.*0.0195"),
        ("model.diffusion_model.input_blocks.0.0.weight", None, "no U-Net .*; its tensors are cond_stage_model"),
        (WEIGHT, None, "mid_block.resnets.0.norm1.weight"),
        (WEIGHT, torch.full((160,), torch.inf), f"1 of .* not finite .{WEIGHT}.: the file is damaged"),
        ("first_stage_model.encoder.mid.attn_1.q.weight", None, "encoder.mid_block.attentions.0.to_q.weight"),
        ("first_stage_model.loss_weight", torch.zeros(2), "unknown: first_stage_model.loss_weight"),
        ("first_stage_model.quant_conv.bias", torch.zeros(4), r"quant_conv.bias.*\[4\].*\[3\]"),
        ("cond_stage_model.embedding.weight", None, "cond_stage_model.embedding.weight"),
    ],
)
def test_a_tensor_that_is_missing_unknown_misshapen_or_not_finite_is_named(state, load, key, tensor, message):
    changed = {name: given for name, given in (state | {key: tensor}).items() if given is not None}
    with pytest.raises(ValueError, match=rf"(?s)model\.ckpt cannot be used .*{message}"):
        load(changed)


class Runs:
    """A pickle of it runs a program when it is loaded."""

    def __reduce__(self):
        return os.system, ("exit 1",)


def test_code_and_what_is_no_dictionary_of_tensors_is_refused(state, load):
    with pytest.raises(ValueError, match=r"holds (posix|nt)\.system, which could run code; nothing of it was run"):
        load(state, callbacks=Runs())
    with pytest.raises(ValueError, match="no 'state_dict' of tensors"):
        load(state | {"first_stage_model.quant_conv.bias": 1})


def test_what_only_training_needs_is_dropped(state, load, tmp_path, monkeypatch):
    """Lightning keys its callbacks by class. The class does not exist when the file is read."""
    further = {"betas": BETAS.float(), "alphas_cumprod": (1 - BETAS).cumprod(0).float()}
    further |= {f"first_stage_model.loss.{name}": torch.zeros(3) for name in ("discriminator.main.0.weight", "logvar")}
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    exec("class ModelCheckpoint:\n  def __init__(self): self.score = 1", module.__dict__)
    module.ModelCheckpoint.__module__ = module.__name__
    kept = {module.ModelCheckpoint: {"best": torch.zeros(1)}, "object": module.ModelCheckpoint()}
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": state | further, "callbacks": kept, "epoch": 1}, tmp_path / "trained.ckpt")
    prior = load_checkpoint(tmp_path / "trained.ckpt", kind=SMALL)
    assert prior.fingerprint() == load(state).fingerprint()
