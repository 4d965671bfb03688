"""Chunks of a computation in threads: the result and the gradient of the whole, and the same bits in any number."""

import multiprocessing
import threading

import pytest
import torch

from ld3m.runtime.chunked import in_chunks, thread_map


def function(tensors):
    return (tensors["a"].sin() * tensors["b"]).cumsum(1) + tensors["c"] ** 2


@pytest.mark.parametrize(("size", "threads"), [(7, 1), (3, 1), (2, 2), (1, 4), (50, 3)])
def test_the_chunks_make_the_whole_and_its_gradient(randn, size, threads):
    tensors = {name: randn(7, 3).requires_grad_(name != "b") for name in ("a", "b", "c", "unused")}
    learned, weight = [tensor for tensor in tensors.values() if tensor.requires_grad], randn(7, 3)
    output, expected = in_chunks(function, tensors, size=size, threads=threads), function(tensors)
    assert torch.equal(output, expected)
    *grads, unused = torch.autograd.grad(output, learned, weight, allow_unused=True)
    assert unused is None
    torch.testing.assert_close(grads, list(torch.autograd.grad(expected, learned[:2], weight)), rtol=1e-14, atol=0)


def test_a_chunk_is_computed_by_one_thread_of_several_and_without_a_graph_where_none_is_needed(randn):
    seen, barrier = [], threading.Barrier(2, timeout=20)  # passed only where two threads compute at once

    def noted(tensors):
        barrier.wait()
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        return tensors["a"]

    in_chunks(noted, {"a": randn(4, 3)}, size=2, threads=2)
    assert len({thread for thread, _, _ in seen}) == 2 and {(count, grad) for _, count, grad in seen} == {(1, False)}


def test_an_error_in_a_chunk_is_raised(randn):
    with pytest.raises(KeyError, match="b"):
        in_chunks(function, {"a": randn(4, 3)}, size=2, threads=2)


def test_threads_stay_for_the_next_call():
    first, second = (thread_map(lambda k: (k, threading.get_ident()), range(8), threads=3) for _ in range(2))
    assert [k for k, _ in first] == list(range(8)) and len({thread for _, thread in first + second}) <= 3


def test_a_forked_child_has_threads_of_its_own():
    thread_map(abs, [-1], threads=1)
    child = multiprocessing.get_context("fork").Process(target=thread_map, args=(abs, [-1]), kwargs={"threads": 1})
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0
