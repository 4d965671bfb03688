"""Tasks on a Ray cluster: the same bits as on this machine, and a lost worker's task is run again."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ld3m.data.dataset import Dataset, Normalization, Split
from ld3m.evaluation.evaluate import EvaluationJob, evaluate_sets
from ld3m.evaluation.experts import train_experts
from ld3m.models.networks import build
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime import parallel
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.paths import ROOT

NETWORK = partial(build, "convnet", channels=1, size_px=8, classes=3, width=8, depth=1)
RECIPE = dict(epochs=2, batch=8, learning_rate=0.1, strategy="color_crop_rotate")
EVALUATION = RECIPE | dict(momentum=0.9, weight_decay=0.01, warm_up=True, ema_decay=0.5)


def split(count, seed):
    uint8 = torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Split(uint8, torch.arange(count) % 3, ("a", "b", "c"))


DATASET = Dataset("toy", split(24, 0), split(12, 1), split(12, 2), Normalization((0.5,), (0.3,)))


def experts(folder, **where):
    checkpoint = Checkpoint(folder.with_name(f"{folder.name}-checkpoint.safetensors"))
    given = dict(new_network=NETWORK, count=3, seed=0, checkpoint=checkpoint) | RECIPE
    records = train_experts(folder, DATASET, **given, **where)
    return records, {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def scores(**where):
    images = DATASET.normalization.normalize(DATASET.train.x())[:6]
    sets = [EvaluationJob(images.__getitem__, DATASET.train.labels[:6], {"convnet": EVALUATION}, range(3), 0)]
    return evaluate_sets(
        sets, DATASET.test, normalization=DATASET.normalization, networks={"convnet": NETWORK}, **where
    )


def test_one_parameter_sends_tasks_to_a_cluster(tmp_path, monkeypatch):
    """Everything that fans out asks for the cluster, whatever `processes` is."""
    asked = []

    def on_cluster(cluster):
        asked.append(cluster)
        return partial(ThreadPoolExecutor(1).submit, parallel._on_one_thread), 1, wait

    monkeypatch.setattr(parallel, "_on_cluster", on_cluster)
    params = load_params({"cluster": "auto", "processes": 2})
    where = {"cluster": params.trajectories_arguments()["cluster"], "processes": 1}
    experts(tmp_path / "experts", **where)
    experiment = Experiment(params)
    experiment.loaded["dataset"] = DATASET
    monkeypatch.setattr(Experiment, "new_network", lambda self, architecture: NETWORK)
    images = DATASET.normalization.normalize(DATASET.train.x())[:6]
    experiment.evaluate(
        [EvaluationJob(images.__getitem__, DATASET.train.labels[:6], {"convnet": EVALUATION}, range(1), 0)],
        DATASET.test,
    )
    assert asked == ["auto", "auto"]


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"cluster='auto': needs Ray, `pip install -e '.\[cluster\]'`"):
        fan_out(str, [{}], processes=1, cluster="auto", label="tasks")


@pytest.mark.parametrize("is_callers", [False, True])
def test_a_connection_that_the_caller_opened_stays_open(monkeypatch, is_callers):
    is_open = [is_callers]
    ray = SimpleNamespace(
        is_initialized=lambda: is_open[-1],
        init=lambda **given: is_open.append(True),
        shutdown=lambda: is_open.append(False),
        cluster_resources=lambda: {"CPU": 2.0},
        remote=lambda **given: lambda function: function,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert parallel._on_cluster("auto")[1] == 2 and is_open[-1]
    end_workers()
    assert is_open[-1] is is_callers


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one processor each on the loopback interface."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    ray_cluster = pytest.importorskip("ray.cluster_utils")
    started = ray_cluster.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.add_node(num_cpus=1)
    yield started
    end_workers()
    started.shutdown()


@pytest.mark.slow
def test_trajectories_and_evaluation_are_the_same_bits_as_here(cluster, tmp_path):
    local, elsewhere = {"processes": 1}, {"processes": 1, "cluster": cluster.address}
    assert experts(tmp_path / "cluster", **elsewhere) == experts(tmp_path / "here", **local)
    assert scores(**elsewhere) == scores(**local)


def where_it_runs(folder, k):
    import ray

    marker = Path(folder) / str(k)
    if k == 1 and not marker.exists():
        marker.write_text("lost")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    return ray.get_runtime_context().get_node_id(), torch.get_num_threads(), k


@pytest.mark.slow
def test_both_nodes_work_with_one_thread_a_task_and_a_killed_worker_s_task_is_run_again(cluster, tmp_path):
    tasks = [{"folder": tmp_path, "k": k} for k in range(4)]
    results = fan_out(where_it_runs, tasks, processes=1, cluster=cluster.address, label="tasks")
    assert (tmp_path / "1").read_text() == "lost"
    assert [k for _, _, k in results] == [0, 1, 2, 3] and {threads for _, threads, _ in results} == {1}
    assert len({node for node, _, _ in results}) == 2


def waits(folder, k):
    (folder / f"{k}").touch()
    try:
        while True:
            time.sleep(0.1)  # Ray cannot interrupt a long one
    except KeyboardInterrupt:
        (folder / f"{k} ended").touch()
        raise


@pytest.mark.slow
def test_a_signal_ends_the_tasks_of_a_cluster_too(cluster, tmp_path):
    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        tasks = [{"folder": tmp_path, "k": k} for k in range(3)]
        fan_out(waits, tasks, processes=1, cluster=cluster.address, label="tasks")
    end = time.monotonic() + 30
    while not {f"{k} ended" for k in range(2)} <= (found := {file.name for file in tmp_path.iterdir()}):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert "2" not in found


def fails(k):
    raise ValueError(f"task {k} is wrong")


@pytest.mark.slow
def test_an_error_of_a_task_is_raised_here(cluster):
    with pytest.raises(ValueError, match="task 0 is wrong"):
        fan_out(fails, [{"k": 0}], processes=1, cluster=cluster.address, label="tasks")


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_does_not_answer_is_named(cluster, address):
    end_workers()
    with pytest.raises(ValueError, match=f"cluster='{address}': no Ray cluster answers"):
        fan_out(fails, [{"k": 0}], processes=1, cluster=address, label="tasks")
