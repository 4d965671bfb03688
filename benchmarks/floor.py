"""What `make reproduce` cannot do without: the CPU-seconds of its matrix products, beside those that it takes.

`ours` are the CPU-seconds in reports/benchmarks/reproduce.csv, where it was measured on this machine (`python -m
benchmarks.reproduce`), of everything and of all stages of a kind; `other` is what their matrix products, convolutions
and attention take at the rate of one large float32 matrix product on all threads. `ratio` is the share of the limit.
Counted is one iteration, or step, of each kind of work of `ld3m.pipeline.estimate`, times how often it is done.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch

from benchmarks import reproduce
from benchmarks.flop import Flop
from benchmarks.roofline import SIDE
from benchmarks.table import Row, in_turns, less_is_better, main
from ld3m.pipeline import estimate
from ld3m.pipeline.profiles import load_params
from ld3m.runtime.devices import describe
from ld3m.runtime.progress import silent

KINDS = {"control": "evaluate"}  # stages whose work `estimate` counts under another name


def flop(work: Callable[[], object]) -> float:
    with Flop() as count:
        work()
    return count.total


def flop_of_stages(*, limit: int | None = None) -> Counter[str]:
    """The operations of the stages of the main table by their kind: "distill", "evaluate" and so on."""
    params = load_params({"processes": 1, "device": "cpu"})  # the count does not see into other threads
    experiment, found = estimate.StandIns(params), Counter()

    @cache
    def counted(function: Callable[..., float], *arguments: Any) -> float:
        return function(experiment, *arguments)

    with patch.object(estimate, "clock", flop), silent():  # it counts operations in place of seconds
        for name, part, _, work in islice(estimate.stages(experiment), limit):
            if part == "main":
                found[name.split()[0]] += sum(count * counted(*call) for count, call in work)
    return found


def measure(*, smoke: bool) -> list[Row]:
    file = reproduce.FILE
    found = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["machine", "version"])
    found = found[(found.version == "new") & (found.machine == describe("cpu"))]
    if found.empty:
        print(f"  {file} has no run on this machine: `python -m benchmarks.reproduce`, and again")
        return []
    taken = found.groupby(found.stage.str.split("@").str[0].replace(KINDS)).cpu_s.sum()
    counted = flop_of_stages(limit=4 if smoke else None)
    counted["all"] = sum(counted.values())
    a, b = torch.randn(2, 256 if smoke else SIDE, 256 if smoke else SIDE)
    seconds = in_turns({"product": partial(torch.mm, a, b)}, rounds=2 if smoke else 11)["product"]
    rate = 2 * len(a) ** 3 / (seconds * torch.get_num_threads())  # a CPU-second
    return [
        less_is_better(
            "reproduce", f"matrix products; {kind}", ours=taken[kind], other=total / rate, unit="CPU-s", device="cpu"
        )
        for kind, total in counted.most_common()
        if kind in taken
    ]


if __name__ == "__main__":
    main(measure)
