"""A differentiable computation over the images of a set, some at a time, in threads forward and backward."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor


def in_chunks(
    function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor], *, size: int, threads: int
) -> Tensor:
    """`function(tensors)`, (N, ...), of tensors (N, ...): `size` of the N at a time, in so many threads of one core
    each. Neither the result nor its gradient depends on how many there are, but that a single one is the caller's: it
    computes on as many cores as torch is set to."""
    if not torch.is_grad_enabled():  # which a Function is not told
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    return _InParts.apply(function, size, threads, tuple(tensors), *tensors.values())


class _InParts(torch.autograd.Function):
    """Autograd itself would walk the parts' graphs one after another, on a CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[dict[str, Tensor]], Tensor],
        size: int,
        threads: int,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[4:]

        def compute(*parts: Tensor) -> tuple[list[Tensor], Tensor]:
            inputs = [part.detach().requires_grad_(learned) for part, learned in zip(parts, wanted, strict=True)]
            with torch.set_grad_enabled(any(wanted)):
                return inputs, function(dict(zip(names, inputs, strict=True)))

        ctx.threads, ctx.wanted = threads, wanted
        ctx.parts = _map(compute, *(tensor.split(size) for tensor in tensors), threads=threads)
        return torch.cat([output.detach() for _, output in ctx.parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def gradients(part: tuple[list[Tensor], Tensor], grad_output: Tensor) -> tuple[Tensor | None, ...]:
            inputs, output = part
            learned = [tensor for tensor in inputs if tensor.requires_grad]
            return torch.autograd.grad(output, learned, grad_output, allow_unused=True)

        parts, ctx.parts = ctx.parts, None
        sizes = [len(output) for _, output in parts]
        found = zip(*_map(gradients, parts, grad.split(sizes), threads=ctx.threads), strict=True)
        joined = [None if pieces[0] is None else torch.cat(pieces) for pieces in found]
        given = iter(joined)
        return None, None, None, None, *(next(given) if learned else None for learned in ctx.wanted)


def _map(function: Callable[..., Any], *arguments: Any, threads: int) -> list[Any]:
    return list(map(function, *arguments)) if threads == 1 else thread_map(function, *arguments, threads=threads)


def thread_map(function: Callable[..., Any], *arguments: Any, threads: int) -> list[Any]:
    """`list(map(function, *arguments))`, computed by `threads` threads of one core each. `function` itself must call
    neither this nor `in_chunks` with as many threads: it would wait for its own thread."""
    return list(_pool(threads).map(function, *arguments))


@cache  # new threads would not use the memory again that ended ones have freed
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
