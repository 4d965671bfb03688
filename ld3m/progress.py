"""Progress of long work: a bar at a terminal and in Jupyter Lab, about twenty log lines a run under DVC."""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

MEASURED_ITERATIONS = 5  # timed before the first log line says what the whole will cost


def peak_gib() -> float:
    """The largest resident memory of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def progress(total: int, *, label: str, start: int = 0, status: Callable[[], str] = lambda: "") -> Iterator[int]:
    """Yields start .. total-1 and reports; `status` is asked for a few words (a loss, say) whenever it reports."""
    if "DVC_STAGE" not in os.environ:  # the bar shows the cost of what is left as it goes
        with tqdm(range(start, total), desc=label, initial=start, total=total) as bar:
            for step in bar:
                yield step
                bar.set_postfix_str(status(), refresh=False)
        return
    every = max(1, (total - start) // 20)
    began = time.perf_counter()
    for step in range(start, total):
        yield step
        done = step + 1 - start
        seconds = (time.perf_counter() - began) / done
        if done == MEASURED_ITERATIONS:
            print(
                f"{label}: {total - start} iterations at {seconds:.3f} s: {seconds * (total - start) / 60:.1f} min, "
                f"{peak_gib():.1f} GiB peak so far",
                flush=True,
            )
        if done % every == 0 or step + 1 == total:
            left = seconds * (total - step - 1)
            print(f"{label} {step + 1}/{total} {status()} ({seconds:.3f} s each, {left:.0f} s left)", flush=True)
