"""Progress of long work: a bar at a terminal and in Jupyter Lab, about twenty log lines a run under DVC."""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from tqdm.auto import tqdm

MEASURED_ITERATIONS = 5  # timed, after the first, before a log line says what is left
is_silent = ContextVar("is_silent", default=False)


@contextmanager
def silent() -> Iterator[None]:
    """Inside the block nothing reports."""
    before = is_silent.set(True)
    try:
        yield
    finally:
        is_silent.reset(before)


def forget_peak() -> bool:
    """Lets `peak_gib` start anew from now on; False where the system (any but Linux) cannot."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_gib() -> float:
    """The largest resident memory of this process, in GiB, so far or since `forget_peak`; of the CUDA device's memory,
    what it has reserved for its tensors and recordings, where the process uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**30
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def progress(total: int, *, label: str, start: int = 0, status: Callable[[], str] = lambda: "") -> Iterator[int]:
    """Yields start .. total-1 and reports; `status` is asked for a few words (a loss, say) whenever it reports.

    The log times the iterations after the first, which does more than the others: it validates what a run starts from,
    and starts processes. What the whole will cost is printed before it, by `cost.announce`.
    """
    if is_silent.get():
        yield from range(start, total)
        return
    if "DVC_STAGE" not in os.environ:  # the bar shows the cost of what is left as it goes
        with tqdm(range(start, total), desc=label, initial=start, total=total) as bar:
            for step in bar:
                yield step
                bar.set_postfix_str(status(), refresh=False)
        return
    every = max(1, (total - start) // 20)
    for step in range(start, total):
        yield step
        timed = step - start
        if timed == 0:
            began = time.perf_counter()
        seconds = (time.perf_counter() - began) / max(1, timed)
        if (timed + 1) % every == 0 or step + 1 == total:
            left = seconds * (total - step - 1)
            measured = f" ({seconds:.3f} s each, {left:.0f} s left)" if timed >= MEASURED_ITERATIONS else ""
            print(f"{label} {step + 1}/{total} {status()}{measured}".rstrip(), flush=True)
