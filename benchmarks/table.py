"""The table of ratios: its rows, the clock they are measured by, and the file they are kept in.

Every row compares two ways to compute the same, timed in turns in one process. `ratio` is `other` over `ours`: above 1
is ahead, in time and in memory. Rows of the benchmark `roofline` are the other way round: their ratio is the share of
the machine's rate that is reached.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ld3m.pipeline.estimate import clock
from ld3m.runtime.devices import describe
from ld3m.runtime.parallel import end_workers
from ld3m.runtime.progress import silent
from ld3m.runtime.storage import write_bytes

FILE = Path(__file__).with_name("benchmarks.csv")


@dataclass(frozen=True)
class Row:
    benchmark: str
    compared_with: str
    ratio: float
    ours: float
    other: float
    unit: str
    device: str


def less_is_better(benchmark: str, compared_with: str, *, ours: float, other: float, unit: str, device: str) -> Row:
    device = describe(device, threads=torch.get_num_threads())
    return Row(benchmark, compared_with, other / ours, ours, other, unit, device)


def share_of_limit(benchmark: str, compared_with: str, *, ours: float, limit: float, unit: str, device: str) -> Row:
    device = describe(device, threads=torch.get_num_threads())
    return Row(benchmark, compared_with, ours / limit, ours, limit, unit, device)


def in_turns(ways: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """The median seconds of each way. Every round takes each of them once, so that other work on the machine slows down
    all alike."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(clock(way))
    return {name: statistics.median(values) for name, values in taken.items()}


def require_same(ours: Iterable[Tensor], other: Iterable[Tensor], *, what: str, within: float) -> None:
    """ValueError where tensors differ by more than `within` of the other's norm: a ratio of times would say nothing."""
    for one, two in zip(ours, other, strict=True):
        apart = ((one - two).norm() / two.norm()).item()
        if not apart <= within:
            raise ValueError(f"{what} differ by {apart:.2g} of their norm, more than {within:g}: they are not compared")


def read(file: Path) -> list[Row]:
    return [Row(**row) for row in pd.read_csv(file).to_dict("records")] if file.exists() else []


def write(rows: list[Row], file: Path) -> None:
    """Replaces the rows of the same benchmarks and keeps the others; the file is replaced in one step."""
    measured = {row.benchmark for row in rows}
    table = pd.DataFrame([row for row in read(file) if row.benchmark not in measured] + rows)
    table = table.sort_values("benchmark", kind="stable")  # rows of one benchmark stay in their order
    write_bytes(file, table.to_csv(index=False, float_format="%.4g").encode())


def show(rows: Iterable[Row]) -> None:
    for row in rows:
        compared = f"{row.ours:.4g} against {row.other:.4g} {row.unit}"
        print(f"  {row.benchmark:<22} {row.compared_with:<42} {row.ratio:7.2f}   {compared}", flush=True)


def main(*measures: Callable[..., list[Row]], arguments: list[str] | None = None) -> None:
    """Measures, prints the rows of each script, and puts them into the table."""
    parser = argparse.ArgumentParser(description="Measures rows of the table of benchmarks.")
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds: the numbers say nothing")
    parser.add_argument("--out", type=Path, default=FILE)
    given, began = parser.parse_args(arguments), time.monotonic()
    for k, measure in enumerate(measures, 1):
        print(f"[{k} of {len(measures)}, {time.monotonic() - began:.0f} s] {measure.__module__}", flush=True)
        with silent():
            rows = measure(smoke=given.smoke)
        end_workers()  # or those that wait for more work are timed with the next
        show(rows)
        write(rows, given.out)
    print(f"{given.out}, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
