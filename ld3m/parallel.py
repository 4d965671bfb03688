"""Fan-out of independent tasks over processes, one thread each, so that results do not depend on how many there are."""

import contextlib
import io
from collections.abc import Callable
from multiprocessing import resource_tracker as multiprocessing_tracker
from typing import Any

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor, reusable_executor
from joblib.externals.loky.backend import resource_tracker as loky_tracker

from ld3m.progress import progress


def fan_out(function: Callable[..., Any], tasks: list[dict[str, Any]], *, processes: int, label: str) -> list[Any]:
    """[function(**task) for task in tasks], in that order, over `processes` processes with one thread each.

    What the functions print is lost where there are several processes: their lines would mix.
    """
    if processes == 1:
        return [_on_one_thread(function, tasks[k]) for k in progress(len(tasks), label=label)]
    with parallel_config(backend="loky", n_jobs=processes, inner_max_num_threads=1):
        results = Parallel(return_as="generator")(delayed(_quietly)(function, task) for task in tasks)
        return [next(results) for _ in progress(len(tasks), label=label)]


def end_workers() -> None:
    """Ends the processes that `fan_out` leaves for its next call: they would hold up a Jupyter kernel's exit."""
    if getattr(reusable_executor, "_executor", None) is None:
        return
    executor = get_reusable_executor(reuse=True)  # joblib's own kind, whose `terminate` also removes its shared files
    getattr(executor, "terminate", executor.shutdown)(kill_workers=True)
    _stop_trackers()


def _stop_trackers() -> None:
    """Stops the two processes that look after shared memory, which ignore the signal by which a kernel ends its
    children. There is no public way: where a version of joblib or Python has another one, they end with the kernel."""
    for module in (loky_tracker, multiprocessing_tracker):
        tracker = getattr(module, "_resource_tracker", None)
        if hasattr(tracker, "_stop") and getattr(tracker, "_pid", None) is not None:  # else it is another process's
            tracker._stop()


def _quietly(function: Callable[..., Any], task: dict[str, Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return _on_one_thread(function, task)


def _on_one_thread(function: Callable[..., Any], task: dict[str, Any]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(**task)
    finally:
        torch.set_num_threads(threads)
