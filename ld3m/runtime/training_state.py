"""The state of a training of many steps, which an interrupted run resumes from; losses and weights must be finite."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ld3m.runtime.checkpoint import State

CHECKED_STEPS = 100  # losses are read once for so many steps, since that waits for the device


@dataclass
class TrainingState:
    parts: dict[str, Any]  # networks, averages, optimizers, schedules: with `state_dict` and `load_state_dict`
    losses: Tensor  # (steps,), or (steps, n) of n losses, filled step by step
    advice: str  # what to change if a loss is not finite
    done: int = 0  # steps

    def record(self, loss: Tensor) -> None:
        """End a step with its loss, () or (n,)."""
        self.losses[self.done] = loss.detach()
        self.done += 1
        if self.done % CHECKED_STEPS == 0 or self.done == len(self.losses):
            self._require_finite()

    def state(self) -> State:
        """Return what `restore` takes; ValueError if a loss or a weight is not finite, so that none such is kept."""
        self._require_finite()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"parts": parts, "losses": self.losses, "done": self.done}

    def restore(self, state: State) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.losses.copy_(state["losses"])
        self.done = state["done"]

    def status(self) -> str:
        """Return the mean losses of the last steps, in a few words."""
        recent = self.losses[max(0, self.done - 100) : self.done].mean(dim=0)
        return "loss " + ", ".join(f"{loss:.4f}" for loss in recent.flatten().tolist())

    def _require_finite(self) -> None:
        require_finite(self.losses, advice=self.advice)
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and not all(weight.isfinite().all() for weight in part.parameters()):
                raise ValueError(f"step {self.done - 1}: the {name} has weights that are not finite; {self.advice}")


def require_finite(losses: Tensor, *, advice: str) -> None:
    """Raise ValueError with the first step whose loss, of (steps,) or (steps, n), is not finite."""
    broken = (~losses.isfinite()).nonzero()
    if len(broken):
        first = tuple(broken[0])
        raise ValueError(f"step {int(first[0])}: the loss is {losses[first].item()}; {advice}")
