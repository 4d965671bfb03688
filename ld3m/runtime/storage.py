"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

ABANDONED_SECONDS = 3600
METADATA_KEY = "ld3m"  # one key: safetensors does not keep the order of several, and bytes shall repeat


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises OSError before long work where the disk of `folder` cannot take what the work will write."""
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{needed_bytes / 2**20:.1f} MiB needed in {folder}, {free / 2**20:.1f} MiB are free: make room",
        )


def write_bytes(file: Path, data: bytes) -> None:
    """Replaces `file` in one step; after an error (a full disk, say) the former file is still there."""
    _replace(file, file.with_name(f".{file.name}.partial"), [data])


def write_parts(file: Path, parts: Iterable[bytes]) -> None:
    """`write_bytes` for what comes in parts and may be written by several processes at once: the last one stays.

    What a killed process left is removed once nobody has written to it for an hour.
    """
    for former in file.parent.glob(f".{file.name}.*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - former.stat().st_mtime > ABANDONED_SECONDS:
                former.unlink()
    _replace(file, file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.partial"), parts)


def _replace(file: Path, partial: Path, parts: Iterable[bytes]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            for part in parts:
                opened.write(part)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
        _flush(file.parent)
    except OSError as error:
        if error.errno is None:  # of the parts, in its own words
            raise
        raise explained(error, file) from error
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """What a file or a folder holds is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of network disks that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def write_json(file: Path, values: Any) -> None:
    write_bytes(file, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """A safetensors file with `metadata` as JSON; the same values give the same bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_bytes(file, save(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that `write_tensors` wrote; ValueError for any other or a broken one."""
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
    """sha256 over names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `folder` at the end of the block, or vanishes if the block fails."""
    folder = Path(folder)
    partial, former = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "former"))
    _restore(folder, former)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if folder.exists():
            os.replace(folder, former)
        os.replace(partial, folder)
        _flush(folder.parent)
    except OSError as error:
        if error.errno is None:  # of the block, in its own words
            raise
        raise explained(error, folder) from error
    finally:
        _restore(folder, former)
        shutil.rmtree(partial, ignore_errors=True)


def _restore(folder: Path, former: Path) -> None:
    if former.exists() and not folder.exists():  # stopped between the two renames
        os.replace(former, folder)
    shutil.rmtree(former, ignore_errors=True)


def explained(error: OSError, target: Path) -> OSError:
    """The error with `target` and what to do in its message."""
    advice = {
        errno.ENOSPC: "no space is left: make room",
        errno.EROFS: "the disk is read-only",
        errno.EACCES: "not permitted",
    }
    reason = advice.get(error.errno, error.strerror)
    return OSError(error.errno, f"{target} could not be written ({reason}); what was there before is unchanged")
