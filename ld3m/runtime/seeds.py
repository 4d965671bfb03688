"""Random streams named by purpose: the same (seed, purpose) gives the same numbers wherever it is asked."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `derive(0, "student", step)`; different purposes are independent."""
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A fresh CPU generator for one purpose; CPU so that CUDA runs draw the same numbers."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


@contextmanager
def forked(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seeds torch's global generators inside the block and restores them after: the CPU's, which module initialisers
    use, and that of the device, which dropout uses."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(derive(seed, *purpose))
        if devices:
            torch.cuda.manual_seed(derive(seed, *purpose))
        yield
