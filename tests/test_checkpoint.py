"""What is kept comes back; a signal waits for the step; one process a run; broken files and losses lose nothing."""

import hashlib
import io
import math
import multiprocessing
import signal
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSES, make_prior, make_split

import ld3m.runtime.checkpoint
from ld3m.models.gan import build_generator
from ld3m.models.train_gan import fit_gan
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser
from ld3m.runtime.checkpoint import Checkpoint, Interrupted
from ld3m.runtime.training_state import CHECKED_STEPS, TrainingState

STATE = {
    "network": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.tensor([0.5, 3.0], dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, "0": {"step": torch.tensor(4.0)}}, "betas": (0.9, 0.99)},
    "empty": torch.zeros(0, 2, dtype=torch.int64),
    "history": [{"loss": 0.1 + 0.2, "norm": math.inf, "name": "ä"}, None, True, [], {}],
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "checkpoints" / "run.safetensors"


@pytest.fixture
def made(file):
    """A checkpoint whose states were written, one after the other."""

    def make(*states, **changes):
        with Checkpoint(file, minutes=0, **changes) as checkpoint:
            for state in states:
                with checkpoint.step(lambda state=state: state):
                    pass
        return checkpoint

    return make


def read(checkpoint):
    states = []
    checkpoint.resume(states.append)
    return states[0] if states else None


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_state_comes_back_as_it_was_and_is_removed_with_its_folder(made, file):
    assert read(Checkpoint(file)) is None and read(Checkpoint()) is None
    checkpoint = made([1], STATE)
    state = read(checkpoint)
    torch.testing.assert_close(state.pop("network"), STATE["network"], rtol=0, atol=0)
    torch.testing.assert_close(state.pop("empty"), STATE["empty"])
    assert state == {name: STATE[name] for name in ("optimizer", "history")}  # JSON would make two keys one
    checkpoint.folder.mkdir()
    (checkpoint.folder / "large").touch()
    for _ in range(2):
        checkpoint.remove()
        assert not list(file.parent.iterdir())


def test_a_changed_byte_is_found_and_a_pickle_of_other_types_is_not_read(made, file):
    checkpoint, buffer = made({"a": torch.ones(50)}), io.BytesIO()
    whole = file.read_bytes()
    torch.save({"configuration": None, "state": file}, buffer)  # a Path: reading it calls what the file names
    pickled = buffer.getvalue()
    for content in (whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], hashlib.sha256(pickled).digest() + pickled):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="run.safetensors is broken or not of this run .*: to start over delete"):
            read(checkpoint)


def test_another_configuration_and_values_that_do_not_fit_are_named(made, file):
    made([1], configuration={"same": 1, "a": {"b": 1, "c": (2, 3)}, "gone": 0.5})
    same = {"same": 1, "a": {"b": 1, "c": [2, 3]}, "gone": 0.5, "new": None}
    with pytest.raises(ValueError, match=r"not of this run \(KeyError.*delete .*run"):
        Checkpoint(file, configuration=same).resume(lambda state: {}["weight"])
    changed = r"a.b 1 -> 2, a.c \[2, 3\] -> \[2\], gone 0.5 -> None"
    with pytest.raises(ValueError, match=rf"changed since: {changed}\. Restore .* or to start over delete .*run"):
        read(Checkpoint(file, configuration={"same": 1, "a": {"b": 2, "c": [2]}}))
    assert read(Checkpoint(file, configuration=same)) == [1]


def test_the_state_is_written_every_some_minutes(file, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(ld3m.runtime.checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Checkpoint(file, minutes=2) as checkpoint:
        for k in range(5):
            with checkpoint.step(lambda k=k: k):
                now[0] += 60
            written.append(read(checkpoint))
    assert written == [None, 1, 1, 3, 3] and read(checkpoint) == 4


def test_a_step_is_finished_written_and_the_run_ended(file):
    steps = []
    message = "ended by a signal. Last written: .*run.safetensors; the same command resumes"
    with pytest.raises(Interrupted, match=message), Checkpoint(file) as checkpoint:
        for step in range(5):
            with checkpoint.step(lambda: steps):
                if step == 2:
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGTERM)
                    assert not file.exists()
                steps.append(step)
    assert steps == read(checkpoint) == [0, 1, 2]


def test_a_second_ctrl_c_does_not_wait_for_the_step(file):
    kept = []
    with pytest.raises(Interrupted, match="Nothing was written: the same"), Checkpoint(file) as checkpoint:
        with checkpoint.step(lambda: kept):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # as a kernel is ended, by SLURM too
                signal.raise_signal(number)
            kept.append(0)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("not ended")
    assert kept == [0]


def test_a_signal_at_any_call_of_a_block_ends_it_with_what_is_done(file):
    before, edges = handlers(), [("return", Checkpoint.__enter__.__code__), ("call", Checkpoint.__exit__.__code__)]

    def block(after):
        """What was done when the signal came at so many calls, or None where there are fewer."""
        calls, done = 0, []

        def count(frame, event, argument):
            nonlocal calls
            is_heard = getattr(signal.getsignal(signal.SIGTERM), "__func__", None) is Checkpoint._on_signal
            calls += is_heard and (event, frame.f_code) not in edges
            if calls == after:
                calls += 1
                signal.raise_signal(signal.SIGTERM)

        sys.setprofile(count)
        try:
            with Checkpoint(file, minutes=0) as checkpoint:
                for step in range(2):
                    with checkpoint.step(lambda: done):
                        done.append(step)
        except Interrupted:
            return done
        finally:
            sys.setprofile(None)
        assert calls < after, "the signal was not heard"
        return None

    after, found = 0, []
    while (done := block(after := after + 1)) is not None:
        assert handlers() == before and not file.with_suffix(".lock").exists()
        assert (read(Checkpoint(file)) if file.exists() else []) == done
        Checkpoint(file).remove()
        found.append(len(done))
    assert set(found) == {0, 1, 2} and len(found) > 50


def test_without_a_file_signals_do_what_they_did_before_and_blocks_can_be_nested(file):
    before = handlers()
    with Checkpoint() as checkpoint, checkpoint.step(dict):
        assert handlers() == before
    with Checkpoint(file), Checkpoint(file.with_name("inner.safetensors")):
        assert handlers() != before
    assert handlers() == before


def test_a_thread_keeps_its_state_too(made):
    thread = threading.Thread(target=made, args=([1],))
    thread.start()
    thread.join()
    assert read(made()) == [1]


def hold(file, ready):
    with Checkpoint(file):
        ready.set()
        time.sleep(60)


def test_a_second_run_is_refused_changes_nothing_and_begins_when_the_first_is_killed(made, file):
    made([1])
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    child = context.Process(target=hold, args=(file, ready))
    child.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match="another process runs on .*run.safetensors: wait for it or end it"):
        made([2])
    with Checkpoint(file.with_name("other.safetensors")):
        pass
    child.kill()
    child.join()
    assert read(made()) == [1]
    assert [path.name for path in file.parent.iterdir()] == ["run.safetensors"]


GAN = partial(build_generator, channels=1, classes=CLASSES, noise_width=4, w_width=4, widths=(4, 4, 4), seed=0)


def training_of(*losses, steps=5):
    network = torch.nn.Linear(2, 1)
    training = TrainingState({"network": network}, losses=torch.zeros(steps), advice="lower the rate")
    for loss in losses:
        training.record(torch.tensor(loss))
    return network, training


@pytest.mark.parametrize("steps", [2, CHECKED_STEPS + 2])
def test_it_stops_soon_and_at_the_end_at_the_latest(steps):
    checked = min(steps, CHECKED_STEPS)
    training_of(*[math.nan] * (checked - 1), steps=steps)
    with pytest.raises(ValueError, match="step 0: the loss is nan"):
        training_of(*[math.nan] * checked, steps=steps)


def test_losses_and_weights_that_are_not_finite_are_no_state():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"step 1: the loss is {value}; lower the rate"):
            training_of(1.0, value, math.nan)[1].state()
    network, training = training_of(1.0)
    assert training.state()["done"] == 1
    with torch.no_grad():
        network.weight[0, 1] = math.inf
    with pytest.raises(ValueError, match="step 0: the network has weights that are not finite; lower the rate"):
        training.state()


@pytest.mark.parametrize(
    "fit, network, options",
    [
        (fit_autoencoder, make_prior, dict(batch=4, continuous_steps=2)),
        (fit_denoiser, make_prior, dict(batch=4, null_share=0.1, ema_decay=0.5)),
        (fit_gan, GAN, dict(batch=8, discriminator_widths=(4, 4), r1=1.0, r1_every=2, ema_decay=0.5, strategy="none")),
    ],
)
def test_a_training_that_diverges_stops_with_the_step_and_keeps_the_last_good_state(tmp_path, fit, network, options):
    checkpoint, name = Checkpoint(tmp_path / "run.safetensors", minutes=0), fit.__name__.removeprefix("fit_")
    with pytest.raises(ValueError, match=rf"^step \d.* finite|the loss is .*(nan|inf).*lower .*{name}") as failed:
        fit(network(), make_split(6, seed=0), steps=9, learning_rate=1e30, seed=0, checkpoint=checkpoint, **options)
    step = int(str(failed.value).split(":")[0].split()[1])
    states = []
    Checkpoint(tmp_path / "run.safetensors").resume(states.append)
    assert [state["done"] for state in states] == ([step] if step else [])
    assert all(state["losses"].isfinite().all() for state in states)
