"""Progress of long work: a bar at a terminal and in Jupyter Lab, about twenty log lines a run under DVC."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm

is_silent = ContextVar("is_silent", default=False)


@contextmanager
def silent() -> Iterator[None]:
    """Report nothing inside the block."""
    before = is_silent.set(True)
    try:
        yield
    finally:
        is_silent.reset(before)


def progress(total: int, *, label: str, start: int = 0, status: Callable[[], str] = lambda: "") -> Iterator[int]:
    """Yield start, ..., total - 1 and report how far the work is and the time left.

    `status()` returns a few words to show, such as a loss. The time of the first iteration is left out: it does more
    than the others (validation at the start, start of processes).
    """
    if is_silent.get():
        yield from range(start, total)
        return
    if "DVC_STAGE" not in os.environ:
        with tqdm(range(start, total), desc=label, initial=start, total=total) as bar:
            for step in bar:
                yield step
                bar.set_postfix_str(status(), refresh=False)
        return
    for timed, step in enumerate(range(start, total)):
        yield step
        if timed == 0:
            began = time.perf_counter()
        if (timed + 1) % max(1, (total - start) // 20) == 0 or step + 1 == total:
            seconds = (time.perf_counter() - began) / max(1, timed)
            measured = f"{seconds:.3f} s each, {seconds * (total - step - 1):.0f} s left"
            print(f"{label} {step + 1}/{total} {status()}".rstrip(), f"({measured})", flush=True)
