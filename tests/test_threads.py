"""Parts of a computation in threads: the result and the gradient of the whole, and the same bits in any number."""

import threading

import pytest
import torch

from ld3m.runtime.chunked import in_chunks, thread_map


def function(tensors):
    return (tensors["a"].sin() * tensors["b"]).cumsum(1)


def computed(randn, *, size, threads, function=function):
    a, b, unused = (randn(7, 3).requires_grad_() for _ in range(3))
    fixed = randn(7, 3)
    tensors = {"a": a, "b": fixed, "unused": unused} | {"c": b}
    output = in_chunks(lambda given: function(given) + given["c"] ** 2, tensors, size=size, threads=threads)
    grads = torch.autograd.grad(output, (a, b, unused), fixed + 1, allow_unused=True)
    whole = function(tensors) + tensors["c"] ** 2
    return output, grads, whole, torch.autograd.grad(whole, (a, b, unused), fixed + 1, allow_unused=True)


@pytest.mark.parametrize(("size", "threads"), [(7, 1), (3, 1), (2, 2), (1, 4), (50, 3)])
def test_the_parts_make_the_whole_and_its_gradient(randn, size, threads):
    output, grads, whole, expected = computed(randn, size=size, threads=threads)
    assert torch.equal(output, whole)
    for grad, wanted in zip(grads, expected, strict=True):
        assert (grad is None) == (wanted is None) and (wanted is None or torch.allclose(grad, wanted, rtol=1e-14))


def test_a_part_is_computed_by_one_thread_of_several(randn):
    seen = []

    def noted(tensors):
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        return function(tensors)

    given = {"a": randn(4, 3), "b": randn(4, 3)}
    barrier = threading.Barrier(2, timeout=20)  # passed only where two threads compute at once
    in_chunks(lambda tensors: barrier.wait() * 0 + noted(tensors), given, size=2, threads=2)
    assert len({thread for thread, _, _ in seen}) == 2 and {(count, grad) for _, count, grad in seen} == {(1, False)}


def test_an_error_in_a_part_is_raised(randn):
    def broken(tensors):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        in_chunks(broken, {"a": randn(4, 3)}, size=2, threads=2)


def test_threads_stay_for_the_next_call():
    def ident(item):
        return item, threading.get_ident()

    first, second = (thread_map(ident, range(8), threads=3) for _ in range(2))
    assert [item for item, _ in first] == list(range(8))
    assert len({thread for _, thread in first + second}) <= 3
