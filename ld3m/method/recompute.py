"""Gradient checkpointing: a computation whose graph is not kept, but recomputed when its gradient is taken."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(function: Callable[..., Tensor], *inputs: Tensor, keep_graph: bool = False) -> Tensor:
    """Call `function(*inputs)` without a graph; call it once more, with one, in the backward pass.

    The gradient is that of plain autograd. A chain of T such calls keeps its T inputs, and the graph of one call at a
    time. So memory does not grow with T, and a call costs two forward passes and one backward. `keep_graph` keeps the
    graph of the first pass: the same bits, one forward pass less, more memory. `torch.utils.checkpoint` does not serve:
    its reentrant variant refuses `torch.autograd.grad`, and the other builds a graph in the first pass too, which costs
    a tenth of an iteration.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return _Recomputed.apply(function, keep_graph, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], keep_graph: bool, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        ctx.graph = _with_graph(function, inputs) if keep_graph else None
        return ctx.graph[1].detach() if keep_graph else function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph, ctx.graph = ctx.graph, None
        inputs, output = graph or _with_graph(ctx.function, ctx.saved_tensors)  # the forward pass again, with a graph
        return None, None, *torch.autograd.grad(output, inputs, grad, allow_unused=True)


def _with_graph(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
    """Detached inputs, and the output whose graph ends at them."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        return inputs, function(*inputs)
