"""Memory: what is left of it, and errors that name the parameter which needs less of it."""

import resource
import sys
from pathlib import Path

import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ld3m.models.train_prior import fit_denoiser
from ld3m.pipeline import ablations
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime import memory
from ld3m.runtime.memory import (
    TooLittleMemory,
    available_bytes,
    explain_out_of_memory,
    is_out_of_memory,
    limited,
    used_bytes,
)

MIB = 2**20
FOLDERS = {
    2: ("sys/fs/cgroup", "0::{}", "memory.max", "memory.current", "inactive_file"),
    1: (
        "sys/fs/cgroup/memory",
        "4:cpu,memory:{}",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@pytest.fixture
def machine(tmp_path):
    """Writes /proc and /sys of a machine with 8000 MiB available; groups {path: (limit, used, of that forgettable)}."""

    def build(version, groups, inside):
        top, line, limit, used, forgettable = FOLDERS[version]
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {8000 * 1024} kB\n")
        (tmp_path / "proc/self/cgroup").write_text(f"9:name=systemd:/elsewhere\n{line.format(inside)}\n")
        for path, (allowed, taken, inactive) in groups.items():
            folder = tmp_path / top / path.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / limit).write_text(f"{allowed * MIB if isinstance(allowed, int) else allowed}\n")
            (folder / used).write_text(f"{taken * MIB}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{forgettable} {inactive * MIB}\n")
        return available_bytes("cpu", root=tmp_path) / MIB

    return build


@pytest.mark.parametrize("version", FOLDERS)
def test_the_least_of_machine_and_control_groups_is_what_is_left(machine, version):
    free = "max" if version == 2 else 2**33  # version 1 writes a number larger than any memory
    assert machine(version, {"/a/b": (free, 10, 0)}, "/a/b") == 8000
    assert machine(version, {"/a/b": (3000, 1000, 200)}, "/a/b") == 2200
    assert machine(version, {"/a/b": (3000, 1000, 200), "/a": (2000, 1500, 0)}, "/a/b") == 500  # a group around it
    assert machine(version, {"/a/b": (3000, 3100, 0)}, "/a/b") == 0


@pytest.mark.parametrize("version", FOLDERS)
def test_in_a_container_the_own_group_is_the_top(machine, version):
    assert machine(version, {"/": (700, 100, 0)}, "/docker/0123") == 600


def test_without_control_groups_it_is_that_of_the_machine(tmp_path):
    assert available_bytes("cpu", root=tmp_path) > 0
    assert 0 < available_bytes("cpu") and 0 < used_bytes("cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system's limits")
@pytest.mark.parametrize("kind, used", [(resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")])
def test_the_limits_of_the_process_count(kind, used):
    status = Path("/proc/self/status").read_text()
    taken = 1024 * int(status.split(f"{used}:")[1].split()[0])
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (taken + 256 * MIB, hard))
    try:
        left = available_bytes("cpu")
    finally:
        resource.setrlimit(kind, (soft, hard))
    assert 200 * MIB < left <= 256 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system's limits")
def test_what_would_not_fit_is_an_error_and_not_the_end_of_the_process(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 64 * MIB)
    with pytest.raises(RuntimeError) as ran_out, limited("cpu"):
        torch.ones(2048 * MIB, dtype=torch.uint8)  # more than what the C library may have kept
    assert is_out_of_memory(ran_out.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with limited("cpu"):
        torch.ones(16 * MIB, dtype=torch.uint8)


def exhaust(*_, **__):
    """What torch does where there is no memory, on any machine."""
    torch.empty(2**50)


def exhaust_cuda(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("run_out", [exhaust, exhaust_cuda])
def test_memory_that_runs_out_names_what_to_lower(run_out):
    with pytest.raises(TooLittleMemory, match=r"memory ran out \(.*\): lower a\.batch or b\.batch in params\.yaml"):
        with explain_out_of_memory("a.batch", "b.batch"):
            run_out()
    with (
        pytest.raises(TooLittleMemory, match="lower inner in"),
        explain_out_of_memory("outer"),
        explain_out_of_memory("inner"),
    ):
        run_out()


@pytest.mark.parametrize("error", [RuntimeError("shapes"), FileNotFoundError("a file"), ValueError("out of memory")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, explain_out_of_memory("a.batch"):
        raise error
    assert raised.value is error


def test_a_worker_that_the_system_ended_is_taken_for_one_that_ran_out():
    assert is_out_of_memory(TerminatedWorkerError("A worker process was unexpectedly terminated"))


@pytest.mark.parametrize(
    "objective, space, settings",
    [
        ("dm", "ld3m", "spaces.ld3m.uncheckpointed_steps or spaces.ld3m.render_batch or objectives.dm.real_batch"),
        ("dc", "pixel", "objectives.dc.real_batch"),
        ("mtt", "glad", "spaces.glad.render_batch or objectives.mtt.student_batch"),
    ],
)
def test_a_cell_names_the_batches_of_its_space_and_its_objective(monkeypatch, objective, space, settings):
    monkeypatch.setattr(Experiment, "synthetic", exhaust)
    with pytest.raises(TooLittleMemory, match=f": lower {settings} in"):
        Experiment(load_params()).distill(objective, space, 1)


def test_evaluating_a_control_an_ablation_and_training_a_prior_name_theirs(monkeypatch):
    experiment = Experiment(load_params({"processes": 1}))
    monkeypatch.setattr("ld3m.pipeline.experiment.evaluate_sets", exhaust)
    with pytest.raises(TooLittleMemory, match=r"lower evaluate\.recipe\.batch or that of evaluate\.changes"):
        experiment.evaluate([], experiment.dataset.test)
    monkeypatch.setattr(Experiment, "control", exhaust)
    with pytest.raises(TooLittleMemory, match=r"lower spaces\.ld3m\.render_batch in"):
        experiment.images_of("none", "iteration0", 1)
    monkeypatch.setattr(ablations, "distill", exhaust)
    with pytest.raises(TooLittleMemory, match=r"spaces\.ld3m\.render_batch or objectives\.dm\.real_batch or processes"):
        ablations.measure(experiment.params, "dm", "ld3m")
    monkeypatch.setattr("ld3m.models.train_prior._encode_all", exhaust)
    with pytest.raises(TooLittleMemory, match=r"lower prior\.denoiser\.batch in"):
        training = experiment.params.prior.denoiser.training()
        fit_denoiser(experiment.prior, experiment.dataset.train, **training, seed=0)
