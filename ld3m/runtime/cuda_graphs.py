"""CUDA graphs: record once what runs many times on tensors of the same shapes, and launch it as one.

Small batches leave a large GPU waiting: Python starts hundreds of kernels for every pass of a U-Net, and starting one
takes longer than running it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

SHAPES = 4  # of inputs, whose recordings are kept: each holds its memory


class GraphedFunction:
    """A `function` of tensors that is recorded, with its backward pass, at its first call with inputs of some shapes.

    Values and gradients, also those of the parameters of `learned`, are the function's; off CUDA it is called itself.
    Only the last call has a backward pass: RuntimeError for a gradient that is taken after another call. `function`
    must not wait for the device. At the first call no autograd graph of `learned` may be alive.
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
        module = nn.Module()  # whose parameters are recorded too
        module.forward, module.learned = self.function, nn.ModuleList(self.learned)
        with torch.enable_grad():
            return torch.cuda.make_graphed_callables(module, examples, allow_unused_input=True)
