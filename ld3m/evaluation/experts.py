"""Expert trajectories for MTT: networks trained on the real images, one snapshot of the weights an epoch.

One safetensors file an expert holds `snapshots` (epochs + 1, P), the first of them the initialization.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ld3m.data.dataset import Dataset, Normalization, Split
from ld3m.evaluation.training import accuracy, train_together
from ld3m.models.networks import flat_parameters
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.devices import network_chunk_size
from ld3m.runtime.memory import explain_out_of_memory
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.seeds import derive
from ld3m.runtime.storage import new_folder, require_space, tensors_hash, write_json, write_tensors


@dataclass(frozen=True)
class Experts:
    """The files of some experts; a snapshot is read from disk when it is asked for, and nothing else of its file."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def snapshots(self, expert: int, epochs: list[int]) -> Tensor:
        """Return the flat parameters (len(epochs), P) of an expert after some epochs, 0 being its initialization."""
        with safe_open(self.files[expert], framework="pt") as file:
            rows = file.get_slice("snapshots")
            return torch.stack([rows[epoch] for epoch in epochs])


def snapshot_bytes(network: nn.Module, *, count: int, epochs: int) -> int:
    """Compute the size of the files of `count` experts."""
    return count * (epochs + 1) * flat_parameters(network).nbytes


def train_experts(
    folder: Path,
    dataset: Dataset,
    *,
    new_network: Callable[..., nn.Module],
    count: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    strategy: str,
    seed: int,
    processes: int,
    cluster: str | None = None,
    checkpoint: Checkpoint,
) -> list[dict[str, Any]]:
    """Train experts 0 .. count-1 into `folder` with plain SGD and return a record of each.

    A record holds `expert`, `validation_accuracy` in [0, 1] of the last snapshot, and the `sha256` of the snapshots.
    Expert k does not depend on `count`. Finished experts wait in the folder of `checkpoint`, so that an interrupted
    call goes on with the others.
    """
    require_space(folder, snapshot_bytes(new_network(seed=0), count=count, epochs=epochs))
    shared = {
        "train": dataset.train,
        "validation": dataset.validation,
        "normalization": dataset.normalization,
        "new_network": new_network,
        "recipe": {"epochs": epochs, "batch": batch, "learning_rate": learning_rate, "strategy": strategy},
    }
    together = network_chunk_size(dataset.train.device, batch=batch, size_px=dataset.train.shape[-1])
    # The last group is filled up with experts that nobody asked for: how a group computes depends on its size.
    groups = torch.arange(-(-count // together) * together).view(-1, together).tolist()

    def receive(group: int, trained: list[tuple[np.ndarray, float]]) -> list[dict[str, Any]]:
        records = []
        for k, (snapshots, validation_accuracy) in zip(range(groups[group][0], count), trained, strict=False):
            tensors = {"snapshots": torch.tensor(snapshots)}
            write_tensors(checkpoint.folder / _name(k), tensors, {"expert": k})
            sha256 = tensors_hash(tensors)
            records.append({"expert": k, "validation_accuracy": validation_accuracy, "sha256": sha256})
        return records

    with explain_out_of_memory("batch", "processes"):
        received = fan_out(
            _train_group,
            [shared | {"seeds": [derive(seed, "expert", k) for k in group]} for group in groups],
            processes=processes,
            cluster=cluster,
            label="experts" if together == 1 else f"groups of {together} experts",
            checkpoint=checkpoint,
            receive=receive,
        )
    end_workers()
    records = list(chain.from_iterable(received))
    with new_folder(folder) as partial_folder:
        for k in range(count):
            file = checkpoint.folder / _name(k)
            try:
                os.link(file, partial_folder / file.name)  # no copy
            except OSError:  # of disks without hard links
                shutil.copy2(file, partial_folder)
        write_json(partial_folder / "summary.json", {"experts": records})  # what MTT's stages depend on
    return records


def _train_group(
    train: Split,
    validation: Split,
    *,
    normalization: Normalization,
    new_network: Callable[..., nn.Module],
    recipe: dict[str, Any],
    seeds: list[int],
) -> list[tuple[np.ndarray, float]]:
    """The snapshots (epochs + 1, P) of every expert, and the validation accuracy of the last one."""
    networks = [new_network(seed=seed) for seed in seeds]
    snapshots = [[flat_parameters(network).cpu()] for network in networks]

    def keep(trained: Sequence[nn.Module]) -> None:
        for kept, network in zip(snapshots, trained, strict=True):
            kept.append(flat_parameters(network).cpu())

    recipe = recipe | {"momentum": 0.0, "weight_decay": 0.0, "warm_up": False, "ema_decay": None}
    fetch = partial(train.normalized, normalization)
    train_together(networks, fetch, train.labels, seeds=seeds, after_epoch=keep, **recipe)
    fetch = partial(validation.normalized, normalization)
    accuracies = [accuracy(network, fetch, validation.labels) for network in networks]
    return list(zip([torch.stack(kept).numpy() for kept in snapshots], accuracies, strict=True))


def _name(expert: int) -> str:
    return f"expert-{expert:04d}.safetensors"


def open_experts(folder: Path, *, count: int, last_epoch: int, parameters: int) -> Experts:
    """Open experts 0 .. count-1 of a folder. An error names the file that is missing, broken, or without epochs
    0 .. last_epoch of a network of so many parameters."""
    files = tuple(Path(folder) / _name(k) for k in range(count))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: train {count} experts")
        try:
            with safe_open(file, framework="pt") as opened:
                epochs, size = opened.get_slice("snapshots").get_shape()
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} is not a file of snapshots ({error}): train the experts again") from error
        if epochs <= last_epoch or size != parameters:
            raise ValueError(
                f"{file} holds {epochs} snapshots of {size} parameters, but last_epoch={last_epoch} and "
                f"parameters={parameters}: train the experts again, with this network and enough epochs"
            )
    return Experts(files)
