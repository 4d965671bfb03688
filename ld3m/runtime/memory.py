"""Memory: its peak, and errors that name the settings to lower when it runs out."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

TEXTS = ("out of memory", "not enough memory", "allocate memory", "status_alloc_failed")  # of torch and its libraries


class OutOfMemory(OSError):
    """Memory ran out; the message names the settings to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out in this process, or in a worker process, which the system then kills."""
    if isinstance(error, (MemoryError, TerminatedWorkerError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error).lower() for text in TEXTS)


@contextmanager
def explain_out_of_memory(*settings: str) -> Iterator[None]:
    """Raise `OutOfMemory` with the settings to lower if the block runs out of memory; that of an inner block passes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise OutOfMemory(errno.ENOMEM, f"memory ran out ({what}): lower {' or '.join(settings)}") from error


def forget_peak() -> bool:
    """Restart `peak_gib` from now on; return False on systems (any but Linux) that cannot."""
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
    """Return the peak since the start or `forget_peak`: of resident memory or, once CUDA is used, of that reserved."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**30
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20
