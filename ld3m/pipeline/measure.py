"""What a piece of work takes, in seconds and in memory, at sizes that this machine can take; lines lead on from there.

A `work(size)` does the real thing once at some size (images in a batch, steps of a chain) and returns the seconds that
count. It is done at growing sizes as long as the next one will take little time and half of the free memory at most, so
that what is small is measured whole, and of what is large a part.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from ld3m.runtime.memory import forget_peak, peak_gib

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


def available_bytes(device: str, *, root: Path = Path("/")) -> int:
    """What this process may still take: of the CUDA device's memory, or the least of what the machine, the control
    groups it is in and its own limits leave. `root` is where /proc and /sys are."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import resource

    status = _numbers(root / "proc/self/status")
    left = [_machine_bytes(root), *_group_bytes(root)]
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            left.append(soft - 1024 * status.get(used, 0))
    return max(0, min(left))


def used_bytes(device: str) -> int:
    """What this process holds: of a CUDA device's memory what it has reserved, else what of it is in memory. 0 where
    the system (any but Linux) does not say."""
    if device == "cuda":
        return torch.cuda.memory_reserved()
    return 1024 * _numbers(Path("/proc/self/status")).get("VmRSS", 0)


@contextmanager
def limited(device: str) -> Iterator[None]:
    """Makes what would not fit an error inside the block, instead of the end of the process at the system's hands."""
    import resource

    kind = resource.RLIMIT_DATA
    soft, hard = resource.getrlimit(kind)
    used = 1024 * _numbers(Path("/proc/self/status")).get("VmData", 0)
    if device == "cuda" or not used:  # torch says it itself; no Linux
        yield
        return
    resource.setrlimit(kind, (used + available_bytes(device), hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def _machine_bytes(root: Path) -> int:
    left = _numbers(root / "proc/meminfo").get("MemAvailable")
    return 1024 * left if left is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_bytes(root: Path) -> Iterator[int]:
    """What every control group around this process leaves (version 2, or the memory controller of version 1).

    Files that the system has read and can forget are not counted as used.
    """
    kinds = {
        "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, place = line.split(":", 2)
        if not {"memory", ""} & set(controllers.split(",")):
            continue
        top, limit, used, forgettable = kinds["memory" if controllers else ""]
        inside = Path(place.lstrip("/"))
        for group in {inside, *inside.parents}:  # in a container its own may be there as the top
            folder = root / top / group
            allowed, taken = (next(iter(_lines(folder / name)), "") for name in (limit, used))
            if allowed.isdigit() and taken.isdigit():
                yield int(allowed) - int(taken) + _numbers(folder / "memory.stat").get(forgettable, 0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _numbers(file: Path) -> dict[str, int]:
    """The lines "name: 12 kB" or "name 12" of a file."""
    words = [line.replace(":", " ").split() for line in _lines(file)]
    return {given[0]: int(given[1]) for given in words if len(given) > 1 and given[1].isdigit()}
