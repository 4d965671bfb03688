"""Every long stage is killed at random moments and ended by a signal; what comes out is what an undisturbed run gives.

A moment is a number of calls: a run is killed when its main thread has made so many calls of functions, in Python or of
C. So every call has its turn. The moments are always the same, unless the environment's LD3M_KILLS draws others, as in
`make test-all`. Children are forked from one server, which has imported what they need.
"""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX, make_dataset, make_prior, start_ld3m
from executing import run_notebook
from safetensors.torch import load

from ld3m.evaluation.evaluate import EvaluationJob, evaluate_sets
from ld3m.evaluation.experts import train_experts
from ld3m.method.distill import distill
from ld3m.method.objectives import OBJECTIVES
from ld3m.models.gan import build_generator, save_generator
from ld3m.models.networks import build
from ld3m.models.prior_io import save_prior
from ld3m.models.train_gan import fit_gan
from ld3m.models.train_prior import fit_autoencoder, fit_denoiser
from ld3m.pipeline import profiles
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint, Interrupted
from ld3m.runtime.storage import new_folder, write_json, write_tensors

KILLS = os.environ.get("LD3M_KILLS", "")
NETWORK = partial(build, channels=1, size_px=SIZE_PX, classes=CLASSES)
CONVNET = partial(NETWORK, "convnet", width=4, depth=1)
RECIPE = dict(
    epochs=2, batch=4, learning_rate=0.01, momentum=0.9, weight_decay=5e-4, warm_up=True, ema_decay=0.9, strategy="crop"
)  # fmt: skip


def prior(keep, out):
    trained, split, shared = make_prior(), make_dataset().train, dict(steps=5, batch=4, learning_rate=1e-3, seed=0)
    fit_autoencoder(trained, split, continuous_steps=2, checkpoint=keep("autoencoder"), **shared)
    fit_denoiser(trained, split, null_share=0.1, ema_decay=0.5, checkpoint=keep("denoiser"), **shared)
    save_prior(trained, out, dtype=torch.float32)


def gan(keep, out):
    generator = build_generator(channels=1, classes=CLASSES, noise_width=4, w_width=4, widths=(4, 4, 4), seed=0)
    arguments = dict(steps=6, batch=8, learning_rate=1e-2, r1=1.0, r1_every=2, ema_decay=0.5, strategy="flip", seed=0)
    fit_gan(generator, make_dataset().train, discriminator_widths=(4, 4), checkpoint=keep("gan"), **arguments)
    save_generator(generator, out)


def trajectories(keep, out, **where):
    arguments = dict(count=3, epochs=2, batch=4, learning_rate=0.05, strategy="crop", seed=0, processes=1) | where
    train_experts(out, make_dataset(), new_network=CONVNET, checkpoint=keep("trajectories"), **arguments)


def distill_dm(keep, out):
    train, given = make_dataset().train, dict(normalization=NORMALIZATION, threads=1, seed=0)
    x, labels, prior = train.x(torch.arange(3)), train.labels[:3], make_prior().freeze_()
    synthetic = start_ld3m(x, labels, prior, steps=2, guidance=2.0, skip="mean", noise="redrawn", render_batch=2)
    objective = OBJECTIVES["dm"](train, new_network=CONVNET, experts=None, strategy="crop", real_batch=4, **given)
    given = dict(iterations=5, momentum=0.5, validation_checks=2, validate=lambda images: [images.std().item()])
    run = distill(synthetic, objective, learning_rates={"z_T": 0.3, "c": 0.3}, checkpoint=keep("cell"), **given)
    with new_folder(out) as folder:
        write_tensors(folder / "distilled.safetensors", run.best, {"history": run.history, "checks": run.validation})


def evaluate(keep, out, **where):
    dataset, networks = make_dataset(), {"convnet": CONVNET, "alexnet": partial(NETWORK, "alexnet", width=4)}
    images = dataset.normalization.normalize(dataset.train.x())
    recipes = dict.fromkeys(networks, RECIPE)
    job = EvaluationJob(images.__getitem__, dataset.train.labels, recipes, seeds=range(2), seed=0)
    shared = dict(normalization=NORMALIZATION, networks=networks, processes=1) | where
    write_json(out / "scores.json", evaluate_sets([job], dataset.test, checkpoint=keep("evaluate"), **shared))


STAGES = [prior, gan, trajectories, distill_dm, evaluate]
NEVER = 0
INTERRUPTED = 7  # exit status


@contextlib.contextmanager
def signalled(after, number, counted):
    """Sends this process a signal after so many calls inside the block, and writes how many a whole block makes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), number)

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
    counted.write_text(str(calls))


def attempt(stage, root, after, number, threads):
    """Runs a stage, and sends this process a signal after so many calls; what it prints goes to a file."""

    def keep(name):
        kept.append(Checkpoint(root / f"checkpoints/{name}.safetensors", minutes=0, configuration={"of": name}))
        return kept[-1]

    kept = []
    os.environ["DVC_STAGE"] = "test"
    torch.set_num_threads(threads)
    with (root / "log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            with signalled(after, number, root / "calls"):
                stage(keep, root / "out")
                for checkpoint in kept:
                    checkpoint.remove()
        except Interrupted:
            sys.exit(INTERRUPTED)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    forkserver._forkserver._stop()  # another test's, which has imported less
    lazy = ("models.unets.unet_2d_condition", "models.autoencoders.vq_model", "schedulers.scheduling_ddim")
    context.set_forkserver_preload(["test_survive", "torch._dynamo", *(f"diffusers.{module}" for module in lazy)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_WAIT_POLICY", "passive")  # threads that spin stall one another beside other work
        forkserver.ensure_running()
    return context


def run(server, stage, root, *, after=NEVER, number=signal.SIGKILL, threads=1):
    """Runs a stage in a child and gives its exit status."""
    shutil.rmtree(root / "out", ignore_errors=True)  # as DVC does before a stage
    child = server.Process(target=attempt, args=(stage, root, after, number, threads))
    child.start()
    child.join(500)
    return child.exitcode


def content(folder):
    """The bytes of every file, by name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """What a stage writes when nothing happens, and how many calls it makes."""

    @cache
    def undisturbed(stage):
        root = tmp_path_factory.mktemp(stage.__name__)
        assert run(server, stage, root) == 0
        return content(root / "out"), int((root / "calls").read_text())

    return undisturbed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_killed_or_ended_by_a_signal_it_resumes_to_the_same_bytes(server, undisturbed, tmp_path, stage, number):
    (expected, calls), draw = undisturbed(stage), random.Random(f"{stage.__name__} {KILLS}")
    is_killed = number == signal.SIGKILL
    moments = [draw.randrange(1, calls) for _ in range(3)] if is_killed else [int(0.8 * calls)]
    ends = [run(server, stage, tmp_path, after=after, number=number) for after in moments]
    assert ends[0] in (-number, INTERRUPTED)
    if ends[-1] != 0:
        assert run(server, stage, tmp_path) == 0
    assert is_killed or "resumes an interrupted run" in (tmp_path / "log").read_text()
    assert content(tmp_path / "out") == expected != {}
    assert content(tmp_path / "checkpoints") == {}


# The prior is trained with Adam, which makes as much of a gradient that is next to zero as of any other.
ROUNDING = {prior: 2e-3, gan: 2e-3, distill_dm: 1e-5}


@pytest.mark.parametrize("stage", ROUNDING, ids=lambda stage: stage.__name__)
def test_on_two_threads_it_is_the_same_within_rounding_and_twice_the_same(server, undisturbed, tmp_path, stage):
    for name in "ab":
        (tmp_path / name).mkdir()
        assert run(server, stage, tmp_path / name, threads=2) == 0
    assert content(tmp_path / "a/out") == content(tmp_path / "b/out") != {}
    for name, data in undisturbed(stage)[0].items():
        if name.endswith("safetensors"):
            one, two = load(data), load((tmp_path / "a/out" / name).read_bytes())
            difference = sum((one[key] - two[key]).square().sum() for key in one)
            assert difference <= ROUNDING[stage] ** 2 * sum(tensor.square().sum() for tensor in one.values()), name


NOTEBOOKS = {  # notebook, parameters, outputs under runs/smoke; in an order in which they can run
    "prior": ("00_prior", {}, ["prior", "prior-check"]),
    "gan": ("00_gan", {}, ["gan", "gan-check"]),
    "trajectories": ("01_trajectories", {}, ["trajectories"]),
    "distill": ("02_distill", {"cell": "mtt-ld3m-1"}, ["main/distilled/mtt-ld3m-1"]),
    "distill_runs": ("02_distill", {"cell": "mtt-glad-1"}, ["report/distilled/mtt-glad-1"]),
    "evaluate": ("03_evaluate", {"cell": "mtt-ld3m-1"}, ["main/scores/mtt-ld3m-1"]),
    "full_data": ("03_evaluate", {"cell": "full_data"}, ["main/scores/full_data"]),
    "gradient_norms": ("04_gradient_norms", {}, ["gradient_norms.json"]),
    "ablation": ("04_ablations", {"ablation": "steps"}, ["ablations/steps.json"]),
}


def execute(stage, keep, out):
    """Runs the notebook of a stage, with its outputs beside `out`."""
    root, (notebook, parameters, outputs) = out.parent, NOTEBOOKS[stage]
    for output in outputs:  # as DVC does before a stage
        place = root / "runs/smoke" / output
        place.unlink() if place.is_file() else shutil.rmtree(place, ignore_errors=True)
    os.environ |= {"DVC_STAGE": stage, "MPLBACKEND": "Agg"}
    paths.ROOT = root
    for name in ("load_params", "ablation_settings"):
        setattr(profiles, name, partial(getattr(profiles, name), path=root / "params.yaml"))
    run_notebook(Path(__file__).parents[1] / "notebooks" / f"{notebook}.ipynb", parameters)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What all stages write when nothing happens, and how many calls each makes."""
    root, calls = tmp_path_factory.mktemp("whole"), {}
    profiles.apply_profiles("smoke", path=root / "params.yaml")
    for stage in NOTEBOOKS:
        assert run(server, partial(execute, stage), root) == 0, (root / "log").read_text()
        calls[stage] = int((root / "calls").read_text())
    assert content(root / "checkpoints") == {}
    return root, calls


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_a_notebook_that_is_killed_goes_on_and_writes_the_same_bytes(server, whole, tmp_path, stage):
    root, draw, (expected, calls) = tmp_path / "killed", random.Random(f"{stage} {KILLS}"), whole
    shutil.copytree(expected, root)
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        after = draw.randrange(calls[stage] // 4, calls[stage])
        run(server, partial(execute, stage), root, after=after, number=number)
    assert run(server, partial(execute, stage), root) == 0, (root / "log").read_text()
    assert content(root / "runs") == content(expected / "runs")
    assert content(root / "checkpoints") == {}
