"""Memory of one LD3M iteration: the most bytes of tensors alive at once, those of the weights not counted.

Compared with one step with its gradient, plain, which no way can do without: a ratio of 1 is a chain that needs no more
than its largest step, whatever its length.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.iteration import gradients, ours, plain, start
from benchmarks.table import Row, less_is_better, main
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that still live; `peak` is the most so far."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size):
        self.live -= size


def peak_mib(work: Callable[[], Any]) -> float:
    with LiveBytes() as meter:
        work()
    return meter.peak / 2**20


def measure(*, smoke: bool) -> list[Row]:
    experiment = Experiment(load_params())
    prior, device = experiment.prior, experiment.params.on_device
    z, c, eps = start(experiment)
    given = dict(eps=eps, guidance=experiment.params.spaces.ld3m.guidance)

    def peak(chain: Callable, steps: int) -> float:
        return peak_mib(partial(gradients, partial(chain, prior, **given, steps=steps), z, c, torch.ones_like(z)))

    short, long = (2, 3) if smoke else (20, 40)
    one, measured = peak(plain, 1), {steps: peak(ours, steps) for steps in (short, long)}
    others = [
        (f"one step with gradient; ours at T = {short}", measured[short], one),
        (f"one step with gradient; ours at T = {long}", measured[long], one),
        (f"plain autograd; both at T = {short}", measured[short], peak(plain, short)),
    ]
    return [
        less_is_better("ld3m_memory_in_steps", name, ours=mine, other=other, unit="MiB", device=device)
        for name, mine, other in others
    ]


if __name__ == "__main__":
    main(measure)
