"""The runs of a cell: several sets distilled and evaluated side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld3m.evaluation.evaluate import EvaluationJob
from ld3m.evaluation.scores import Scores, read_scores, write_scores
from ld3m.evaluation.statistics import Accuracies
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.params import Params
from ld3m.runtime import paths
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.storage import new_folder, tensors_hash, write_tensors


def distil_runs(params: Params, objective: str, space: str, ipc: int, *, runs: range) -> list[Path]:
    """Distils the set of every run and returns their folders: one run with all `processes`, several with one each."""
    if len(runs) == 1:
        folders = [_distil(params, objective, space, ipc, runs[0])]
    else:
        alone = params.model_copy(update={"processes": 1, "cluster": None})
        tasks = [{"params": alone, "objective": objective, "space": space, "ipc": ipc, "run": run} for run in runs]
        folders = fan_out(_distil, tasks, processes=params.processes, cluster=params.cluster, label="runs")
        end_workers()
    for run in runs:
        Experiment(params, run).checkpoint_of(objective, space, ipc, {}).remove()
    return folders


def _distil(params: Params, objective: str, space: str, ipc: int, run: int) -> Path:
    return Experiment(params, run).distill(objective, space, ipc)


def evaluate_runs(
    experiment: Experiment, objective: str, space: str, ipc: int, *, runs: range
) -> dict[int, Accuracies]:
    """Evaluates the set of every run of a cell or a control (objective "none") on test images; writes the scores, and
    the images of a control (those of a cell are in its artefact)."""
    found = {run: replace(experiment, run=run).images_of(objective, space, ipc) for run in runs}
    jobs = {run: replace(experiment, run=run).evaluation_job(*images) for run, images in found.items()}
    cell, place = f"{objective}-{space}-{ipc}", experiment.params.place(objective, space, ipc, runs[0])
    images = found[runs[0]][0] if objective == "none" else None
    return _evaluate(experiment, cell, jobs, found, folder=paths.scores_folder(place, cell), place=place, images=images)


def evaluate_foreign(experiment: Experiment, images: Tensor, labels: Tensor, name: str) -> Accuracies:
    """Does what `evaluate_runs` does for a set that no stage made."""
    params = experiment.params
    jobs, found = {0: experiment.evaluation_job(images, labels)}, {0: (images, labels)}
    folder, place = paths.judged_folder(params.dataset, name), f"{params.dataset}/judged"
    return _evaluate(experiment, name, jobs, found, folder=folder, place=place, images=images)[0]


def _evaluate(
    experiment: Experiment,
    name: str,
    jobs: dict[int, EvaluationJob],
    found: dict[int, tuple[Tensor | None, Tensor]],
    *,
    folder: Path,
    place: str,
    images: Tensor | None,
) -> dict[int, Accuracies]:
    """Trains and tests the networks of every run, from the checkpoint of an interrupted call where there is one."""
    configuration = {
        f"run {run}": {
            "set_sha256": tensors_hash({"labels": labels} | ({} if images is None else {"images": images})),
            "networks": len(jobs[run].seeds),
            "recipes": _recipes(experiment, jobs[run].recipes),
            "seed": jobs[run].seed,
        }
        for run, (images, labels) in found.items()
    }
    checkpoint = experiment.params.checkpoint(f"evaluate-{name}", configuration, place=place)
    accuracies = experiment.evaluate(list(jobs.values()), experiment.dataset.test, checkpoint=checkpoint)
    end_workers()
    runs = dict(zip(jobs, accuracies, strict=True))
    recipes = _recipes(experiment, next(iter(jobs.values())).recipes)
    with new_folder(folder) as partial:
        write_scores(partial / "scores.json", Scores(name, runs, recipes))
        if images is not None:
            pixels = experiment.dataset.normalization.denormalize(images)
            metadata = {"classes": list(experiment.dataset.train.classes)}
            write_tensors(partial / "images.safetensors", {"pixels": pixels}, metadata)
    checkpoint.remove()
    return runs


def _recipes(experiment: Experiment, recipes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Plain values that two scores of an architecture must share to be compared."""
    return {
        architecture: {
            "data_sha256": experiment.dataset.fingerprint,
            "network": experiment.params.network_arguments(architecture),
            "training": recipe,
            "seed": experiment.params.seed,
        }
        for architecture, recipe in recipes.items()
    }


def comparable(experiment: Experiment, labels: Tensor) -> dict[str, Accuracies]:
    """The keyword arguments of `statistics.compare` for a set with `labels` (N,) whose scores are there; prints those
    that are missing."""
    counts = set(torch.bincount(labels).tolist())
    wanted = {"full_data": 0} | ({"random_real": counts.pop()} if len(counts) == 1 else {})
    found = {}
    for control, ipc in wanted.items():
        try:
            found[control] = _read(experiment, control, ipc)
        except (FileNotFoundError, ValueError) as problem:
            print(problem)
    return found


def _read(experiment: Experiment, control: str, ipc: int) -> Accuracies:
    """The accuracies of run 0 of a control; ValueError where they come from another recipe, network or data."""
    folder = paths.scores_folder(experiment.params.place("none", control, ipc, 0), f"none-{control}-{ipc}")
    scores = read_scores(folder / "scores.json")
    if scores.recipes != _recipes(experiment, experiment.recipes(ipc)):
        raise ValueError(f"{folder} was evaluated with other parameters or data: evaluate {control} again")
    return scores.runs[0]
