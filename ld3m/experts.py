"""Expert trajectories for MTT: networks trained on the real images, one snapshot of the weights an epoch.

One safetensors file an expert holds `snapshots` (epochs + 1, P), the first of them the initialisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ld3m.data import Dataset, Normalization, Split
from ld3m.memory import named
from ld3m.networks import flat_parameters
from ld3m.parallel import end_workers, fan_out
from ld3m.seeds import derive
from ld3m.storage import new_folder, require_space, write_tensors
from ld3m.training import accuracy, train


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
) -> list[dict[str, Any]]:
    """Trains experts 0 .. count-1 into `folder` with plain SGD (no momentum, no decay) and returns their records:
    expert, and the validation accuracy in [0, 1] of its last snapshot. Expert k does not depend on `count`."""
    parameters = len(flat_parameters(new_network(seed=0)))
    require_space(folder, 4 * count * (epochs + 1) * parameters)
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
    with new_folder(folder) as partial:
        tasks = [shared | {"folder": partial, "expert": k, "seed": derive(seed, "expert", k)} for k in range(count)]
        with named("trajectories.batch", "processes"):
            records = fan_out(_train_expert, tasks, processes=processes, label="experts")
    end_workers()
    return records


def _train_expert(
    folder: Path,
    split: Split,
    validation: Split,
    *,
    normalization: Normalization,
    new_network: Callable[..., nn.Module],
    expert: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    strategy: str,
    seed: int,
) -> dict[str, Any]:
    network = new_network(seed=seed)
    snapshots = [flat_parameters(network).cpu()]
    train(
        network,
        lambda index: normalization.to_images(split.pixels(index)),
        split.labels,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        momentum=0.0,
        weight_decay=0.0,
        warm_up=False,
        ema_decay=None,
        strategy=strategy,
        seed=seed,
        after_epoch=lambda trained: snapshots.append(flat_parameters(trained).cpu()),
    )
    stacked = torch.stack(snapshots)
    write_tensors(folder / f"expert-{expert:04d}.safetensors", {"snapshots": stacked}, {"expert": expert})
    fetch = lambda index: normalization.to_images(validation.pixels(index))  # noqa: E731
    return {"expert": expert, "validation_accuracy": accuracy(network, fetch, validation.labels)}


def open_experts(folder: Path, *, count: int, last_epoch: int, parameters: int) -> Experts:
    """Experts 0 .. count-1 of a folder, each checked to hold epochs 0 .. last_epoch of a network of that size."""
    files = tuple(Path(folder) / f"expert-{k:04d}.safetensors" for k in range(count))
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
