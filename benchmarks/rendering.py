"""Rendering a set of ten images a class, forward and backward, in as few calls of the denoiser as
`spaces.ld3m.render_batch` allows, against one class after another and one image after another."""

from dataclasses import replace

import torch

from benchmarks.table import Row, in_turns, less_is_better, main
from ld3m.config import load_params
from ld3m.experiment import Experiment
from ld3m.synthetic import LD3MCodes


def iteration(codes: LD3MCodes) -> None:
    images = codes.render(step=0)
    images.backward(torch.ones_like(images))


def measure(*, smoke: bool) -> list[Row]:
    experiment = Experiment(load_params())
    ipc = 2 if smoke else 10
    codes = experiment.synthetic("ld3m", ipc, **({"steps": 1} if smoke else {}))
    batches = {"ours": codes.render_batch, "one class after another": ipc, "one image after another": 1}
    ways = {name: lambda batch=batch: iteration(replace(codes, render_batch=batch)) for name, batch in batches.items()}
    seconds = in_turns(ways, rounds=1 if smoke else 3)
    return [
        less_is_better(
            "rendering", name, ours=seconds["ours"], other=other, unit="s", device=experiment.params.on_device
        )
        for name, other in seconds.items()
        if name != "ours"
    ]


if __name__ == "__main__":
    main(measure, __doc__)
