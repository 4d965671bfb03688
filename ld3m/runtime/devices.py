"""Where the numbers are computed: the CPU, or the first CUDA device."""

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch


def choose_device(name: str) -> str:
    """Return "cpu" or "cuda"; "auto" is CUDA if torch sees a device. ValueError for CUDA without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device: set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@cache  # prints once
def usable_precision(precision: str, device: torch.device | str) -> str:
    """Return the precision, or float32 for bfloat16 on a CPU that cannot multiply in it, or only slowly."""
    if precision != "bfloat16" or torch.device(device).type != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return precision
    print("this CPU has no instructions for bfloat16: float32 takes its place", flush=True)
    return "float32"


def test_chunk_size(device: torch.device | str, *, size_px: int) -> int:
    """Return how many images to test at once: on a CPU few, which stay in its cache, on CUDA a million pixels."""
    return 50 if torch.device(device).type == "cpu" else max(1, 2**20 // size_px**2)


def network_chunk_size(device: torch.device | str, *, batch: int, size_px: int) -> int:
    """Return how many networks to train as one computation.

    On a CPU one: processes are faster there. On CUDA up to 8, as many as make a million pixels a step: above, the
    arithmetic takes longer than Python, and memory grows.
    """
    if torch.device(device).type == "cpu":
        return 1
    return min(8, max(1, 2**20 // (batch * size_px**2)))


def describe(device: str, *, threads: int | None = None) -> str:
    """Return the name of the device and, of a CPU, how many threads are used (None: all)."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)", information.read_text(), re.M) if information.exists() else None
    return f"{name[1] if name else platform.machine()}, {threads or os.cpu_count()} threads"
