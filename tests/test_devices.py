"""The CPU and CUDA give the same numbers up to rounding, and bfloat16 nearly the same gradient."""

from functools import partial

import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX, make_prior, relative_difference, start_ld3m

from ld3m.data.dataset import Dataset, Normalization
from ld3m.evaluation.evaluate import EvaluationJob, evaluate_sets
from ld3m.evaluation.experts import open_experts, train_experts
from ld3m.evaluation.prior_quality import reconstruct
from ld3m.method.distill import distill
from ld3m.method.objectives import OBJECTIVES
from ld3m.method.spaces import SPACES
from ld3m.models.gan import build_generator
from ld3m.models.networks import build, flat_parameters
from ld3m.models.prior_io import load_prior
from ld3m.models.train_gan import fit_gan
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser
from ld3m.runtime import devices, paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.devices import choose_device, usable_precision

DSA = "color_crop_cutout_flip_scale_rotate"
LABELS = torch.arange(CLASSES).repeat_interleave(2)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def new_network(device, *, seed, name="convnet"):
    width = {"convnet": 8, "alexnet": 8, "resnet18": 8, "vit": 32}[name]
    return build(name, channels=1, size_px=SIZE_PX, classes=CLASSES, width=width, seed=seed, device=device)


def space(name, dataset, device):
    x, shared = dataset.train.x(torch.arange(6)), dict(normalization=NORMALIZATION, seed=0, threads=1)
    if name == "pixel":
        return SPACES["pixel"](x, LABELS, prior=None, start="real", **shared)
    if name == "glad":
        gan = build_generator(channels=1, classes=CLASSES, noise_width=4, w_width=4, widths=(8, 8, 8), seed=0)
        gan = gan.freeze_().to(device)
        options = {"layer": 1, "mean_w": True, "shifted_normalization": False, "render_batch": 4}
        return SPACES["glad"](x, LABELS, prior=gan, **options, **shared)
    return start_ld3m(x, LABELS, make_prior().freeze_().to(device), skip=name, render_batch=4)


def objective(name, dataset, device, folder):
    def experts(*, last_epoch):
        schedule = dict(count=1, epochs=last_epoch, batch=8, learning_rate=0.05, processes=1, strategy=DSA, seed=0)
        schedule["checkpoint"] = Checkpoint(folder / f"experts-{device}.safetensors")
        train_experts(folder / device, dataset, new_network=partial(new_network, device), **schedule)
        parameters = len(flat_parameters(new_network(device, seed=0)))
        return open_experts(folder / device, count=1, last_epoch=last_epoch, parameters=parameters)

    mtt = dict(student_steps=3, student_batch=4, expert_epochs=1, max_start_epoch=2, student_lr=0.05, first_order=False)
    return OBJECTIVES[name](
        dataset.train,
        normalization=NORMALIZATION,
        new_network=partial(new_network, device),
        experts=experts,
        strategy=DSA,
        threads=1,
        seed=0,
        **mtt if name == "mtt" else {"real_batch": 4},
    )


@needs_cuda
@pytest.mark.parametrize("name", ["dc", "dm", "mtt"])
@pytest.mark.parametrize("space_name", ["pixel", "glad", "x0", "mean", "none"])
def test_distilling_on_cuda_is_that_on_the_cpu(dataset: Dataset, tmp_path, name, space_name):
    found = {}
    for device in ("cpu", "cuda"):
        placed = dataset.to(device)
        made, matched = space(space_name, placed, device), objective(name, placed, device, tmp_path)
        run = distill(
            made,
            matched,
            iterations=3,
            learning_rates=dict.fromkeys(made.learnables, 1e-3) | dict.fromkeys(matched.learnables, 1e-5),
            momentum=0.5,
            validate=lambda images: [0.5],
            validation_checks=0,
            checkpoint=Checkpoint(tmp_path / f"{device}.safetensors"),
        )
        assert run.best["images"].device.type == device
        found[device] = run
    for key, tensor in found["cpu"].best.items():
        assert relative_difference(found["cuda"].best[key].cpu().double(), tensor.double()) < 1e-3, key
    for ours, theirs in zip(found["cuda"].history, found["cpu"].history, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)


@needs_cuda
def test_a_run_that_was_killed_goes_on_on_cuda(dataset, tmp_path):
    def start(iterations, callback=lambda step: None):
        placed = dataset.to("cuda")
        made = space("x0", placed, "cuda")
        return distill(
            made,
            objective("dm", placed, "cuda", tmp_path),
            iterations=iterations,
            learning_rates={"z": 1e-3, "c": 1e-3},
            momentum=0.5,
            validate=lambda images: [float(images.mean())],
            validation_checks=1,
            checkpoint=Checkpoint(tmp_path / "state.safetensors"),
            callback=callback,
        )

    def stop(step):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(4, stop)
    resumed = start(4)
    assert len(resumed.history) == 4 and resumed.best["images"].is_cuda


@needs_cuda
@pytest.mark.parametrize("name", ["convnet", "alexnet", "resnet18", "vit"])
def test_evaluation_on_cuda(dataset, name):
    recipe = dict(epochs=3, batch=4, learning_rate=0.01, momentum=0.9, weight_decay=5e-4, warm_up=True, ema_decay=0.9)
    recipe |= {"strategy": DSA}
    for processes in (1, 2):
        placed = dataset.to("cuda")
        images = NORMALIZATION.normalize(placed.train.x())
        scores = [
            evaluate_sets(
                [EvaluationJob(images.__getitem__, placed.train.labels, {name: recipe}, range(2), 0)],
                placed.test,
                normalization=NORMALIZATION,
                networks={name: partial(new_network, "cuda", name=name)},
                processes=processes,
            )
            for _ in range(2)
        ]
        assert scores[0] == scores[1]


@needs_cuda
def test_the_priors_train_on_cuda(dataset):
    placed = dataset.to("cuda")
    prior = make_prior().to("cuda")
    fit_autoencoder(prior, placed.train, steps=3, continuous_steps=1, batch=4, learning_rate=1e-3, seed=0)
    given = dict(steps=3, batch=4, learning_rate=1e-3, null_share=0.1, ema_decay=0.9, seed=0)
    losses = fit_denoiser(prior.in_precision("bfloat16"), placed.train, **given)
    assert len(losses) == 3 and reconstruct(prior, placed.test.x()).isfinite().all()
    gan = build_generator(channels=1, classes=CLASSES, noise_width=4, w_width=4, widths=(8, 8, 8), seed=0).to("cuda")
    given = dict(discriminator_widths=(8, 8), steps=3, batch=4, learning_rate=1e-3, r1=1.0, r1_every=2, ema_decay=0.9)
    assert len(fit_gan(gan, placed.train, strategy=DSA, seed=0, **given)) == 3


@pytest.mark.parametrize("skip", ["x0", "mean"])
def test_the_gradient_in_bfloat16_is_nearly_that_in_float32(skip, monkeypatch):
    """The embedded prior, on the first device there is; CPUs without bfloat16 compute it slowly."""
    monkeypatch.setattr(devices, "has_bfloat16", lambda: True)
    device = choose_device("auto")
    prior = load_prior(paths.ROOT / "runs/mnist5k/prior").to(device)
    draw = torch.Generator().manual_seed(0)
    pixels, weight = (torch.rand(4, 3, 32, 32, generator=draw).to(device) * 2 - 1 for _ in range(2))
    given = dict(steps=5, skip=skip, normalization=Normalization((0.4,) * 3, (0.3,) * 3))
    gradients = {}
    for precision in ("float32", "bfloat16"):
        made = start_ld3m(pixels, torch.arange(4), prior.in_precision(precision), **given)
        images = made.render()
        assert images.dtype == torch.float32
        images.backward(weight)
        gradients[precision] = {name: tensor.grad for name, tensor in made.learnables.items()}
    for name, exact in gradients["float32"].items():
        rounded = gradients["bfloat16"][name]
        assert not torch.equal(rounded, exact)
        assert torch.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.99, name
        assert rounded.norm().item() == pytest.approx(exact.norm().item(), rel=0.02), name


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so_once(monkeypatch, capsys):
    prior = make_prior()
    monkeypatch.setattr(devices, "has_bfloat16", lambda: True)
    assert prior.in_precision("bfloat16").precision == torch.bfloat16
    monkeypatch.setattr(devices, "has_bfloat16", lambda: False)
    devices._say.cache_clear()
    assert prior.in_precision("float32").precision == torch.float32 and not capsys.readouterr().out
    for _ in range(2):
        assert prior.in_precision("bfloat16").precision == torch.float32
    assert capsys.readouterr().out == "this CPU has no instructions for bfloat16: float32 takes its place\n"
    assert usable_precision("bfloat16", "cuda") == "bfloat16"


def test_the_cpu_is_asked_for_its_instructions(monkeypatch):
    for flags, expected in [
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True, "cpu_name": "bf16"}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert devices.has_bfloat16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert devices.has_bfloat16() is True


def test_the_device_is_chosen(monkeypatch):
    for there, auto in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == auto and choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no CUDA device.*params.yaml"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="must be one of auto, cpu, cuda"):
        choose_device("tpu")
