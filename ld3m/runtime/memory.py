"""Memory: how much of it is left, and which parameter to lower where it is too little."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

TEXTS = (  # of the errors by which torch and its libraries say that memory has run out
    *("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


class TooLittleMemory(OSError):
    """Says what to lower in params.yaml."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out here, or for a worker process, which the system then ends."""
    if isinstance(error, (MemoryError, TerminatedWorkerError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text.lower() in str(error).lower() for text in TEXTS)


@contextmanager
def explain_out_of_memory(*settings: str) -> Iterator[None]:
    """Makes an error of what runs out of memory inside the block one that names the settings to lower."""
    try:
        yield
    except TooLittleMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise too_little(f"memory ran out ({str(error).splitlines()[0][:200]})", *settings) from error


def too_little(what: str, *settings: str) -> TooLittleMemory:
    return TooLittleMemory(errno.ENOMEM, f"{what}: lower {' or '.join(settings)} in params.yaml")


def available_bytes(device: str, *, root: Path = Path("/")) -> int:
    """What this process may still take: of the CUDA device's memory, or the least of what the machine, the control
    groups it is in and its own limits leave. `root` is where /proc and /sys are."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
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
