"""Rendering a set of ten images a class, forward and backward, in as few calls of the denoiser as there are threads,
against one class after another, and against `spaces.ld3m.render_batch` images a call, which is so small in params.yaml
that one image a class is enough for two threads."""

from dataclasses import replace
from functools import partial
from math import ceil

import torch

from benchmarks.table import Row, in_turns, less_is_better, main
from ld3m.method.spaces import LatentCodes
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params


def iteration(codes: LatentCodes) -> None:
    images = codes.render(step=0)
    images.backward(torch.ones_like(images))


def measure(*, smoke: bool) -> list[Row]:
    experiment = Experiment(load_params())
    ipc = 2 if smoke else 10
    codes = experiment.synthetic("ld3m", ipc, **({"steps": 1} if smoke else {}))
    others = {"one class after another": ipc, f"{codes.render_batch} images a call": codes.render_batch}
    sizes = {"ours": ceil(len(codes.labels) / codes.threads)} | others
    ways = {name: partial(iteration, replace(codes, render_batch=size)) for name, size in sizes.items()}
    seconds = in_turns(ways, rounds=1 if smoke else 3)
    ours, device = seconds.pop("ours"), experiment.params.on_device
    return [
        less_is_better("rendering", name, ours=ours, other=other, unit="s", device=device)
        for name, other in seconds.items()
    ]


if __name__ == "__main__":
    main(measure)
