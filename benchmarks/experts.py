"""Training the experts of params.yaml, from nothing to their files, against one after another in a plain loop.

The plain loop trains the same experts with the same random streams: an order of the images and one augmentation a
batch, the optimizer and the layers of torch as they come. It has one thread, or all of them. Ours starts its worker
processes and ends them, seconds that more experts would share. `batched` is one process that trains all experts as one
network with stacked weights (torch.func), which is what ours does on CUDA.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.table import Row, in_turns, less_is_better, main, require_same
from ld3m.data.augment import augment, draw
from ld3m.data.dataset import Dataset, Split
from ld3m.evaluation.experts import train_experts
from ld3m.evaluation.training import accuracy, train_together
from ld3m.models.networks import _AveragePool, flat_parameters
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.seeds import derive, generator


def textbook(network: nn.Module) -> nn.Module:
    """The same network as one would write it: torch's own pools, the whole batch at once, memory as it comes."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, _AveragePool):
                setattr(parent, name, nn.AvgPool2d(2))
    if hasattr(network, "images_in_cache"):
        network.images_in_cache = sys.maxsize
    return network.to(memory_format=torch.contiguous_format)


def ours(dataset: Dataset, folder: Path, **given: Any) -> None:
    with tempfile.TemporaryDirectory() as waiting:
        train_experts(folder, dataset, checkpoint=Checkpoint(Path(waiting) / "experts.safetensors"), **given)


def plain(
    dataset: Dataset,
    folder: Path,
    *,
    new_network: Callable[..., nn.Module],
    count: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    strategy: str,
    seed: int,
    threads: int,
    **_: Any,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for k in range(count):
        seed_k = derive(seed, "expert", k)
        network = textbook(new_network(seed=seed_k)).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate)
        snapshots = [flat_parameters(network)]
        for epoch in range(epochs):
            rng = generator(seed_k, "epoch", epoch)
            for index in torch.randperm(len(dataset.train.labels), generator=rng).split(batch):
                images = dataset.train.normalized(dataset.normalization, index)
                images = augment(images, draw(strategy, count=len(index), generator=rng))
                loss = cross_entropy(network(images), dataset.train.labels[index].to(images.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            snapshots.append(flat_parameters(network))
        accuracy(network, partial(dataset.validation.normalized, dataset.normalization), dataset.validation.labels)
        folder.mkdir(exist_ok=True)
        save_file({"snapshots": torch.stack(snapshots).cpu()}, folder / f"expert-{k:04d}.safetensors")
    torch.set_num_threads(before)


def batched(
    dataset: Dataset, *, new_network: Callable[..., nn.Module], count: int, seed: int, processes: int, **recipe: Any
) -> None:
    seeds = [derive(seed, "expert", k) for k in range(count)]
    fixed = dict(momentum=0.0, weight_decay=0.0, warm_up=False, ema_decay=None)
    fetch = partial(dataset.train.normalized, dataset.normalization)
    train_together(
        [new_network(seed=one) for one in seeds], fetch, dataset.train.labels, seeds=seeds, **fixed, **recipe
    )


def measure(*, smoke: bool) -> list[Row]:
    experiment = Experiment(load_params())
    dataset, params = experiment.dataset, experiment.params
    given = params.trajectories.model_dump(exclude={"experts"}) | {"count": params.trajectories.experts}
    given |= {"strategy": params.data.augmentation, "seed": params.seed, "processes": params.processes, "cluster": None}
    given |= {"new_network": experiment.new_network(params.distill.network)}
    if smoke:
        few = Split(dataset.train.uint8[:64], dataset.train.labels[:64], dataset.train.classes)
        dataset = replace(dataset, train=few, validation=few)
        given |= {"count": 2, "epochs": 1, "processes": 1}
    recipe = {name: value for name, value in given.items() if name != "cluster"}
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("ours", "one thread", "all threads")}
        ways = {
            "ours": partial(ours, dataset, folders["ours"], **given),
            "one after another, one thread": partial(plain, dataset, folders["one thread"], **recipe, threads=1),
            f"one after another, {threads} threads": partial(
                plain, dataset, folders["all threads"], **recipe, threads=threads
            ),
            f"batched, {threads} threads": partial(batched, dataset, **recipe),
        }
        seconds = in_turns(ways, rounds=1)  # half a minute each
        for k in range(given["count"]):
            found = [_snapshots(folder, k) for folder in folders.values()]
            for other in found[1:]:
                require_same(found[0][1:], other[1:], what=f"the snapshots of expert {k}", within=1e-2)
    return [
        less_is_better("experts", name, ours=seconds["ours"], other=other, unit="s", device=params.on_device)
        for name, other in seconds.items()
        if name != "ours"
    ]


def _snapshots(folder: Path, k: int) -> Tensor:
    return load_file(folder / f"expert-{k:04d}.safetensors")["snapshots"]


if __name__ == "__main__":
    main(measure)
