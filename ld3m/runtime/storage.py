"""Files that are whole or absent: written under a temporary name, then renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

METADATA_KEY = "ld3m"  # one key: safetensors does not keep the order of several, and bytes shall repeat


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise OSError if the disk of `folder`, which need not exist yet, has less space than long work will need."""
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        needed, free = (f"{count / 2**20:.1f} MiB" for count in (needed_bytes, free))
        raise OSError(errno.ENOSPC, f"{needed} needed in {folder}, {free} are free: make room")


def write_bytes(file: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace `file` in one step, by one process at a time; after an error the former file is still there."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            opened.writelines([data] if isinstance(data, bytes) else data)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    except OSError as error:
        message = f"{file} could not be written ({error.strerror or error}); what was there before is unchanged"
        raise OSError(error.errno, message) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `<name>.lock` beside `file` until the block or the process ends, however it ends.

    BlockingIOError if another process holds it and this one does not `wait`.
    """
    lock = FileLock(file.with_suffix(".lock"), blocking=wait)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        message = f"another process runs on {file}: wait for it or end it; nothing was changed"
        raise BlockingIOError(errno.EWOULDBLOCK, message) from None
    try:
        yield
    finally:
        file.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


def write_json(file: Path, values: Any) -> None:
    write_bytes(file, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file with `metadata` as JSON; the same values give the same bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_bytes(file, save(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: tensors and metadata; ValueError for a broken file or any other."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {})[METADATA_KEY])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except OSError:
        raise
    except Exception as error:  # what another program wrote raises about anything
        raise ValueError(f"{file} is broken or not written by ld3m ({error!r}): delete it") from error
    return tensors, metadata


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end of the block, or vanishes if the block fails."""
    work = folder.with_name(f".{folder.name}.partial")
    if (work / "former").exists() and not folder.exists():  # a process was killed between the two steps below
        os.replace(work / "former", folder)
    shutil.rmtree(work, ignore_errors=True)  # what a killed process left
    new = work / "new"
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            os.replace(folder, work / "former")
        os.replace(new, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
