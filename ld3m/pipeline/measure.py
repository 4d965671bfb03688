"""What a piece of work takes, in seconds and in memory, at sizes that this machine can take; lines lead on from there.

A `work(size)` does the real thing once at some size (images in a batch, steps of a chain) and returns the seconds that
count. It is done at growing sizes as long as the next one will take little time and half of the free memory at most, so
that what is small is measured whole, and of what is large a part.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from ld3m.runtime.memory import available_bytes, limited, used_bytes
from ld3m.runtime.progress import forget_peak, peak_gib

BUDGET_S = 0.2  # a measurement aims at
SHARE = 0.5  # of the memory that is left, which a measurement may take


@dataclass(frozen=True)
class Taken:
    """`peak` is the most memory that the process had, in bytes; of a CUDA device, that it had reserved there."""

    size: int
    seconds: float
    peak: float


@dataclass(frozen=True)
class Line:
    """Straight between the sizes that were measured, and on from the two largest, to `full` or any other."""

    points: tuple[Taken, ...]
    full: int
    base: float  # bytes that were in use before

    @property
    def largest(self) -> int:
        return self.points[-1].size

    def seconds(self, size: float | None = None) -> float:
        return self._at(size, "seconds")

    def peak(self, size: float | None = None) -> float:
        return self._at(size, "peak")

    def tried(self, what: str) -> str:
        """How much was measured, where it was not all; `what` is the unit of size."""
        return f"{self.largest} of {self.full} {what}" if self.largest < self.full else ""

    def _at(self, size: float | None, what: str) -> float:
        size = self.full if size is None else size
        if len(self.points) == 1:
            return getattr(self.points[0], what) * size / self.largest
        low, high = next((pair for pair in pairwise(self.points) if size <= pair[1].size), self.points[-2:])
        slope = (getattr(high, what) - getattr(low, what)) / (high.size - low.size)
        if size > high.size:
            slope = max(0.0, slope)  # what is measured jitters, but more of it takes no less
        return getattr(high, what) + slope * (size - high.size)


def grow(work: Callable[[int], float], *, full: int, device: str) -> Line:
    """Measures `work` at size 1 and at larger ones up to `full`, at two at least where memory allows it."""
    _give_back()
    base = used_bytes(device)
    points = [_measure(work, 1, device)]
    while (last := points[-1]).size < full:
        affordable = max(last.size * BUDGET_S / last.seconds, 2 if len(points) == 1 else 0)
        fitting = SHARE * available_bytes(device) / max(1, last.peak - base) * last.size
        size = int(min(full, affordable, fitting))
        if size < min(full, 2 * last.size):
            break
        points.append(_measure(work, size, device))
    return Line(tuple(points), full, base)


@dataclass(frozen=True)
class Plane:
    """Of work that is some images wide and done some times over: `wide` at depth 1, `deep` at the largest width.

    Memory grows with the width up to `at_once` images, which go through a network at once.
    """

    wide: Line
    deep: Line
    at_once: int

    def seconds(self, depth: int | None = None) -> float:
        """At the full width."""
        return self.deep.seconds(depth) * self.wide.seconds() / self.wide.seconds(self.wide.largest)

    def peak(self) -> float:
        """That of one repetition, and what little is kept of each."""
        width = max(self.wide.largest, min(self.wide.full, self.at_once))
        return self.deep.peak() + self.wide.peak(width) - self.wide.peak(self.wide.largest)

    def tried(self, wide: str, deep: str) -> str:
        return ", ".join(filter(None, (self.wide.tried(wide), self.deep.tried(deep))))


def grow_plane(work: Callable[[int, int], float], *, width: int, depth: int, at_once: int, device: str) -> Plane:
    """Measures `work(images, repetitions)` up to a width, and from there up to a depth."""
    wide = grow(lambda size: work(size, 1), full=width, device=device)
    return Plane(wide, grow(lambda size: work(wide.largest, size), full=depth, device=device), at_once)


def peak_of(*planes: Plane) -> float:
    """The peak of kinds of work that take turns: what each has had is kept for it, on a CPU by the C library, on CUDA
    where it is recorded."""
    return planes[0].wide.base + sum(plane.peak() - plane.wide.base for plane in planes)


def clock(function: Callable[[], object]) -> float:
    """The seconds that a call takes, on the device too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def _measure(work: Callable[[int], float], size: int, device: str) -> Taken:
    _give_back()
    forget_peak()
    with limited(device):
        seconds = work(size)
        if seconds < BUDGET_S / 2 or device == "cuda":
            seconds = work(size)  # the first does more than the others: on CUDA it records or compiles
    return Taken(size, seconds, peak_gib() * 2**30)


def _give_back() -> None:
    """Memory that is free goes back to the system: what the C library keeps of it would be taken for the work's."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
