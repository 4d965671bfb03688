"""The limit: how much of the rate of one large float32 matrix product an LD3M iteration reaches.

`ratio` is the share of the limit: `ours` is the GFLOP/s of rendering a set and of its backward pass down to `z` and
`c`, decoder included, `other` is that of the product of two square matrices on as many threads. Counted are matrix
products, convolutions and attention, by torch's own formulas. The embedded prior renders ten images in the steps of
params.yaml, on several threads a part of them on each, as distilling does; the prior of the size of `cin256-v2`, with
random weights, renders one image of 128 px in two steps.
"""

from dataclasses import replace
from functools import partial
from math import ceil

import torch

from benchmarks.flop import Flop
from benchmarks.full_size import PAPER, SMOKE, random_split, start
from benchmarks.rendering import iteration
from benchmarks.table import Row, in_turns, main, share_of_limit
from ld3m.method.spaces import LatentCodes
from ld3m.models.compvis import build
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params

SIDE = 1536  # of the matrices


def compared(name: str, codes: LatentCodes, *, rounds: int, device: str, side: int) -> Row:
    with Flop() as count:
        iteration(replace(codes, threads=1))  # the count does not see into other threads
    a, b = torch.randn(2, side, side, device=device)
    ways = {"ours": partial(iteration, codes), "limit": partial(torch.mm, a, b)}
    ways["limit"]()
    seconds = in_turns(ways, rounds=rounds)
    rates = {"ours": count.total / seconds["ours"] / 1e9, "limit": 2 * side**3 / seconds["limit"] / 1e9}
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return share_of_limit("roofline", f"matrix product; {name}{threads}", **rates, unit="GFLOP/s", device=device)


def measure(*, smoke: bool) -> list[Row]:
    experiment, threads = Experiment(load_params()), torch.get_num_threads()
    given = dict(device=experiment.params.on_device, side=256 if smoke else SIDE)
    embedded = experiment.synthetic("ld3m", 1)
    rows = []
    for count in sorted({1, threads}) if given["device"] == "cpu" else (threads,):
        torch.set_num_threads(count)
        parts = replace(embedded, threads=count, render_batch=ceil(len(embedded.labels) / count))
        rows.append(compared("embedded prior", parts, rounds=1 if smoke else 11, **given))
    scale = replace(SMOKE if smoke else PAPER, classes=1, real_batch=1)
    prior = build(scale.kind, seed=0).to(given["device"])
    split = random_split(scale, scale.sizes_px[0], torch.device(given["device"]))
    codes = start(split, prior, ipc=1, steps=2, render_batch=1)
    rows.append(compared("prior of full size", codes, rounds=1 if smoke else 3, **given))
    return rows


if __name__ == "__main__":
    main(measure)
