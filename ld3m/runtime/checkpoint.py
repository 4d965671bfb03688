"""Runs that survive: their state on disk at intervals, signals that wait for the step, one process a run.

    with Checkpoint(file, minutes=2, configuration=configuration) as checkpoint:
        checkpoint.resume(restore)                # calls restore(state) where an interrupted run left one
        for step in range(start, steps):
            with checkpoint.step(state):          # state() is what the next run shall be given
                ...
    checkpoint.remove()                           # once the result is safe

A state is made of dicts, lists, tensors and JSON values. It is written when `minutes` have passed, when a signal asks
the run to end (after the step), and when the block ends. The former file stays beside the new one: where a file is
broken, the one before it is taken.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from ld3m.runtime.storage import explained, read_tensors, tensors_hash, write_tensors

SIGNALS = (signal.SIGINT, signal.SIGTERM)
State = dict[str, Any]


class Interrupted(KeyboardInterrupt):
    """A signal ended a run; the message says what is on disk and how to go on."""


class Checkpoint:
    """Where a run keeps its state; without a `file` it keeps nothing, and signals do what they always do.

    Entering the block raises BlockingIOError where another process is at work on the same run. SIGINT and SIGTERM then
    end the block with `Interrupted`: a step is finished first, unless SIGINT comes a second time.
    """

    def __init__(
        self, file: Path | None = None, *, minutes: float = math.inf, configuration: dict[str, Any] | None = None
    ):
        """`configuration` are plain values that a resumed run must find unchanged."""
        self.file, self.minutes = file, minutes
        self.configuration = json.loads(json.dumps(configuration))  # tuples as lists, as they come back from the file

    @property
    def previous(self) -> Path:
        return self.file.with_name(f"{self.file.name}.previous")

    @property
    def folder(self) -> Path:
        """A place for what is too large to be written again with every state."""
        return self.file.with_suffix("")

    def __enter__(self) -> "Checkpoint":
        self._is_busy, self._signals = False, []
        self._unwritten: Callable[[], State] | None = None
        self._written_at = time.monotonic()
        self._handlers = {}
        if self.file is not None:
            self._lock = _lock(self.file)
            if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
                self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.file is None:
            return
        is_interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            if kind is None or is_interrupted:
                self._save()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            _unlock(self.file, self._lock)
        if is_interrupted or kind is None and self._signals:  # that came while the block was left
            message = f"ended by a signal. {self.status()}"
            print(message, flush=True)  # papermill, when it is ended itself, shows no more than what was printed
            raise Interrupted(message) from None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if not (self._is_busy or _is_at_edge(frame)) or self._signals.count(signal.SIGINT) > 1:
            self._is_busy = True  # the next signal lets the state be written
            raise Interrupted

    @contextmanager
    def step(self, state: Callable[[], State], *, write: bool = False) -> Iterator[None]:
        """A step after which the state is that of `state()`; an error inside leaves what is on disk as it is.

        `write`: the state is written whether or not its time has come.
        """
        self._is_busy, self._unwritten = True, None
        yield
        self._unwritten = state
        if write or time.monotonic() - self._written_at >= 60 * self.minutes:
            self._save()
        self._is_busy = False
        if self._signals:
            self._is_busy = True
            raise Interrupted

    def _save(self) -> None:
        """Writes the state of the last step. After an OSError (a full disk, say) the one before it is still there."""
        if self.file is None or self._unwritten is None:
            return
        tensors: dict[str, Tensor] = {}
        content = {"configuration": self.configuration, "state": _pack(self._unwritten(), tensors)}
        with suppress(FileNotFoundError):
            os.replace(self.file, self.previous)
        write_tensors(self.file, tensors, content | {"sha256": _hash(tensors, content)})
        self._unwritten, self._written_at = None, time.monotonic()

    def resume(self, restore: Callable[[State], Any]) -> None:
        """Calls `restore` with the newest whole state, where there is one.

        ValueError where it belongs to another configuration, naming what changed, and where nothing whole is left.
        """
        if not self._is_there():
            return
        content = self._newest()
        if changed := sorted(_differences(content["configuration"], self.configuration)):
            raise ValueError(
                f"{self.file} belongs to an interrupted run with another configuration; changed since: "
                f"{', '.join(changed)}. Restore these values to finish that run, or {self._anew()}"
            )
        try:
            restore(content["state"])
        except Exception as error:  # values that do not fit raise about anything
            raise ValueError(
                f"{self.file} does not hold the state of this run ({type(error).__name__}: {error}): {self._anew()}"
            ) from error
        print(f"goes on from the last state of an interrupted run; {self._anew()}", flush=True)

    def _anew(self) -> str:
        beside = f" and {os.path.relpath(self.folder)}" if self.folder.is_dir() else ""
        return f"to start anew delete {os.path.relpath(self.file)}*{beside}"  # the state before it too

    def _is_there(self) -> bool:
        return self.file is not None and (self.file.exists() or self.previous.exists())

    def _newest(self) -> dict[str, Any]:
        """The content of the file; where it is broken or missing, of the one before, which takes its place."""
        try:
            return _read(self.file)
        except (FileNotFoundError, ValueError) as problem:
            if not self.previous.exists():
                raise
            try:
                content = _read(self.previous)
            except ValueError as other:
                raise ValueError(f"{problem}; {other}; {self._anew()}") from other
            print(f"{problem}; {self.previous.name}, the state before it, takes its place", flush=True)
            os.replace(self.previous, self.file)
            return content

    def status(self) -> str:
        """What is on disk, and what to do with it."""
        if not self._is_there():
            return "Last written: nothing"
        return f"Last written: {os.path.relpath(self.file)}; the same command goes on from there; {self._anew()}"

    def remove(self) -> None:
        """Removes everything that was kept, once the result is safe."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
            self.previous.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)


def _is_at_edge(frame: FrameType | None) -> bool:
    """Whether the block of a checkpoint is being entered or left, where an exception would leave its lock behind."""
    edges = (Checkpoint.__enter__.__code__, Checkpoint.__exit__.__code__)
    while frame and frame.f_code not in edges:
        frame = frame.f_back
    return frame is not None


def _lock(file: Path) -> int:
    """A descriptor of <name>.lock, which is this run's until it is closed, or the process ends however it ends."""
    path = file.with_suffix(".lock")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise explained(error, path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"process {owner} is at work on the run of {file}: wait for it, or end it; nothing was changed",
            ) from None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its owner has removed it in the meantime


def _unlock(file: Path, descriptor: int) -> None:
    file.with_suffix(".lock").unlink(missing_ok=True)
    os.close(descriptor)


def _read(file: Path) -> dict[str, Any]:
    """`configuration` and `state` of a file that a `Checkpoint` wrote; ValueError where it is not as written."""
    try:
        tensors, content = read_tensors(file)
        digest = content.pop("sha256")
        if digest != _hash(tensors, content):
            raise ValueError("its hash is not that of what it holds")
        return {"configuration": content["configuration"], "state": _unpack(content["state"], tensors)}
    except OSError:
        raise
    except Exception as error:  # what is not as written raises about anything
        raise ValueError(f"{file} is broken ({(error.__cause__ or error)!r})") from error


def _hash(tensors: dict[str, Tensor], content: dict[str, Any]) -> str:
    return hashlib.sha256((json.dumps(content, sort_keys=True) + tensors_hash(tensors)).encode()).hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, with its tensors moved to `tensors` under a number each; keys need not be text."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item, tensors) for item in value]
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {key: _unpack(item, tensors) for key, item in items}
        case list():
            return [_unpack(item, tensors) for item in value]
    return value


def _differences(before: Any, now: Any, under: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{under}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{under} {before!r} -> {now!r}"]
