"""Expert trajectories for MTT: networks trained on the real images, one snapshot of the weights an epoch.

One safetensors file an expert holds `snapshots` (epochs + 1, P), the first of them the initialisation.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
        """The flat parameters (len(epochs), P) after some epochs of one expert; epoch 0 is its initialisation."""
        with safe_open(self.files[expert], framework="pt") as file:
            rows = file.get_slice("snapshots")
            return torch.stack([rows[epoch] for epoch in epochs])


def snapshot_bytes(network: nn.Module, *, count: int, epochs: int) -> int:
    """What the files of so many experts take on the disk."""
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
    """Trains experts 0 .. count-1 into `folder` with plain SGD (no momentum, no decay) and returns their records:
    expert, and the validation accuracy in [0, 1] of its last snapshot. Expert k does not depend on `count`.

    Finished experts wait in the folder of `checkpoint`, so that an interrupted run goes on with the others.
    """
    require_space(folder, snapshot_bytes(new_network(seed=0), count=count, epochs=epochs))
    shared = dict(
        split=dataset.train,
        validation=dataset.validation,
        normalization=dataset.normalization,
        new_network=new_network,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        strategy=strategy,
    )

    together = network_chunk_size(dataset.train.device, batch=batch, size_px=dataset.train.shape[-1])

    def receive(group: int, trained: list[tuple[np.ndarray, float]]) -> list[dict[str, Any]]:
        records = []
        for k, (snapshots, validation_accuracy) in zip(range(group * together, count), trained):  # noqa: B905
            write_tensors(checkpoint.folder / _name(k), {"snapshots": torch.tensor(snapshots)}, {"expert": k})
            sha256 = tensors_hash({"snapshots": torch.tensor(snapshots)})
            records.append({"expert": k, "validation_accuracy": validation_accuracy, "sha256": sha256})
        return records

    # The last group is filled up with experts that nobody asked for: how a group computes depends on its size.
    groups = torch.arange(-(-count // together) * together).view(-1, together).tolist()
    tasks = [shared | {"seeds": [derive(seed, "expert", k) for k in group]} for group in groups]
    with explain_out_of_memory("trajectories.batch", "processes"):
        records = fan_out(
            _train_group,
            tasks,
            processes=processes,
            cluster=cluster,
            label="experts" if together == 1 else f"groups of {together} experts",
            checkpoint=checkpoint,
            receive=receive,
        )
    records = [record for group in records for record in group]
    with new_folder(folder) as partial:
        for k in range(count):
            _place(checkpoint.folder / _name(k), partial)
        write_json(partial / "summary.json", {"experts": records})  # what MTT's stages depend on
    end_workers()
    return records


def _train_group(
    split: Split,
    validation: Split,
    *,
    normalization: Normalization,
    new_network: Callable[..., nn.Module],
    epochs: int,
    batch: int,
    learning_rate: float,
    strategy: str,
    seeds: list[int],
) -> list[tuple[np.ndarray, float]]:
    """Of every expert the snapshots (epochs + 1, P), and the validation accuracy of the last."""
    networks = [new_network(seed=seed) for seed in seeds]
    snapshots = [[flat_parameters(network).cpu()] for network in networks]

    def after_epoch(trained: Sequence[nn.Module]) -> None:
        for kept, network in zip(snapshots, trained, strict=True):
            kept.append(flat_parameters(network).cpu())

    train_together(
        networks,
        partial(split.normalized, normalization),
        split.labels,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        momentum=0.0,
        weight_decay=0.0,
        warm_up=False,
        ema_decay=None,
        strategy=strategy,
        seeds=seeds,
        after_epoch=after_epoch,
    )
    fetch = partial(validation.normalized, normalization)
    return [
        (torch.stack(kept).numpy(), accuracy(network, fetch, validation.labels))
        for kept, network in zip(snapshots, networks, strict=True)
    ]


def _place(file: Path, folder: Path) -> None:
    """The file in another folder too, without a copy where the disk can do that."""
    try:
        os.link(file, folder / file.name)
    except OSError:
        shutil.copy2(file, folder)


def _name(expert: int) -> str:
    return f"expert-{expert:04d}.safetensors"


def open_experts(folder: Path, *, count: int, last_epoch: int, parameters: int) -> Experts:
    """Experts 0 .. count-1 of a folder, each checked to hold epochs 0 .. last_epoch of a network of that size."""
    files = tuple(Path(folder) / _name(k) for k in range(count))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; `dvc repro trajectories` trains the experts")
        try:
            with safe_open(file, framework="pt") as opened:
                epochs, size = opened.get_slice("snapshots").get_shape()
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{file} is not a file of snapshots ({error}); `dvc repro -f trajectories` writes it again"
            ) from error
        if epochs <= last_epoch or size != parameters:
            raise ValueError(
                f"{file} holds {epochs} snapshots of {size} parameters; needed are {last_epoch + 1} of {parameters}: "
                "the experts' network or epochs changed in params.yaml, run `dvc repro trajectories`"
            )
    return Experts(files)
