"""Run independent tasks side by side, one thread each: in worker processes of this machine, or on a Ray cluster.

Results depend neither on the number of workers nor on where they run.
"""

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager, suppress
from typing import Any

import torch
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ld3m.runtime.checkpoint import SIGNALS, Checkpoint, Interrupted
from ld3m.runtime.progress import progress

POLL_SECONDS = 0.5  # after which the main process looks for signals, and a worker for its parent
RAY_RETRIES = 2  # of a task whose cluster node was lost
_workers: list[Any] = []  # the executor, between calls of `fan_out`
_connections: list[Any] = []  # the module `ray`, where `fan_out` connected it


def fan_out(
    function: Callable[..., Any],
    tasks: list[dict[str, Any]],
    *,
    processes: int,
    cluster: str | None = None,
    label: str,
    checkpoint: Checkpoint | None = None,
    receive: Callable[[int, Any], Any] = lambda k, result: result,
) -> list[Any]:
    """Compute `[function(**task) for task in tasks]` in parallel.

    SIGINT and SIGTERM are passed on to the workers: a task with a `Checkpoint` finishes its step, others end at once.

    Parameters
    ----------
    function, tasks
        Must be picklable. What the function prints in a worker process is dropped.
    processes
        Number of worker processes, of one thread each; with 1 the tasks run in this process.
    cluster
        Address of a Ray cluster, or "auto" for the one this machine belongs to. Its processors are used instead of
        `processes`. It must find this package, and the files that tasks name, under the same paths.
    label
        Name of the work in the progress bar.
    checkpoint
        Stores every result (JSON values or tensors). Tasks whose result it holds are not run again.
    receive
        Called as `receive(k, result)` in this process when task k has ended; its value replaces the result.

    Raises
    ------
    Interrupted
        A signal ended the call; `checkpoint` holds the results so far.
    TerminatedWorkerError
        A worker of this machine died, most often because memory ran out. No task is run again.
    """
    results: dict[int, Any] = {}
    is_alone = processes == 1 and cluster is None
    try:
        with checkpoint or Checkpoint() as checkpoint, _signals(is_alone) as signals:
            checkpoint.resume(results.update)
            calls = ((function, k, task) for k, task in enumerate(tasks) if k not in results)
            if is_alone:
                arriving = itertools.starmap(_on_one_thread, calls)
            elif cluster is None:
                arriving = _from_workers(calls, processes, signals)
            else:
                arriving = _from_cluster(calls, cluster, signals)
            for _ in progress(len(tasks), label=label, start=len(results)):
                k, result = next(arriving, (None, None))
                if k is None:
                    print(f"{label}: {len(results)} of {len(tasks)} are done", flush=True)
                    raise Interrupted
                with checkpoint.step(lambda: results, write=True):
                    results[k] = receive(k, result)
    except BaseException:
        if not is_alone:
            end_workers()  # idle ones hold up the end of a process that multiprocessing started
        raise
    return [results[k] for k in range(len(tasks))]


def _from_workers(calls: Iterator[tuple], processes: int, signals: list[int]) -> Iterator[tuple[int, Any]]:
    """Yields (k, result) of each task as it ends. After a signal no task begins, and the workers end with theirs."""
    environment = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    workers = get_reusable_executor(
        processes, timeout=300, initializer=_start_worker, initargs=(os.getpid(),), env=environment
    )
    _workers[:] = [workers]
    running = {workers.submit(_in_worker, *call) for call in itertools.islice(calls, processes)}
    while running:
        done, running = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        if signals:  # again at every turn: a worker that was starting, or between two tasks, ignores one
            for worker in list(workers._processes):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGTERM)
        else:
            running |= {workers.submit(_in_worker, *call) for call in itertools.islice(calls, len(done))}
        for task in done:
            try:
                outcome = task.result()
            except TerminatedWorkerError:
                if not signals:
                    raise
            else:
                if outcome is not None:
                    yield outcome


def _from_cluster(calls: Iterator[tuple], cluster: str, signals: list[int]) -> Iterator[tuple[int, Any]]:
    """Does what `_from_workers` does, on a Ray cluster."""
    ray = _connected(cluster)
    gpus = 1 if torch.cuda.is_available() else 0
    kind = "GPU" if gpus else "CPU"
    if not (at_once := int(ray.cluster_resources().get(kind, 0))):
        raise ValueError(f"cluster={cluster!r}: has no {kind}; start its nodes with some, or choose another device")
    run = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RAY_RETRIES)(_on_one_thread)
    running = [run.remote(*call) for call in itertools.islice(calls, at_once)]
    while running and not signals:
        done, running = ray.wait(running, timeout=POLL_SECONDS)
        running += [run.remote(*call) for call in itertools.islice(calls, len(done))]
        yield from map(ray.get, done)
    for task in running:
        ray.cancel(task)


def _connected(cluster: str) -> Any:
    """Returns the module `ray`, connected to the cluster."""
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
        except (ConnectionError, OSError, ValueError) as error:
            raise ValueError(
                f"cluster={cluster!r}: no Ray cluster answers ({error}); start one with `ray start --head`"
            ) from error
        _connections.append(ray)
    return ray


def _on_one_thread(function: Callable[..., Any], k: int, task: dict[str, Any]) -> tuple[int, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return k, function(**task)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _signals(is_alone: bool) -> Iterator[list[int]]:
    """Collects signals, so that workers can end their tasks; a second Ctrl-C ends the call at once.

    One that came while the last result arrived ends the call at the end of the block.
    """
    came: list[int] = []

    def collect(number: int, frame: Any) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    if is_alone or threading.current_thread() is not threading.main_thread():
        yield came
        return
    former = {number: signal.signal(number, collect) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if came:
        raise Interrupted


def _start_worker(parent: int) -> None:
    """Ends this worker with its parent, even a killed one: else the task would hold its checkpoint until its end."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    _ignore_signals()
    threading.Thread(target=watch, daemon=True).start()
    sys.stdout = sys.stderr = open(os.devnull, "w")


def _in_worker(function: Callable[..., Any], k: int, task: dict[str, Any]) -> tuple[int, Any] | None:
    """Returns None where a signal ended the task. Between tasks signals are ignored: they would end the worker."""
    try:
        for number in SIGNALS:
            signal.signal(number, _end_task)
        return _on_one_thread(function, k, task)
    except KeyboardInterrupt:
        return None
    finally:
        _ignore_signals()


def _end_task(number: int, frame: Any) -> None:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """End the worker processes, and the connection to a cluster, that `fan_out` keeps for its next call."""
    while _connections:
        _connections.pop().shutdown()
    while _workers:
        _workers.pop().shutdown(kill_workers=True)
