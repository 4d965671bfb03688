"""Expert trajectories for MTT: networks trained on the real images, one snapshot of the weights an epoch.

One safetensors file an expert holds `snapshots` (epochs + 1, P), the first of them the initialization.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ld3m.data.dataset import Dataset
from ld3m.evaluation.training import accuracy, train_together
from ld3m.models.networks import flat_parameters, unflatten
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

    def approach(self, network: nn.Module, *, epoch: int, rng: torch.Generator) -> None:
        """Move the weights of a network a random share of the way to those of a random expert after `epoch` epochs."""
        expert, share = int(torch.randint(len(self), (), generator=rng)), torch.rand((), generator=rng)
        theta = flat_parameters(network)
        moved = torch.lerp(theta, self.snapshots(expert, [epoch])[0].to(theta), share.to(theta))
        network.load_state_dict(unflatten(moved, network), strict=False)


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
    """Train experts 0 .. count-1 into `folder` with plain SGD. Expert k does not depend on `count`.

    Parameters
    ----------
    new_network
        Called with `seed=...`, gives a network.
    strategy
        Of the augmentation, see `augment.draw`.
    processes, cluster
        Of `fan_out`.
    checkpoint
        Finished experts wait in its folder, so that an interrupted call goes on with the others.

    Returns
    -------
    list of dict
        Of every expert `expert`, its number; `validation_accuracy` of the last snapshot, in [0, 1]; and the `sha256` of
        the snapshots.
    """
    require_space(folder, snapshot_bytes(new_network(seed=0), count=count, epochs=epochs))
    together = network_chunk_size(dataset.train.device, batch=batch, size_px=dataset.train.shape[-1])
    files = [checkpoint.folder / _name(k) for k in range(count)]
    recipe = {"epochs": epochs, "batch": batch, "learning_rate": learning_rate, "strategy": strategy}
    recipe |= {"momentum": 0.0, "weight_decay": 0.0, "warm_up": False, "ema_decay": None}
    shared = {"files": files, "dataset": dataset, "new_network": new_network, "seed": seed, "recipe": recipe}
    tasks = [shared | {"experts": range(first, first + together)} for first in range(0, count, together)]
    label = "experts" if together == 1 else f"groups of {together} experts"
    with explain_out_of_memory("batch", "processes"):
        groups = fan_out(_train_group, tasks, processes=processes, cluster=cluster, label=label, checkpoint=checkpoint)
    end_workers()
    records = [record for group in groups for record in group]
    with new_folder(folder) as new:
        for file in files:
            try:
                os.link(file, new / file.name)  # no copy
            except OSError:  # of disks without hard links
                shutil.copy2(file, new)
        write_json(new / "summary.json", {"experts": records})  # what MTT's stages depend on
    return records


def _train_group(
    experts: Sequence[int],
    files: list[Path],
    dataset: Dataset,
    new_network: Callable[..., nn.Module],
    seed: int,
    recipe: dict[str, Any],
) -> list[dict[str, Any]]:
    """Train some experts, write the files of those that have one, and return their records.

    The last group is filled up with experts without a file: how a group computes depends on its size.
    """
    seeds = [derive(seed, "expert", k) for k in experts]
    networks = [new_network(seed=seed) for seed in seeds]
    snapshots = [[flat_parameters(network).cpu()] for network in networks]

    def keep(trained: Sequence[nn.Module]) -> None:
        for kept, network in zip(snapshots, trained, strict=True):
            kept.append(flat_parameters(network).cpu())

    real, validation, records = dataset.train, dataset.validation, []
    fetch = partial(real.normalized, dataset.normalization)
    train_together(networks, fetch, real.labels, seeds=seeds, after_epoch=keep, **recipe)
    fetch = partial(validation.normalized, dataset.normalization)
    for k, network, kept in zip(experts, networks, snapshots, strict=True):
        if k < len(files):
            tensors = {"snapshots": torch.stack(kept)}
            write_tensors(files[k], tensors, {"expert": k})
            score = accuracy(network, fetch, validation.labels)
            records.append({"expert": k, "validation_accuracy": score, "sha256": tensors_hash(tensors)})
    return records


def _name(expert: int) -> str:
    return f"expert-{expert:04d}.safetensors"


def open_experts(folder: Path, *, count: int, last_epoch: int, parameters: int) -> Experts:
    """Open experts 0 .. count-1 of a folder.

    Parameters
    ----------
    last_epoch, parameters
        Every file must hold the epochs 0 .. last_epoch of a network of so many parameters.

    Raises
    ------
    ValueError
        Names a file that is missing, broken, or does not hold them.
    """
    files = tuple(Path(folder) / _name(k) for k in range(count))
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                epochs, size = opened.get_slice("snapshots").get_shape()
            if epochs <= last_epoch or size != parameters:
                raise ValueError(f"it holds {epochs} snapshots of {size} parameters")
        except (OSError, SafetensorError, ValueError) as error:
            needed = f"{last_epoch + 1} snapshots of {parameters} parameters"
            raise ValueError(f"{file} does not give {needed} ({error}): train {count} experts again") from error
    return Experts(files)
