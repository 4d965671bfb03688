"""Fan-out of independent tasks over processes, one thread each, so that results do not depend on how many there are."""

import contextlib
import io
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker as multiprocessing_tracker
from typing import Any

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor, reusable_executor
from joblib.externals.loky.backend import resource_tracker as loky_tracker

from ld3m.checkpoint import Checkpoint
from ld3m.progress import progress


def fan_out(
    function: Callable[..., Any],
    tasks: list[dict[str, Any]],
    *,
    processes: int,
    label: str,
    checkpoint: Checkpoint | None = None,
) -> list[Any]:
    """[function(**task) for task in tasks], in that order, over `processes` processes with one thread each.

    What the functions print is lost where there are several processes: their lines would mix. Every result (JSON values
    or tensors) is written to `checkpoint` when it is there; those that an interrupted call left there are taken as they
    are, and their tasks are not run again.
    """
    results: dict[int, Any] = {}
    with checkpoint or Checkpoint() as checkpoint:
        checkpoint.resume(results.update)
        arriving = _arriving(function, {k: task for k, task in enumerate(tasks) if k not in results}, processes)
        for _ in progress(len(tasks), label=label, start=len(results)):
            k, result = next(arriving)
            with checkpoint.step(lambda: results, write=True):
                results[k] = result
    return [results[k] for k in range(len(tasks))]


def _arriving(
    function: Callable[..., Any], tasks: dict[int, dict[str, Any]], processes: int
) -> Iterator[tuple[int, Any]]:
    """Keys and results, whichever is there first."""
    calls = [(function, k, task) for k, task in tasks.items()]
    if processes == 1:
        yield from (_on_one_thread(*call) for call in calls)
        return
    with parallel_config(backend="loky", n_jobs=processes, inner_max_num_threads=1):
        results = Parallel(return_as="generator_unordered")(delayed(_quietly)(*call) for call in calls)
    yield from results


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


def _quietly(function: Callable[..., Any], k: int, task: dict[str, Any]) -> tuple[int, Any]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return _on_one_thread(function, k, task)


def _on_one_thread(function: Callable[..., Any], k: int, task: dict[str, Any]) -> tuple[int, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return k, function(**task)
    finally:
        torch.set_num_threads(threads)
