"""The state of a training of many steps: what it consists of, its losses, and how it goes on after an interruption."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ld3m.runtime.checkpoint import State

CHECKED_STEPS = 100  # after which losses are looked at: reading one waits for the device


@dataclass
class TrainingState:
    """`parts` (networks, averages, optimizers, schedules) have `state_dict` and `load_state_dict`.

    `losses` (steps,), or (steps, n) of n losses, holds zeros where no step was made yet; `done` counts those made.
    `advice` says what to change where a loss is not finite.
    """

    parts: dict[str, Any]
    losses: Tensor
    advice: str
    done: int = 0

    def record(self, loss: Tensor) -> None:
        """Ends a step whose loss was () or (n,)."""
        self.losses[self.done] = loss.detach()
        self.done += 1
        if self.done % CHECKED_STEPS == 0 or self.done == len(self.losses):
            self._require_finite()

    def state(self) -> State:
        """ValueError where a loss or a weight is not finite, so that no such state is kept."""
        self._require_finite()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"parts": parts, "losses": self.losses, "done": self.done}

    def restore(self, state: State) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.losses.copy_(state["losses"])
        self.done = state["done"]

    def status(self) -> str:
        """The mean losses of the last steps, in a few words."""
        recent = self.losses[max(0, self.done - 100) : self.done].mean(dim=0)
        return "loss " + ", ".join(f"{loss:.4f}" for loss in recent.flatten().tolist())

    def _require_finite(self) -> None:
        require_finite(self.losses, advice=self.advice)
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and not all(weight.isfinite().all() for weight in part.parameters()):
                raise ValueError(f"step {self.done - 1}: the {name} has weights that are not finite; {self.advice}")


def require_finite(losses: Tensor, *, advice: str) -> None:
    """ValueError with the first step whose loss, of (steps,) or (steps, n), is not finite."""
    broken = (~losses.isfinite()).nonzero()
    if len(broken):
        first = tuple(broken[0])
        raise ValueError(f"step {int(first[0])}: the loss is {losses[first].item()}; {advice}")
