"""Where the numbers are computed: the CPU, or the first CUDA device."""

import os
import platform
from pathlib import Path

import torch

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" is CUDA where there is one. ValueError where CUDA is asked for and is not there."""
    if name not in DEVICES:
        raise ValueError(f"device = {name!r}: must be one of {', '.join(DEVICES)}; set device in params.yaml")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch sees no CUDA device: set device to auto or cpu in params.yaml")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def networks_at_once(device: torch.device | str, *, batch: int, size_px: int) -> int:
    """How many networks to train as one computation. On a CPU one: processes are faster there. On CUDA up to 8, as many
    as make a million pixels a step: above, the arithmetic takes longer than Python, and memory grows."""
    if torch.device(device).type == "cpu":
        return 1
    return min(8, max(1, 2**20 // (batch * size_px**2)))


def describe(device: str, *, threads: int | None = None) -> str:
    """The name of the machine's device and, of a CPU, how many threads are used: all of them (None)."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {threads or os.cpu_count()} threads"
