"""The CPU, CUDA and its graphs give the same numbers up to rounding, and bfloat16 nearly the same gradient."""

from functools import partial

import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX, make_prior, make_split, relative_difference, start_ld3m

from ld3m.data.dataset import Normalization
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
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.cuda_graphs import GraphedFunction
from ld3m.runtime.devices import choose_device, usable_precision

DSA = "color_crop_cutout_flip_scale_rotate"
LABELS = torch.arange(CLASSES).repeat_interleave(2)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    usable_precision.cache_clear()
    yield
    usable_precision.cache_clear()


def new_network(device, *, seed, name="convnet"):
    width = 32 if name == "vit" else 8
    return build(name, channels=1, size_px=SIZE_PX, classes=CLASSES, width=width, seed=seed, device=device)


def new_gan():
    return build_generator(channels=1, classes=CLASSES, noise_width=4, w_width=4, widths=(8, 8, 8), seed=0)


def space(name, dataset, device):
    x, shared = dataset.train.x(torch.arange(6)), dict(normalization=NORMALIZATION, seed=0, threads=1)
    if name == "pixel":
        return SPACES["pixel"](x, LABELS, prior=None, start="real", **shared)
    if name == "glad":
        options = {"layer": 1, "mean_w": True, "shifted_normalization": False, "render_batch": 4}
        return SPACES["glad"](x, LABELS, prior=new_gan().freeze_().to(device), **options, **shared)
    return start_ld3m(x, LABELS, make_prior().freeze_().to(device), skip=name, render_batch=4)


def objective(name, dataset, device, folder):
    def experts(*, last_epoch):
        schedule = dict(count=1, epochs=last_epoch, batch=8, learning_rate=0.05, processes=1, strategy=DSA, seed=0)
        schedule["checkpoint"] = Checkpoint(folder / f"experts-{device}.safetensors")
        train_experts(folder / device, dataset, new_network=partial(new_network, device), **schedule)
        parameters = len(flat_parameters(new_network(device, seed=0)))
        return open_experts(folder / device, count=1, last_epoch=last_epoch, parameters=parameters)

    mtt = dict(student_steps=3, student_batch=4, expert_epochs=1, max_start_epoch=2, student_lr=0.05, first_order=False)
    shared = dict(normalization=NORMALIZATION, new_network=partial(new_network, device), threads=1, seed=0)
    own = mtt if name == "mtt" else {"real_batch": 4}
    return OBJECTIVES[name](dataset.train, experts=experts, strategy=DSA, **shared, **own)


@needs_cuda
@pytest.mark.parametrize("name", ["dc", "dm", "mtt"])
@pytest.mark.parametrize("space_name", ["pixel", "glad", "x0", "mean", "none"])
def test_distilling_on_cuda_also_when_it_is_resumed_is_that_on_the_cpu(
    dataset, tmp_path, monkeypatch, name, space_name
):
    def run(device):
        placed, checkpoint = dataset.to(device), Checkpoint(tmp_path / f"{device}.safetensors")
        made, matched = space(space_name, placed, device), objective(name, placed, device, tmp_path)
        rates = dict.fromkeys(made.learnables, 1e-3) | dict.fromkeys(matched.learnables, 1e-5)
        given = dict(iterations=3, momentum=0.5, validate=lambda images: [0.5], validation_checks=0)
        return distill(made, matched, learning_rates=rates, checkpoint=checkpoint, **given)

    def stopped(total, **_):
        yield from range(2)
        raise KeyboardInterrupt

    expected = run("cpu")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ld3m.method.distill.progress", stopped)
        run("cuda")
    resumed = run("cuda")
    assert resumed.best["images"].is_cuda
    for key, tensor in expected.best.items():
        assert relative_difference(resumed.best[key].cpu().double(), tensor.double()) < 1e-3, key
    for ours, theirs in zip(resumed.history, expected.history, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)


@needs_cuda
@pytest.mark.parametrize("name", ["convnet", "alexnet", "resnet18", "vit"])
def test_evaluation_on_cuda(dataset, name):
    recipe = dict(epochs=3, batch=4, learning_rate=0.01, momentum=0.9, weight_decay=5e-4, warm_up=True, ema_decay=0.9)
    recipe["strategy"] = DSA
    placed = dataset.to("cuda")
    images = NORMALIZATION.normalize(placed.train.x())
    jobs = [EvaluationJob(images.__getitem__, placed.train.labels, {name: recipe}, range(2), 0)]
    given = dict(normalization=NORMALIZATION, networks={name: partial(new_network, "cuda", name=name)})
    for processes in (1, 2):
        scores = [evaluate_sets(jobs, placed.test, processes=processes, **given) for _ in range(2)]
        assert scores[0] == scores[1]


@needs_cuda
def test_the_priors_train_on_cuda(dataset):
    placed = dataset.to("cuda")
    prior = make_prior().to("cuda")
    fit_autoencoder(prior, placed.train, steps=3, continuous_steps=1, batch=4, learning_rate=1e-3, seed=0)
    given = dict(steps=3, batch=4, learning_rate=1e-3, null_share=0.1, ema_decay=0.9, seed=0)
    losses = fit_denoiser(prior.in_precision("bfloat16"), placed.train, **given)
    assert len(losses) == 3 and reconstruct(prior, placed.test.x()).isfinite().all()
    given = dict(discriminator_widths=(8, 8), steps=3, batch=4, learning_rate=1e-3, r1=1.0, r1_every=2, ema_decay=0.9)
    assert len(fit_gan(new_gan().to("cuda"), placed.train, strategy=DSA, seed=0, **given)) == 3


@pytest.mark.parametrize("skip", ["x0", "mean"])
def test_the_gradient_in_bfloat16_is_nearly_that_in_float32(skip, monkeypatch):
    """The embedded prior, on the first device there is; CPUs without bfloat16 compute it slowly."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
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
        assert torch.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.98, name  # 0.989 with AMX
        assert rounded.norm().item() == pytest.approx(exact.norm().item(), rel=0.02), name


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so_once(monkeypatch, capsys):
    prior = make_prior()
    for is_there, precision in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda is_there=is_there: is_there)
        usable_precision.cache_clear()
        assert prior.in_precision("float32").precision == torch.float32 and not capsys.readouterr().out
        assert [prior.in_precision("bfloat16").precision for _ in range(2)] == [precision] * 2
    assert capsys.readouterr().out == "this CPU has no instructions for bfloat16: float32 takes its place\n"
    assert usable_precision("bfloat16", "cuda") == "bfloat16"


def test_the_device_is_chosen(monkeypatch):
    for is_there, auto in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert choose_device("auto") == auto and choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        choose_device("cuda")


def test_on_a_cpu_it_is_the_function_itself():
    calls = []
    replayed = GraphedFunction(lambda x: calls.append(x) or x + 1)
    x = torch.zeros(2, requires_grad=True)
    assert torch.equal(replayed(x), x + 1) and calls[0] is x and not replayed.recorded


@needs_cuda
def test_values_and_gradients_those_of_parameters_too_are_the_function_s():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3)).cuda()
    function = lambda x, y: (layer(x) * y).square()  # noqa: E731
    replayed = GraphedFunction(function, layer)
    kept = []
    for rows in (4, 4, 2, 4):
        x, y = torch.randn(rows, 3, device="cuda", requires_grad=True), torch.randn(rows, 3, device="cuda")
        found = []
        for use in (replayed, function):
            output = use(x, y)
            found.append((output.detach(), *torch.autograd.grad(output.sum(), [x, *layer.parameters()])))
        for given, exact in zip(*found, strict=True):
            torch.testing.assert_close(given, exact)
        kept.append((found[0][0], found[1][0].clone()))
        with torch.no_grad():
            torch.testing.assert_close(replayed(x, y), function(x, y))
            layer[0].weight.add_(0.1)  # learned weights are read again
    for given, exact in kept:  # what was returned is not written over
        torch.testing.assert_close(given, exact)
    assert len(replayed.recorded) == 2


@needs_cuda
def test_a_gradient_after_another_call_is_an_error():
    replayed = GraphedFunction(torch.square)
    x = torch.ones(2, device="cuda", requires_grad=True)
    first, second = replayed(x), replayed(x)
    with pytest.raises(RuntimeError, match="called again before this gradient"):
        first.sum().backward()
    second.sum().backward()
    assert torch.equal(x.grad, 2 * x)


@needs_cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_a_set_in_several_parts_is_rendered_and_learned_as_without(precision, tolerance):
    pixels, weight = (torch.randn(3, 1, SIZE_PX, SIZE_PX, device="cuda").clamp(-1, 1) for _ in range(2))
    prior, found = make_prior().freeze_().to("cuda").in_precision(precision), []
    for used in (prior, prior.with_cuda_graphs()):
        made = start_ld3m(pixels, torch.tensor([0, 1, 2]), used, learn="z", render_batch=2)
        images = made.render()
        images.backward(weight)
        found.append((images.detach(), made.learnables["z"].grad, made.learnables["c"].grad))
    for plain, replayed in zip(*found, strict=True):
        assert (plain - replayed).norm() / plain.norm() < tolerance


@needs_cuda
def test_a_denoiser_is_trained_as_without(monkeypatch):
    split, found = make_split(8, seed=0).to("cuda"), []
    for is_replayed in (False, True):
        with monkeypatch.context() as patch:
            if not is_replayed:
                patch.setattr(GraphedFunction, "__call__", lambda replayed, *inputs: replayed.function(*inputs))
            given = dict(steps=8, batch=4, learning_rate=1e-3, null_share=0.1, ema_decay=0.9, seed=0)
            found.append(fit_denoiser(make_prior().to("cuda").in_precision("bfloat16"), split, **given))
    torch.testing.assert_close(*map(torch.tensor, found), rtol=0.02, atol=0)
