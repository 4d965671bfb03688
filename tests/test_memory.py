"""Memory: its peak, what is kept of it, and errors that name the parameter which needs less of it."""

import mmap
import subprocess
import sys

import numpy as np
import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ld3m.models.train_prior import fit_denoiser
from ld3m.pipeline import ablations
from ld3m.pipeline.cells import Cell, cell_of
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.params import PRIORS
from ld3m.pipeline.profiles import load_params
from ld3m.runtime.memory import OutOfMemory, explain_out_of_memory, forget_peak, peak_gib


def exhaust(*_, **__):
    """What torch does where there is no memory, on any machine."""
    torch.empty(2**50)


@pytest.mark.parametrize(
    "error",
    [
        None,  # torch's
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        TerminatedWorkerError("A worker process was unexpectedly terminated"),
    ],
)
def test_memory_that_runs_out_names_what_to_lower_in_the_inner_block(error):
    with pytest.raises(OutOfMemory, match=r"^\[Errno 12\] memory ran out \(.*\): lower a\.batch or b\.batch$"):
        with explain_out_of_memory("outer"), explain_out_of_memory("a.batch", "b.batch"):
            if error:
                raise error
            exhaust()


@pytest.mark.parametrize("error", [RuntimeError("shapes"), FileNotFoundError("a file"), ValueError("out of memory")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, explain_out_of_memory("a.batch"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "objective, space, settings",
    [
        ("dm", "ld3m", "spaces.ld3m.uncheckpointed_steps or spaces.ld3m.render_batch or objectives.dm.real_batch"),
        ("mtt", "glad", "spaces.glad.render_batch or objectives.mtt.student_batch"),
    ],
)
def test_a_cell_names_the_batches_of_its_space_and_its_objective(monkeypatch, objective, space, settings):
    monkeypatch.setattr(Experiment, "synthetic", exhaust)
    with pytest.raises(OutOfMemory, match=f": lower {settings}"):
        Experiment(load_params()).distill(Cell("mnist5k", "any", "main", objective, space, 1, prior=PRIORS[space]))


def test_evaluating_a_control_an_ablation_and_training_a_prior_name_theirs(monkeypatch):
    experiment = Experiment(load_params({"processes": 1}))
    params, data = experiment.params, experiment.dataset
    of_pipeline = ("experiment.evaluate_sets", "experiment.Experiment.control", "ablations.distill")
    for exhausted in (*(f"pipeline.{name}" for name in of_pipeline), "models.train_prior.encode_split"):
        monkeypatch.setattr(f"ld3m.{exhausted}", exhaust)
    with pytest.raises(OutOfMemory, match=r"lower evaluate\.recipe\.batch or that of evaluate\.recipe_overrides"):
        experiment.evaluate([], data.test)
    with pytest.raises(OutOfMemory, match=r"lower spaces\.ld3m\.render_batch"):
        experiment.images_of(cell_of(params, "iteration0-1"))
    with pytest.raises(OutOfMemory, match=r"spaces\.ld3m\.render_batch or objectives\.dm\.real_batch or processes"):
        ablations.measure(params, "dm", "ld3m", 1)
    with pytest.raises(OutOfMemory, match=r"lower prior\.denoiser\.batch"):
        fit_denoiser(experiment.prior, data.train, **params.prior.denoiser.training(), seed=0)


def test_the_peak_is_that_since_it_was_forgotten():
    if not forget_peak():
        pytest.skip("the system cannot")
    before = peak_gib()
    with mmap.mmap(-1, 2**28) as pages:  # 0.25 GiB, gone at once: the allocator, which may keep it, is not asked
        np.frombuffer(pages, np.uint8).sum()
    assert 0.2 < peak_gib() - before < 0.4
    assert forget_peak() and peak_gib() - before < 0.1


LAYERS = """
import resource
import {module}
import torch
from torch.nn.functional import conv2d, group_norm

torch.set_num_threads(1)
x, weight = torch.randn(64, 48, 32, 32), torch.randn(48, 48, 3, 3)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        group_norm(conv2d(x, weight, padding=1).relu(), 48)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_the_pipeline_keeps_the_memory_that_it_frees():
    """In the second round few pages are asked from the system; without, those of every layer."""
    asked = [
        int(subprocess.check_output([sys.executable, "-c", LAYERS.format(module=module)]))
        for module in ("ld3m.pipeline", "ld3m")
    ]
    assert asked[0] < asked[1] / 5, asked
