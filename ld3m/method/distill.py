"""The loop: render, match, step. Validation chooses the iteration; a killed run, resumed, gives the same bits."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ld3m.runtime.checkpoint import Checkpoint, State
from ld3m.runtime.progress import progress


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
    """What a run has learned so far."""

    best: dict[str, Tensor] = field(default_factory=dict)  # images and all tensors of the best iteration
    history: list[dict[str, float]] = field(default_factory=list)  # of every step: loss, gradient norms
    validation: list[dict[str, Any]] = field(default_factory=list)  # of every check: iteration, accuracies, their mean
    seconds: float = 0.0  # that the iterations took, without the checks

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
    validation_checks: int,
    checkpoint: Checkpoint,
    optimizer: Literal["sgd", "adam"] = "sgd",
) -> Distilled:
    """Learn a synthetic set; the iteration with the best validation accuracy is kept.

    Parameters
    ----------
    learning_rates, momentum, optimizer
        One rate for every learnable; the momentum of SGD. The rates of Adam fall to 0 as a cosine.
    validate
        Called with normalized images (N, C, H, W), gives accuracies in [0, 1], whose mean decides.
    validation_checks
        Number of further calls of `validate`, evenly spaced after the one at iteration 0, the last at the end. With 0
        there is one call, at the end.
    checkpoint
        An interrupted run is resumed from it, with the same bits. The caller removes it once the result is safe.
    """
    learnables = synthetic.learnables | objective.learnables
    if learning_rates.keys() != learnables.keys():
        raise ValueError(f"learning_rates has {sorted(learning_rates)}; needed are {sorted(learnables)}")
    groups = [{"params": [tensor], "lr": learning_rates[name]} for name, tensor in learnables.items()]
    stepper = torch.optim.Adam(groups) if optimizer == "adam" else torch.optim.SGD(groups, momentum=momentum)
    run = Distilled()

    def state() -> State:
        return {"run": vars(run), "learnables": learnables, "optimizer": stepper.state_dict()}

    def restore(former: State) -> None:
        vars(run).update(former["run"])
        with torch.no_grad():
            for name, tensor in learnables.items():
                tensor.copy_(former["learnables"][name])
        run.best = {name: tensor.to(next(iter(learnables.values())).device) for name, tensor in run.best.items()}
        stepper.load_state_dict(former["optimizer"])

    checks = {iterations * check // validation_checks for check in range(validation_checks)} | {iterations}

    def check(iteration: int) -> None:
        if iteration in checks and all(record["iteration"] != iteration for record in run.validation):
            with torch.no_grad():
                images = synthetic.render()
            accuracies = validate(images)
            mean = sum(accuracies) / len(accuracies)
            with checkpoint.step(state):
                if not run.validation or mean > run.chosen["accuracy"]:
                    tensors = synthetic.tensors() | objective.learnables | {"images": images}
                    run.best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
                run.validation.append({"iteration": iteration, "accuracy": mean, "accuracies": accuracies})

    with checkpoint:
        checkpoint.resume(restore)
        for step in progress(iterations, label="distill", start=len(run.history), status=lambda: _status(run)):
            check(step)
            with checkpoint.step(state):
                began = time.perf_counter()
                stepper.zero_grad(set_to_none=True)
                images = synthetic.render(step=step)
                loss, grad_images = objective(images.detach(), synthetic.labels, step=step)
                images.backward(grad_images)
                record = {"step": step, "loss": loss} | {
                    f"grad_norm_{name}": tensor.grad.norm().item() for name, tensor in learnables.items()
                }
                if not all(map(math.isfinite, record.values())):
                    raise ValueError(f"step {step}: {record} not finite; lower learning_rates. {checkpoint.status()}")
                if optimizer == "adam":
                    for group, name in zip(stepper.param_groups, learnables, strict=True):
                        group["lr"] = learning_rates[name] * 0.5 * (1 + math.cos(math.pi * step / iterations))
                stepper.step()
                for name, tensor in objective.learnables.items():
                    if tensor.item() <= 0:
                        raise ValueError(f"step {step}: {name}={tensor.item():.2g}; lower learning_rates[{name!r}]")
                run.history.append(record)
                run.seconds += time.perf_counter() - began
        check(iterations)
    return run


def _status(run: Distilled) -> str:
    checked = f", validation {run.validation[-1]['accuracy']:.3f}" if run.validation else ""
    return f"loss {run.history[-1]['loss']:.4g}{checked}"
