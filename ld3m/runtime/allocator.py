"""The allocator of the C library."""

import ctypes


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees.

    glibc hands every larger tensor back to the system and asks for it again: up to half of the time of a training.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    for option in (-1, -3) if mallopt else ():  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(option, 2**30)
