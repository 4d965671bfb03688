"""Fan-out of independent tasks over processes, of this machine or of a Ray cluster, one thread each: results depend
neither on how many there are nor on where they are."""

import contextlib
import io
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor, reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ld3m.runtime.checkpoint import SIGNALS, Checkpoint, Interrupted
from ld3m.runtime.progress import progress

ATTEMPTS = 3  # at a task whose worker is lost
SECONDS_DEAF = 1.0  # to signals, while tasks run on a Ray cluster
_connected_here = threading.Event()  # to a Ray cluster: else it is the caller's, to close too


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
    """[function(**task) for task in tasks], in that order, over `processes` processes with one thread each.

    `cluster` is the address of a Ray cluster ("auto": the one that this machine belongs to), whose processors then work
    instead of `processes`: it must find this package and the files that tasks name in the same places, on a file system
    that its nodes share. The tasks of lost workers are run again, here or there, `ATTEMPTS` times in all.

    What the functions print is lost where there are several processes: their lines would mix. Every result (JSON values
    or tensors) is written to `checkpoint` when it is there; those that an interrupted call left there are taken as they
    are, and their tasks are not run again. `receive(k, result)`, called in this process, gives what takes its place.
    """
    results: dict[int, Any] = {}
    is_alone = processes == 1 and cluster is None
    with checkpoint or Checkpoint() as checkpoint, _passed_on(is_alone) as signals:
        checkpoint.resume(results.update)
        calls = ((function, k, task) for k, task in enumerate(tasks) if k not in results and not signals)
        arriving = _arriving(calls, processes, signals) if cluster is None else _arriving_from(cluster, calls, signals)
        for _ in progress(len(tasks), label=label, start=len(results)):
            k, result = next(arriving, (None, None))
            if k is None:
                print(
                    f"{label}: {len(results)} of {len(tasks)} are done, the others were ended or not begun", flush=True
                )
                raise Interrupted
            with checkpoint.step(lambda: results, write=True):
                results[k] = receive(k, result)
    return [results[k] for k in range(len(tasks))]


def _arriving(calls: Iterator[tuple], processes: int, signals: list[int]) -> Iterator[tuple[int, Any]]:
    """Keys and results of the tasks that were not ended, whichever is there first."""
    if processes == 1:
        yield from (_on_one_thread(*call) for call in calls)
        return
    sent: dict[int, tuple] = {}

    def sending(calls: Iterator[tuple]) -> Iterator[Any]:
        for call in calls:
            sent[call[1]] = call
            yield delayed(_in_worker)(os.getpid(), *call)

    lost: Counter[int] = Counter()
    while True:
        with parallel_config(backend="loky", n_jobs=processes, inner_max_num_threads=1):
            parallel = Parallel(return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1)
            outcomes = parallel(sending(chain(list(sent.values()), calls)))
        try:
            for outcome in outcomes:
                if outcome is not None:
                    del sent[outcome[0]]
                    yield outcome
            return
        except TerminatedWorkerError:  # its other workers are ended with it
            if signals:
                return
            lost.update(list(sent))
            if max(lost.values(), default=0) == ATTEMPTS:
                raise


def _arriving_from(cluster: str, calls: Iterator[tuple], signals: list[int]) -> Iterator[tuple[int, Any]]:
    """As `_arriving`, from a Ray cluster. Its own tasks and not joblib's backend for it, which gives no result before
    it has all."""
    ray = _connected(cluster)
    gpus = 1 if torch.cuda.is_available() else 0
    kind = "GPU" if gpus else "CPU"
    if not (at_once := int(ray.cluster_resources().get(kind, 0))):
        raise ValueError(
            f"cluster = {cluster!r} in params.yaml has no {kind}, which device = "
            f"{'cuda' if gpus else 'cpu'} asks for: start its nodes with some, or set cluster to null"
        )
    run = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=ATTEMPTS - 1)(_on_one_thread)
    waiting = [run.remote(*call) for call in islice(calls, at_once)]
    while waiting:
        done, waiting = ray.wait(waiting, timeout=SECONDS_DEAF)
        for task in done:
            yield ray.get(task)
            waiting += [run.remote(*call) for call in islice(calls, 1)]
        if signals:
            for task in waiting:
                ray.cancel(task)
            return


def _connected(cluster: str) -> Any:
    """The module `ray`, connected to a cluster."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would tell its makers of every cluster
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            f"cluster = {cluster!r} in params.yaml needs Ray: pip install -e '.[cluster]', or set cluster to null"
        ) from error
    if not ray.is_initialized():
        try:
            if ":" in cluster:  # Ray itself waits for minutes
                host, port = cluster.split("://")[-1].rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=cluster, log_to_driver=False)
            _connected_here.set()
        except (ConnectionError, OSError, ValueError) as error:
            raise ValueError(
                f"cluster = {cluster!r} in params.yaml: no Ray cluster answers ({error}); start one with `ray start "
                "--head`, name another address, or set cluster to null"
            ) from error
    return ray


def _on_one_thread(function: Callable[..., Any], k: int, task: dict[str, Any]) -> tuple[int, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return k, function(**task)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _passed_on(is_alone: bool) -> Iterator[list[int]]:
    """The signals that came, each passed on to the workers, so that their tasks end; a second Ctrl-C waits for none.

    One that came while the last result arrived ends the call at the end of the block.
    """
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        for process in list(getattr(reusable_executor._executor, "_processes", {})):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)

    if is_alone or threading.current_thread() is not threading.main_thread():
        yield came
        return
    former = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if came:
        raise Interrupted


def _in_worker(parent: int, function: Callable[..., Any], k: int, task: dict[str, Any]) -> tuple[int, Any] | None:
    """None where a signal ended the task: at once, or as its own checkpoint has it. Between tasks signals are ignored,
    or they would end the worker."""
    _end_with(parent)
    try:
        for number in SIGNALS:
            signal.signal(number, _end_task)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return _on_one_thread(function, k, task)
    except KeyboardInterrupt:
        return None
    finally:
        _ignore_signals()


@cache
def _end_with(parent: int) -> None:
    """Kills this process, too, when its parent is killed: else it would hold the checkpoint of its task until that is
    done, and nobody could go on from there."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _end_task(number: int, frame: Any) -> None:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Ends what `fan_out` leaves for its next call: its connection to a cluster, or processes with their memory."""
    if _connected_here.is_set():
        sys.modules["ray"].shutdown()
        _connected_here.clear()
    if getattr(reusable_executor, "_executor", None) is not None:
        executor = get_reusable_executor(reuse=True)  # joblib's own kind, whose `terminate` removes its shared files
        getattr(executor, "terminate", executor.shutdown)(kill_workers=True)
        reusable_executor._executor = None
