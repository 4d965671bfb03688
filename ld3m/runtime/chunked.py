"""A differentiable computation over the images of a set, some at a time, in threads forward and backward."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor


def in_chunks(
    function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor], *, size: int, threads: int
) -> Tensor:
    """Compute `function(tensors)`, (N, ...), for some of the N at a time, differentiably.

    Parameters
    ----------
    function
        Computes each of the N independently of the others.
    tensors
        By name, (N, ...) each.
    size
        How many of the N make a chunk.
    threads
        Each of several uses one core; a single one is the caller's, and uses the cores that torch is set to. Neither
        the result nor its gradient depends on their number.
    """
    if not torch.is_grad_enabled():  # which a Function cannot see
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    return _InChunks.apply(function, size, threads, tuple(tensors), *tensors.values())


class _InChunks(torch.autograd.Function):
    """On a CPU, autograd itself would compute the chunks' gradients one after another."""

    @staticmethod
    def forward(ctx: Any, function: Callable, size: int, threads: int, names: tuple, *tensors: Tensor) -> Tensor:
        learned = ctx.needs_input_grad[4:]

        def compute(*chunk: Tensor) -> tuple[list[Tensor], Tensor]:
            inputs = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(chunk, learned, strict=True)]
            with torch.set_grad_enabled(any(learned)):
                return inputs, function(dict(zip(names, inputs, strict=True)))

        ctx.map = map if threads == 1 else partial(thread_map, threads=threads)
        ctx.chunks = list(ctx.map(compute, *(tensor.split(size) for tensor in tensors)))
        return torch.cat([output.detach() for _, output in ctx.chunks])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def gradients(chunk: tuple[list[Tensor], Tensor], grad_output: Tensor) -> list[Tensor | None]:
            inputs, output = chunk
            output.backward(grad_output, inputs=[tensor for tensor in inputs if tensor.requires_grad])
            return [tensor.grad for tensor in inputs]

        chunks, ctx.chunks = ctx.chunks, None
        sizes = [len(output) for _, output in chunks]
        found = zip(*ctx.map(gradients, chunks, grad.split(sizes)), strict=True)
        return None, None, None, None, *(None if parts[0] is None else torch.cat(parts) for parts in found)


def thread_map(function: Callable[..., Any], *arguments: Any, threads: int) -> list[Any]:
    """Return `list(map(function, *arguments))`, computed by `threads` threads of one core each.

    `function` itself must call neither this nor `in_chunks` with as many threads: it would wait for its own thread.
    """
    return list(_pool(threads).map(function, *arguments))


@cache  # new threads would not use the memory again that ended ones have freed
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
