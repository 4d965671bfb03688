"""Tasks on a Ray cluster: the same bits as on this machine, and a lost worker's task is run again."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import wait_until
from test_parallel import at_work, counts, require_two_begun
from test_survive import content, evaluate, trajectories

from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime import parallel
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.paths import ROOT


def written(stage, folder, **where):
    """What a stage of test_survive writes."""
    stage(lambda name: Checkpoint(folder / f"{name}.safetensors"), folder / "out", **where)
    return content(folder / "out")


def test_one_parameter_sends_tasks_to_a_cluster(tmp_path, monkeypatch):
    """Everything that fans out asks for the cluster, whatever `processes` is."""
    asked, here = [], partial(ThreadPoolExecutor(1).submit, parallel._on_one_thread)
    monkeypatch.setattr(parallel, "_on_cluster", lambda cluster: asked.append(cluster) or (here, 1, wait))
    experiment = Experiment(load_params({"cluster": "auto", "processes": 2}))
    written(trajectories, tmp_path, cluster=experiment.params.cluster)
    experiment.evaluate([], experiment.dataset.test)
    assert asked == ["auto", "auto"]


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"cluster='auto': needs Ray, `pip install -e '.\[cluster\]'`"):
        fan_out(str, [{}], processes=1, cluster="auto", label="tasks")


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
@pytest.mark.parametrize("stage", [trajectories, evaluate], ids=lambda stage: stage.__name__)
def test_trajectories_and_evaluation_are_the_same_bits_as_here(cluster, tmp_path, stage):
    expected = written(stage, tmp_path / "here")
    assert written(stage, tmp_path / "there", cluster=cluster.address) == expected != {}


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


@pytest.mark.slow
def test_a_signal_lets_the_tasks_of_a_cluster_finish_their_step_too(cluster, tmp_path):
    def send():
        wait_until(lambda: at_work(tmp_path) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        counts(tmp_path, seconds=0.02, processes=1, cluster=cluster.address)
    require_two_begun(tmp_path)


def fails(k):
    raise ValueError(f"task {k} is wrong")


@pytest.mark.slow
def test_an_error_of_a_task_is_raised_here_and_a_cluster_that_does_not_answer_is_named(cluster):
    given = dict(tasks=[{"k": 0}], processes=1, label="tasks")
    with pytest.raises(ValueError, match="task 0 is wrong"):
        fan_out(fails, cluster=cluster.address, **given)
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(ValueError, match=f"cluster='{address}': no Ray cluster answers"):
            fan_out(fails, cluster=address, **given)
