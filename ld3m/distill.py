"""The loop: render, match, step; validation picks the iteration; killed and resumed gives the same bits."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ld3m.progress import progress
from ld3m.storage import read_tensors, write_tensors


class Synthetic(Protocol):
    labels: Tensor
    learnables: dict[str, Tensor]

    def render(self, *, step: int | None = None) -> Tensor: ...
    def tensors(self) -> dict[str, Tensor]: ...


class Objective(Protocol):
    learnables: dict[str, Tensor]

    def __call__(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[float, Tensor]: ...


@dataclass
class Distilled:
    """What a run has learned so far.

    `best` holds the tensors of the iteration with the highest validation accuracy: images, everything needed to
    render them again, and the objective's learnables. `history` has one record a step (loss, gradient norms),
    `validation` one a check (iteration, accuracies in [0, 1], and accuracy, their mean). `seconds` is the time that the
    iterations took, without the checks.
    """

    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def chosen(self) -> dict[str, Any]:
        return max(self.validation, key=lambda record: record["accuracy"])


def distill(
    synthetic: Synthetic,
    objective: Objective,
    *,
    iterations: int,
    learning_rates: dict[str, float],
    momentum: float,
    validate: Callable[[Tensor], list[float]],
    validations: int,
    checkpoint: Path,
    checkpoint_minutes: float,
    configuration: dict[str, Any],
    callback: Callable[[int], None] = lambda step: None,
) -> Distilled:
    """Learns `synthetic` with SGD for some iterations.

    `validate(images)` gives accuracies in [0, 1], whose mean decides; it is asked at iteration 0 and `validations`
    times after it, evenly spaced, the last time at the end; with `validations` 0 at the end alone.
    The state goes to the file `checkpoint` every `checkpoint_minutes`; where that file exists the run goes on from
    it, and refuses to if `configuration` (plain JSON values) is not the one it was started with. The caller deletes
    the file once the result is safe.
    """
    learnables = synthetic.learnables | objective.learnables
    if learning_rates.keys() != learnables.keys():
        raise ValueError(
            f"learning_rates has {', '.join(sorted(learning_rates))}; needed are {', '.join(sorted(learnables))}: "
            "change distill.<objective>.<space>.learning_rates in params.yaml"
        )
    optimizer = torch.optim.SGD(
        [{"params": [tensor], "lr": learning_rates[name]} for name, tensor in learnables.items()],
        momentum=momentum,
    )
    run = _resume(checkpoint, learnables, optimizer, configuration) if checkpoint.exists() else Distilled()
    checks = {iterations * check // validations for check in range(validations)}
    saved = time.monotonic()
    for step in progress(iterations, label="distil", start=len(run.history), status=lambda: _status(run)):
        if step in checks:
            _validate(run, synthetic, objective, validate, step)
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        images = synthetic.render(step=step)
        loss, grad_images = objective(images.detach(), synthetic.labels, step=step)
        images.backward(grad_images)
        record = {"step": step, "loss": loss} | {
            f"grad_norm_{name}": tensor.grad.norm().item() for name, tensor in learnables.items()
        }
        if not all(map(math.isfinite, record.values())):
            raise ValueError(
                f"step {step}: {record} is not finite; lower learning_rates of this cell under distill in params.yaml. "
                f"Last written: {checkpoint if checkpoint.exists() else 'nothing'}"
            )
        optimizer.step()
        _check_positive(objective, step)
        run.history.append(record)
        run.seconds += time.perf_counter() - began
        callback(step)
        if time.monotonic() - saved >= 60 * checkpoint_minutes:
            _save(checkpoint, run, learnables, optimizer, configuration)
            saved = time.monotonic()
    _validate(run, synthetic, objective, validate, iterations)
    return run


def _validate(
    run: Distilled,
    synthetic: Synthetic,
    objective: Objective,
    validate: Callable[[Tensor], list[float]],
    iteration: int,
) -> None:
    with torch.no_grad():
        images = synthetic.render()
    former = run.chosen["accuracy"] if run.validation else -1.0
    accuracies = validate(images)
    mean = sum(accuracies) / len(accuracies)
    run.validation.append({"iteration": iteration, "accuracy": mean, "accuracies": accuracies})
    if run.validation[-1]["accuracy"] > former:
        state = synthetic.tensors() | objective.learnables | {"images": images}
        run.best = {name: tensor.detach().clone() for name, tensor in state.items()}


def _check_positive(objective: Objective, step: int) -> None:
    for name, tensor in objective.learnables.items():
        if tensor.item() <= 0:
            raise ValueError(
                f"step {step}: {name} has become {tensor.item():.2g}; "
                f"lower distill.<objective>.<space>.learning_rates.{name} in params.yaml"
            )


def _status(run: Distilled) -> str:
    checked = f", validation {run.validation[-1]['accuracy']:.3f}" if run.validation else ""
    return f"loss {run.history[-1]['loss']:.4g}{checked}"


def _save(
    file: Path,
    run: Distilled,
    learnables: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    configuration: dict[str, Any],
) -> None:
    tensors = {f"learnable.{name}": tensor for name, tensor in learnables.items()}
    tensors |= {
        f"momentum.{name}": optimizer.state[tensor]["momentum_buffer"]
        for name, tensor in learnables.items()
        if optimizer.state[tensor].get("momentum_buffer") is not None
    }
    tensors |= {f"best.{name}": tensor for name, tensor in run.best.items()}
    so_far = {"history": run.history, "validation": run.validation, "seconds": run.seconds}
    write_tensors(file, tensors, {"configuration": configuration} | so_far)


def _resume(
    file: Path, learnables: dict[str, Tensor], optimizer: torch.optim.Optimizer, configuration: dict[str, Any]
) -> Distilled:
    tensors, metadata = read_tensors(file)
    now = json.loads(json.dumps(configuration))  # tuples as lists, as they come back from the file
    changed = sorted(_differences(metadata["configuration"], now))
    if changed:
        raise ValueError(
            f"{file} belongs to an interrupted run with another configuration; changed since: {', '.join(changed)}. "
            "Restore these values to finish that run, or delete the file to start anew"
        )
    with torch.no_grad():
        for name, tensor in learnables.items():
            tensor.copy_(tensors[f"learnable.{name}"])
            if f"momentum.{name}" in tensors:
                optimizer.state[tensor]["momentum_buffer"] = tensors[f"momentum.{name}"].to(tensor)
    device = next(iter(learnables.values())).device
    best = {name.removeprefix("best."): t.to(device) for name, t in tensors.items() if name.startswith("best.")}
    return Distilled(best, metadata["history"], metadata["validation"], metadata["seconds"])


def _differences(before: Any, now: Any, under: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{under}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{under} {before!r} -> {now!r}"]
