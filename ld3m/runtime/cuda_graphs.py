"""CUDA graphs: what runs again and again on tensors of the same shapes is recorded once, and launched as one.

Small batches leave a large GPU waiting: Python starts some hundred kernels for every pass of a U-Net, one by one, and
each takes less time than its start.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

SHAPES = 4  # of inputs, whose recordings are kept: each holds its memory


class GraphedFunction:
    """`function` of tensors, recorded with its backward pass at the first call with inputs of some shapes.

    On CUDA it gives the values and gradients of `function`, of the parameters of `learned` too; elsewhere it is
    `function`. What it returns is the caller's own, but the backward pass is that of the last call: a gradient that is
    taken after another call is a RuntimeError. `function` must not wait for the device; where it has learned
    parameters, nothing that keeps a graph of them may be alive at its first call.
    """

    def __init__(self, function: Callable[..., Tensor], *learned: nn.Module) -> None:
        self.function = function
        self.learned = learned
        self.recorded: dict[tuple, Callable[..., Tensor]] = {}
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if shapes not in self.recorded:
            if len(self.recorded) == SHAPES:
                del self.recorded[next(iter(self.recorded))]
            self.recorded[shapes] = self._record(inputs)
        output = self.recorded[shapes](*inputs).clone()
        self.calls += 1
        if output.requires_grad:
            output.register_hook(partial(self._require_last, self.calls))
        return output

    def _require_last(self, call: int, grad: Tensor) -> None:
        if call != self.calls:
            raise RuntimeError("the function was called again before this gradient, which would be the last call's")

    def _record(self, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        examples = tuple(tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs)
        with torch.enable_grad():
            module = _Function(self.function, self.learned)
            return torch.cuda.make_graphed_callables(module, examples, allow_unused_input=True)


class _Function(nn.Module):
    """The function as a module, whose parameters are those that it uses and that are learned."""

    def __init__(self, function: Callable[..., Tensor], learned: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.function = function
        self.learned = nn.ModuleList(learned)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)
