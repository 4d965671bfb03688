import math
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import ld3m.method.distill
from ld3m.method.distill import distill
from ld3m.runtime.checkpoint import Checkpoint

ITERATIONS = 7
RATES = {"z": 0.05, "c": 0.02, "student_lr": 0.01}
TARGETS = torch.randn(ITERATIONS, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def start():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass
class Codes:
    """Images z * c: `z` (4, 3) and the scalar `c` are learned."""

    z: torch.Tensor = field(default_factory=lambda: start().requires_grad_())
    c: torch.Tensor = field(default_factory=lambda: torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    labels = torch.tensor([0, 0, 1, 1])
    asked: list = field(default_factory=list)  # the steps of all calls

    @property
    def learnables(self):
        return {"z": self.z, "c": self.c}

    def render(self, step=None):
        self.asked.append(step)
        return self.z * self.c

    def tensors(self):
        return {"z": self.z, "c": self.c, "fixed": torch.ones(2)}


@dataclass
class Squares:
    """(student_lr * images - target of the step)^2, summed; `student_lr` is learned."""

    student_lr: torch.Tensor = field(default_factory=lambda: torch.tensor(0.8, dtype=torch.float64, requires_grad=True))

    @property
    def learnables(self):
        return {"student_lr": self.student_lr}

    def __call__(self, images, labels, *, step):
        assert not images.requires_grad and labels.tolist() == [0, 0, 1, 1]
        images = images.clone().requires_grad_()
        loss = ((self.student_lr * images - TARGETS[step]) ** 2).sum()
        grad_images, self.student_lr.grad = torch.autograd.grad(loss, [images, self.student_lr])
        return loss.item(), grad_images


def by_hand(momentum):
    """The values of (z, c, student_lr) before every step and after the last, with every derivative written out."""
    z, c, lr = start(), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    values, velocities, losses, norms = [(z, c, lr)], [0, 0, 0], [], []
    for target in TARGETS:
        residual = lr * z * c - target
        losses.append((residual**2).sum().item())
        grads = [2 * residual * lr * c, (2 * residual * lr * z).sum(), (2 * residual * z * c).sum()]
        norms.append([grad.norm().item() for grad in grads])
        velocities = [momentum * velocity + grad for velocity, grad in zip(velocities, grads, strict=True)]
        z, c, lr = (
            value - RATES[name] * velocity for name, value, velocity in zip(RATES, (z, c, lr), velocities, strict=True)
        )
        values.append((z, c, lr))
    return values, losses, norms


def accuracy_of(images):
    return [torch.sigmoid(images.sum()).item()]


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "checkpoints" / "cell.safetensors"


@pytest.fixture
def run(checkpoint):
    def run(synthetic=None, objective=None, **changes):
        options = dict(iterations=ITERATIONS, learning_rates=RATES, momentum=0.7, validation_checks=3)
        options |= {"validate": accuracy_of, "checkpoint": Checkpoint(checkpoint, minutes=0)} | changes
        result = distill(synthetic or Codes(), objective or Squares(), **options)
        options["checkpoint"].remove()  # the caller's part, once the result is safe
        return result

    return run


def steps_in(checkpoint):
    """The number of steps after which a state was written."""
    states = []
    Checkpoint(checkpoint).resume(states.append)
    return len(states[0]["run"]["history"])


class Killed(Exception):
    pass


def killed_after(step):
    """A `progress` that raises when a step is done."""

    def progress(total, *, start, **_):
        for now in range(start, total):
            yield now
            if now == step:
                raise Killed

    return progress


def assert_same(one, other):
    assert (one.history, one.validation) == (other.history, other.validation)
    assert one.best.keys() == other.best.keys()
    for name, tensor in one.best.items():
        torch.testing.assert_close(other.best[name], tensor, rtol=0, atol=0)


def test_adam_has_rates_that_fall_as_a_cosine(run):
    synthetic, objective = Codes(), Squares()
    run(synthetic, objective, optimizer="adam")
    values = [start(), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)]
    moments = [(0.0, 0.0)] * 3
    for step, target in enumerate(TARGETS):
        z, c, lr = values
        residual = lr * z * c - target
        grads = [2 * residual * lr * c, (2 * residual * lr * z).sum(), (2 * residual * z * c).sum()]
        moments = [(0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2) for (m, v), g in zip(moments, grads, strict=True)]
        decay = (1 + math.cos(math.pi * step / ITERATIONS)) / 2
        for k, (m, v) in enumerate(moments):
            m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            values[k] = values[k] - decay * list(RATES.values())[k] * m / (v**0.5 + 1e-8)
    torch.testing.assert_close((synthetic.z, synthetic.c, objective.student_lr), tuple(values), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_the_loop_is_sgd_with_momentum(run, momentum):
    synthetic, objective = Codes(), Squares()
    rising = iter(range(100))
    result = run(synthetic, objective, momentum=momentum, validate=lambda images: [next(rising)])
    values, losses, norms = by_hand(momentum)
    torch.testing.assert_close((synthetic.z, synthetic.c, objective.student_lr), values[-1], rtol=1e-12, atol=1e-12)
    assert [record["step"] for record in result.history] == list(range(ITERATIONS))
    assert [step for step in synthetic.asked if step is not None] == list(range(ITERATIONS))
    assert [record["loss"] for record in result.history] == pytest.approx(losses, rel=1e-12)
    for record, expected in zip(result.history, norms, strict=True):
        assert [record[f"grad_norm_{name}"] for name in RATES] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "iterations, validation_checks, expected", [(7, 3, [0, 2, 4, 7]), (7, 1, [0, 7]), (2, 5, [0, 1, 2])]
)
def test_validation_is_asked_at_the_start_evenly_between_and_at_the_end(run, iterations, validation_checks, expected):
    asked = []

    def validate(images):
        assert not images.requires_grad
        asked.append(images)
        return [0.5]

    result = run(iterations=iterations, validation_checks=validation_checks, validate=validate)
    assert [record["iteration"] for record in result.validation] == expected and len(asked) == len(expected)
    values, _, _ = by_hand(0.7)
    for iteration, images in zip(expected, asked, strict=True):
        z, c, _ = values[iteration]
        torch.testing.assert_close(images, z * c)


@pytest.mark.parametrize(
    "means, chosen",
    [([0.9, 0.1, 0.2, 0.3], 0), ([0.1, 0.2, 0.9, 0.3], 4), ([0.1, 0.2, 0.3, 0.9], 7), ([0, 0.5, 0.5, 0.5], 2)],
)
def test_the_iteration_with_the_best_mean_is_kept_and_the_first_of_equals(run, means, chosen):
    given = iter([[0.0, 2 * mean] if k % 2 else [mean, mean] for k, mean in enumerate(means)])
    result = run(validate=lambda images: next(given))
    assert [record["accuracy"] for record in result.validation] == means
    assert result.chosen["iteration"] == chosen and len(result.chosen["accuracies"]) == 2
    z, c, student_lr = by_hand(0.7)[0][chosen]
    expected = {"z": z, "c": c, "student_lr": student_lr, "images": z * c, "fixed": torch.ones(2)}
    assert result.best.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result.best[name], tensor)
        assert not result.best[name].requires_grad


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("steps", [(0,), (ITERATIONS - 1,), (3, 4)])
def test_killed_and_resumed_gives_the_same_bits(run, checkpoint, monkeypatch, steps, optimizer):
    run = partial(run, optimizer=optimizer)
    undisturbed = run()
    for step in steps:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(ld3m.method.distill, "progress", killed_after(step))
            run()
        assert checkpoint.exists()
    codes = Codes()
    assert_same(run(codes), undisturbed)
    assert [step for step in codes.asked if step is not None] == list(range(steps[-1] + 1, ITERATIONS))
    assert not list(checkpoint.parent.iterdir())


def test_the_best_iteration_outlives_a_restart_and_no_check_is_repeated(run):
    falling = iter([0.9, 0.5, 0.4, 0.3])
    with pytest.raises(ValueError, match="step 3"):
        run(objective=Wrong(), validate=lambda images: [next(falling)], validation_checks=ITERATIONS)
    result = run(validate=lambda images: [0.1], validation_checks=ITERATIONS)
    assert [record["accuracy"] for record in result.validation] == [0.9, 0.5, 0.4, 0.3] + [0.1] * 4
    assert result.chosen["iteration"] == 0
    torch.testing.assert_close(result.best["images"], 0.5 * start())


def test_seconds_are_those_of_the_iterations_also_over_a_restart(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ld3m.method.distill, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Squares):
        def __call__(self, *arguments, **options):
            now[0] += 3.0
            return super().__call__(*arguments, **options)

    def validate(images):
        now[0] += 100.0
        return accuracy_of(images)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(ld3m.method.distill, "progress", killed_after(4))
        run(objective=Slow(), validate=validate)
    assert run(objective=Slow(), validate=validate).seconds == 3.0 * ITERATIONS


@dataclass
class Wrong(Squares):
    """At step 3, one wrong value."""

    what: str = "loss"

    def __call__(self, images, labels, *, step):
        loss, grad_images = super().__call__(images, labels, step=step)
        if step == 3:
            loss = {"loss": math.nan, "infinite loss": math.inf}.get(self.what, loss)
            grad_images[0, 0] = math.nan if self.what == "gradient" else grad_images[0, 0]
            self.student_lr.grad *= math.inf if self.what == "student_lr" else 1
            self.student_lr.grad += 1000 if self.what == "falls" else 0
        return loss, grad_images


NOT_FINITE = r"step 3: {.*} not finite; lower learning_rates. Last written: .*cell.safe"
BELOW_ZERO = r"step 3: student_lr=-.*lower learning_rates\['student_lr'\]"


@pytest.mark.parametrize(
    "what, reason",
    [*((what, NOT_FINITE) for what in ("loss", "infinite loss", "gradient", "student_lr")), ("falls", BELOW_ZERO)],
)
def test_what_is_not_finite_or_below_zero_stops_the_run_and_not_the_checkpoint(run, checkpoint, what, reason):
    undisturbed = run()
    synthetic, objective = Codes(), Wrong(what=what)
    with pytest.raises(ValueError, match=reason):
        run(synthetic, objective)
    if reason == NOT_FINITE:
        torch.testing.assert_close((synthetic.z, synthetic.c, objective.student_lr), by_hand(0.7)[0][3])
    assert steps_in(checkpoint) == 3
    assert_same(run(), undisturbed)


@pytest.mark.parametrize("rates", [{"z": 0.1, "student_lr": 0.1}, RATES | {"z_T": 0.1}])
def test_every_learnable_has_a_learning_rate_and_no_other_has(run, rates):
    with pytest.raises(ValueError, match=r"learning_rates has \['.*needed are \['c', 'student_lr', 'z'\]"):
        run(learning_rates=rates)
