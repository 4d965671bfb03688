"""Runs that go on after a kill or a signal: their state on disk, signals that wait for the step, one process a run.

with Checkpoint(file, minutes=2, configuration=configuration) as checkpoint:
    checkpoint.resume(restore)                # calls restore(state) if an interrupted run left a state
    for step in range(start, steps):
        with checkpoint.step(state):          # state() returns what the next run shall restore
            ...
checkpoint.remove()                           # once the result is written
"""

import hashlib
import io
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ld3m.runtime.storage import locked, write_bytes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
State = Any  # dicts, lists and tuples of tensors and plain values


class Interrupted(KeyboardInterrupt):
    """A signal ended a run; the message says what is on disk and how to go on."""


class Checkpoint:
    """Keep the state of a run in a file.

    The state is written after a step when `minutes` have passed since the last time, when a signal came, and at the
    end of the block. The file is replaced in one step (atomic write): a kill at any moment leaves a whole state.
    Inside the block SIGINT and SIGTERM finish the current step, write the state and raise `Interrupted`; a second
    SIGINT does not wait for the step.

    Parameters
    ----------
    file
        Without one, nothing is kept and signals are left alone.
    configuration
        JSON values, which a resumed run must find unchanged.

    Raises
    ------
    BlockingIOError
        At the start of the block, if another process is in a block of the same file.
    """

    def __init__(
        self, file: Path | None = None, *, minutes: float = math.inf, configuration: dict[str, Any] | None = None
    ):
        self.file, self.minutes = file, minutes
        self.configuration = json.loads(json.dumps(configuration))

    @property
    def folder(self) -> Path:
        """A place for files that are too large to be written with every state."""
        return self.file.with_suffix("")

    def __enter__(self) -> "Checkpoint":
        self._is_busy, self._signals = True, []
        self._unwritten: Callable[[], State] | None = None
        self._written_at = time.monotonic()
        self._exits = ExitStack()
        if self.file is not None:
            self._exits.enter_context(locked(self.file))
            if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
                for number in SIGNALS:
                    self._exits.callback(signal.signal, number, signal.signal(number, self._on_signal))
        self._is_busy = False
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._is_busy = True
        is_interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        with self._exits:
            if kind is None or is_interrupted:
                self._save()
        if self.file is not None and (is_interrupted or kind is None and self._signals):
            message = f"ended by a signal. {self.status()}"
            print(message, flush=True)  # when papermill itself is ended, it shows only what was printed
            raise Interrupted(message) from None

    def _on_signal(self, number: int, _: Any) -> None:
        self._signals.append(number)
        if not self._is_busy or self._signals.count(signal.SIGINT) > 1:
            self._is_busy = True  # a further signal lets the state be written
            raise Interrupted

    @contextmanager
    def step(self, state: Callable[[], State], *, write: bool = False) -> Iterator[None]:
        """Run a step, after which `state()` returns the state; an error inside leaves the file as it is.

        With `write` the state is written after the step, however long ago the last write was.
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
        if self.file is not None and self._unwritten is not None:
            buffer = io.BytesIO()
            torch.save({"configuration": self.configuration, "state": self._unwritten()}, buffer)
            write_bytes(self.file, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
            self._unwritten, self._written_at = None, time.monotonic()

    def resume(self, restore: Callable[[State], Any]) -> None:
        """Call `restore(state)`, with tensors on the CPU, if the file is there.

        ValueError if it is broken or has another configuration; the message names what changed.
        """
        if self.file is None or not self.file.exists():
            return
        data = self.file.read_bytes()
        files = [self.file, *([self.folder] if self.folder.is_dir() else [])]
        start_over = f"to start over delete {' and '.join(map(os.path.relpath, files))}"
        try:
            if data[:32] != hashlib.sha256(data[32:]).digest():
                raise ValueError("its hash is not that of its content")
            content = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)  # executes no pickle
            if not (changed := sorted(_differences(content["configuration"], self.configuration))):
                restore(content["state"])
        except Exception as error:  # wrong values raise about anything
            raise ValueError(f"{self.file} is broken or not of this run ({error!r}): {start_over}") from error
        if changed:
            raise ValueError(
                f"{self.file} belongs to an interrupted run with another configuration; changed since: "
                f"{', '.join(changed)}. Restore these values to finish that run, or {start_over}"
            )
        print(f"resumes an interrupted run; {start_over}", flush=True)

    def status(self) -> str:
        """Return what is on disk and how to go on."""
        if self.file is None or not self.file.exists():
            return "Nothing was written: the same command starts over"
        file = os.path.relpath(self.file)  # outputs of notebooks name no machine's folders
        return f"Last written: {file}; the same command resumes from it, or starts over if you delete it"

    def remove(self) -> None:
        """Remove the file and the folder, once the result is written."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)


def _differences(before: Any, now: Any, under: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in before.keys() | now.keys()
            for line in _differences(before.get(key), now.get(key), f"{under}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{under} {before!r} -> {now!r}"]
