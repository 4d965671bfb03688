"""A synthetic set that several processes render together, each its share of the images.

`over_ranks(synthetic)` takes the place of the set in `distill`. Every process holds all codes, renders its share and
receives the others' images; in the backward pass it computes its share of the gradients and receives the others'. The
objective is computed by every process, alike, so that all take the same step. A program of four lines:

    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["LOCAL_RANK"]     # before anything uses a GPU
    torch.distributed.init_process_group("nccl")                      # or "gloo", on CPUs
    experiment = Experiment(load_params())
    distill(over_ranks(experiment.synthetic("ld3m", 10)), experiment.objective("dm"), ..., checkpoint=Checkpoint())

is started by `torchrun --nproc-per-node=2 program.py`; one of the processes writes the result. It pays where rendering
is most of an iteration: many images through a large prior. Run so far with gloo on a CPU alone; the gradient is that of
one process (tests/test_distributed.py).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ld3m.synthetic import GladCodes, LD3MCodes


@dataclass(frozen=True)
class OverRanks:
    """The set `whole`, of which this process renders the images at `share`, (n,) indices."""

    whole: LD3MCodes | GladCodes
    share: Tensor

    @property
    def labels(self) -> Tensor:
        return self.whole.labels

    @property
    def learnables(self) -> dict[str, Tensor]:
        return self.whole.learnables

    def tensors(self) -> dict[str, Tensor]:
        return self.whole.tensors()

    def render(self, *, step: int | None = None) -> Tensor:
        names = list(self.learnables)
        learnables = dict(zip(names, _SummedGradients.apply(*self.learnables.values()), strict=True))
        parts = {"learnables": {name: tensor[self.share] for name, tensor in learnables.items()}}
        if hasattr(self.whole, "fixed"):
            parts["fixed"] = {name: tensor[self.share] for name, tensor in self.whole.fixed.items()}
        images = replace(self.whole, labels=self.labels[self.share], **parts).render(step=step)
        return _Gathered.apply(images, self.share, len(self.labels))


def over_ranks(synthetic: LD3MCodes | GladCodes) -> OverRanks:
    """The set rendered by all processes of torch's default group, each of which must call this with the same set.

    ValueError for a set with fewer images than processes, and for one whose noise is redrawn: that of a share is not
    that of the whole.
    """
    count, ranks = len(synthetic.labels), dist.get_world_size()
    if count < ranks:
        raise ValueError(f"{count} images cannot be shared by {ranks} processes: start {count} at most")
    if getattr(synthetic, "noise", "stored") != "stored":
        raise ValueError("spaces.ld3m.noise = 'redrawn' cannot be rendered by several processes: set it to stored")
    return OverRanks(synthetic, torch.arange(count).tensor_split(ranks)[dist.get_rank()])


class _SummedGradients(torch.autograd.Function):
    """The same tensors; their gradients are summed over the processes, each of which has those of its share."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        summed = [grad.clone() for grad in grads]
        for grad in summed:
            dist.all_reduce(grad)
        return tuple(summed)


class _Gathered(torch.autograd.Function):
    """All images (N, C, H, W), of which this process made those at `share`."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, share: Tensor, count: int) -> Tensor:
        ctx.share = share
        whole = images.new_zeros(count, *images.shape[1:])
        whole[share] = images
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.share], None, None
