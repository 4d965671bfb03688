"""What is replayed has the values and gradients of the function; on a CPU it is the function."""

import pytest
import torch
from conftest import SIZE_PX, make_prior, make_split, start_ld3m

from ld3m.models.train_prior import fit_denoiser
from ld3m.runtime.cuda_graphs import GraphedFunction

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")


def test_on_a_cpu_it_is_the_function_itself():
    calls = []
    replayed = GraphedFunction(lambda x: calls.append(x) or x + 1)
    x = torch.zeros(2, requires_grad=True)
    assert torch.equal(replayed(x), x + 1) and calls[0] is x and not replayed.recorded


@NEEDS_CUDA
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


@NEEDS_CUDA
def test_a_gradient_after_another_call_is_an_error():
    replayed = GraphedFunction(torch.square)
    x = torch.ones(2, device="cuda", requires_grad=True)
    first, second = replayed(x), replayed(x)
    with pytest.raises(RuntimeError, match="called again before this gradient"):
        first.sum().backward()
    second.sum().backward()
    assert torch.equal(x.grad, 2 * x)


@NEEDS_CUDA
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


@NEEDS_CUDA
def test_a_denoiser_is_trained_as_without(monkeypatch):
    split, found = make_split(8, seed=0).to("cuda"), []
    for is_replayed in (False, True):
        with monkeypatch.context() as patch:
            if not is_replayed:
                patch.setattr(GraphedFunction, "__call__", lambda replayed, *inputs: replayed.function(*inputs))
            given = dict(steps=8, batch=4, learning_rate=1e-3, null_share=0.1, ema_decay=0.9, seed=0)
            found.append(fit_denoiser(make_prior().to("cuda").in_precision("bfloat16"), split, **given))
    torch.testing.assert_close(*map(torch.tensor, found), rtol=0.02, atol=0)
