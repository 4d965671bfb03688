"""Random streams named by purpose: the same (seed, purpose) gives the same numbers wherever it is asked."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, such as `derive(0, "student", step)`; others are independent of it."""
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a new generator for one purpose, on the CPU so that CUDA runs draw the same numbers."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


@contextmanager
def forked(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generators inside the block: the CPU's (initialization), and the device's (dropout)."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(derive(seed, *purpose))
        if devices:
            torch.cuda.manual_seed(derive(seed, *purpose))
        yield
