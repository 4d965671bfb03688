"""Run independent tasks side by side, one thread each: in worker processes of this machine, or on a Ray cluster.

Results depend neither on the number of workers nor on where they run.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any

import torch
from joblib.externals.loky import get_reusable_executor

from ld3m.runtime.allocator import keep_freed_memory
from ld3m.runtime.checkpoint import SIGNALS, Checkpoint
from ld3m.runtime.progress import progress

POLL_SECONDS = 0.5
_open: dict[str, Callable[[], Any]] = {}  # ends the worker processes, and the connection to a cluster
_runs_task = False  # in a worker process

Pool = tuple[Callable[..., Future], int, Callable[[set[Future]], Any]]  # submits, how many at once, ends what runs


def fan_out(
    function: Callable[..., Any],
    tasks: list[dict[str, Any]],
    *,
    processes: int,
    cluster: str | None = None,
    label: str,
    checkpoint: Checkpoint | None = None,
) -> list[Any]:
    """Compute `[function(**task) for task in tasks]` side by side; all of it must be picklable.

    A signal or an error ends the running tasks: one with a `Checkpoint` finishes its step, others end at once.

    Parameters
    ----------
    processes
        Worker processes of one thread each, where prints are dropped; 1 runs the tasks in this process.
    cluster
        A Ray cluster to run on instead: its address, or "auto" for the one this machine belongs to. It must find this
        package, and the files that tasks name, under the same paths.
    label
        Names the work in the progress bar.
    checkpoint
        Stores the results (JSON values or tensors); tasks whose result it holds are not run again.

    Raises
    ------
    TerminatedWorkerError
        If a worker process died, most often because memory ran out; Ray runs lost tasks again.
    """
    results: dict[int, Any] = {}
    try:
        with checkpoint or Checkpoint() as checkpoint:
            checkpoint.resume(results.update)
            calls = ((function, k, task) for k, task in enumerate(tasks) if k not in results)
            if processes == 1 and cluster is None:
                arriving = (_on_one_thread(*call) for call in calls)
            else:
                arriving = _arriving(calls, _on_cluster(cluster) if cluster else _on_this_machine(processes, function))
            with closing(arriving):
                for _ in progress(len(tasks), label=label, start=len(results)):
                    k, result = next(arriving)
                    with checkpoint.step(lambda: results, write=True):
                        results[k] = result
    except BaseException:
        end_workers()  # idle ones hold up the end of a process that multiprocessing started
        raise
    return [results[k] for k in range(len(tasks))]


def end_workers() -> None:
    """End the worker processes, and the connection to a cluster, that `fan_out` keeps for its next call."""
    while _open:
        _open.popitem()[1]()


def _arriving(calls: Iterator[tuple], pool: Pool) -> Iterator[tuple[int, Any]]:
    """Yield (k, result) of each task as it ends. No task begins before there is a worker for it."""
    submit, at_once, end = pool
    running = {submit(*call) for call in islice(calls, at_once)}
    try:
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {submit(*call) for call in islice(calls, len(done))}
            for task in done:
                yield task.result()
    finally:
        end(running)


def _on_one_thread(function: Callable[..., Any], k: int, task: dict[str, Any]) -> tuple[int, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return k, function(**task)
    finally:
        torch.set_num_threads(threads)


def _on_this_machine(processes: int, function: Callable[..., Any]) -> Pool:
    server = get_context("forkserver")  # imports torch once for all workers
    server.set_forkserver_preload([function.__module__])
    workers = get_reusable_executor(processes, context=server, timeout=300, initializer=_start_worker)
    _open["workers"] = partial(workers.shutdown, kill_workers=True)

    def end(running: set[Future]) -> None:
        while running:  # again and again: a worker between two tasks ignores a signal
            for worker in list(workers._processes.values()):
                worker.terminate()
            running = wait(running, timeout=POLL_SECONDS).not_done

    return partial(workers.submit, _in_worker), processes, end


def _start_worker() -> None:
    keep_freed_memory()
    for number in SIGNALS:
        signal.signal(number, _end_task)
    threading.Thread(target=_watch, daemon=True).start()
    sys.stdout = sys.stderr = open(os.devnull, "w")


def _watch() -> None:
    """End this worker with its parent, even a killed one: else the task would hold its checkpoint until its end."""
    parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _in_worker(function: Callable[..., Any], k: int, task: dict[str, Any]) -> tuple[int, Any]:
    global _runs_task
    _runs_task = True
    try:
        return _on_one_thread(function, k, task)
    finally:
        _runs_task = False


def _end_task(number: int, frame: Any) -> None:
    """End the task once. Between tasks a signal would end the worker, and loky then kills all the others."""
    global _runs_task
    if _runs_task:
        _runs_task = False
        raise KeyboardInterrupt


def _on_cluster(cluster: str) -> Pool:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else it reports every cluster to its makers
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"cluster={cluster!r}: needs Ray, `pip install -e '.[cluster]'`") from error
    if not ray.is_initialized():
        try:
            if ":" in cluster:  # Ray itself waits for minutes
                host, port = cluster.split("://")[-1].rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=cluster, log_to_driver=False)
        except (OSError, ValueError) as error:
            advice = "start one with `ray start --head`"
            raise ValueError(f"cluster={cluster!r}: no Ray cluster answers ({error}); {advice}") from error
        _open["cluster"] = ray.shutdown
    gpus = 1 if torch.cuda.is_available() else 0
    kind = "GPU" if gpus else "CPU"
    if not (at_once := int(ray.cluster_resources().get(kind, 0))):
        raise ValueError(f"cluster={cluster!r}: has no {kind}; start its nodes with some, or choose another device")
    run = ray.remote(num_cpus=1, num_gpus=gpus)(_on_one_thread)

    def end(running: set[Future]) -> None:
        for task in running:
            ray.cancel(task.object_ref)
        wait(running)

    return lambda *call: run.remote(*call).future(), at_once, end
