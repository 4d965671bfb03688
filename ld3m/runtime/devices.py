"""Where the numbers are computed: the CPU, or the first CUDA device."""

import os
import platform
from functools import cache
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


def has_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply in bfloat16: without them it is slower than float32."""
    if hasattr(torch.cpu, "get_capabilities"):  # of newer versions of PyTorch
        return any(there is True for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.cpu._is_avx512_bf16_supported()


def usable_precision(precision: str, device: torch.device | str) -> str:
    """The precision, or float32 in the place of bfloat16 on a CPU without it."""
    if precision != "bfloat16" or torch.device(device).type != "cpu" or has_bfloat16():
        return precision
    _say("this CPU has no instructions for bfloat16: float32 takes its place")
    return "float32"


@cache
def _say(text: str) -> None:
    """Once a process."""
    print(text, flush=True)


def test_chunk_size(device: torch.device | str, *, size_px: int) -> int:
    """How many images a network that is tested takes at once: on a CPU few, which stay in its cache, on CUDA a million
    pixels."""
    return 50 if torch.device(device).type == "cpu" else max(1, 2**20 // size_px**2)


def network_chunk_size(device: torch.device | str, *, batch: int, size_px: int) -> int:
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
