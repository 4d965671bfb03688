"""The table of ratios: its rows, the clock they are measured by, and the file they are kept in.

Every row compares two ways to compute the same, timed in turns in one process. `ratio` is `other` over `ours`: above 1
is ahead, in time and in memory. Rows of the benchmark `roofline` are the other way round: their ratio is the share of
the machine's rate that is reached.
"""

import argparse
import csv
import io
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ld3m.pipeline.estimate import clock
from ld3m.runtime.devices import describe
from ld3m.runtime.progress import silent
from ld3m.runtime.storage import write_bytes

FILE = Path(__file__).with_name("benchmarks.csv")
FIELDS = ("benchmark", "compared_with", "ratio", "ours", "other", "unit", "device")


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
    return Row(benchmark, compared_with, other / ours, ours, other, unit, describe(device, threads=_threads()))


def share_of_limit(benchmark: str, compared_with: str, *, ours: float, limit: float, unit: str, device: str) -> Row:
    return Row(benchmark, compared_with, ours / limit, ours, limit, unit, describe(device, threads=_threads()))


def _threads() -> int:
    return torch.get_num_threads()


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
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return [
            Row(**row | {name: float(row[name]) for name in ("ratio", "ours", "other")})
            for row in csv.DictReader(opened)
        ]


def write(rows: list[Row], file: Path) -> None:
    """Replaces the rows of the same benchmarks and keeps the others; the file is replaced in one step."""
    measured = {row.benchmark for row in rows}
    former = [row for row in read(file) if row.benchmark not in measured]
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(former + rows, key=lambda row: row.benchmark):  # rows of one benchmark stay in their order
        numbers = {name: f"{getattr(row, name):.4g}" for name in ("ratio", "ours", "other")}
        writer.writerow(vars(row) | numbers)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, text.getvalue().encode())


def show(rows: Iterable[Row]) -> None:
    for row in rows:
        print(
            f"  {row.benchmark:<22} {row.compared_with:<42} {row.ratio:7.2f}   "
            f"{row.ours:.4g} against {row.other:.4g} {row.unit}",
            flush=True,
        )


def main(measure: Callable[..., list[Row]], description: str | None, arguments: list[str] | None = None) -> None:
    """One script by itself: measures its rows, prints them, and puts them into the table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds: the numbers say nothing")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args(arguments)
    with silent():
        rows = measure(smoke=given.smoke)
    show(rows)
    write(rows, given.out)
