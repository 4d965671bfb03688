"""Floating-point operations, counted while they are done."""

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flop(TorchDispatchMode):
    """Counts as torch's `FlopCounterMode`, which also counts by module, but not in an `autograd.grad` in a backward."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output
