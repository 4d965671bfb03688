"""The runs of a cell: several sets distilled and judged side by side, and their scores on disk.

A file of scores is one architecture's: `accuracy` {run: [one a network]}, and `judging`, what they were judged with.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld3m.evaluation.evaluate import EvaluationJob
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.params import Params
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.storage import new_folder, tensors_hash, write_json, write_tensors

Accuracies = dict[str, list[float]]  # {architecture: one a network}


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


def judge_runs(experiment: Experiment, objective: str, space: str, ipc: int, *, runs: range) -> dict[int, Accuracies]:
    """Test accuracies of the set of every run, of a cell or a control (objective "none"); writes them too, and the
    images of a control (those of a cell are in its artefact)."""
    found = {run: replace(experiment, run=run).images_of(objective, space, ipc) for run in runs}
    sets = {
        run: replace(experiment, run=run).judged(*images, plain=run == 0 and space != "full_data")
        for run, images in found.items()
    }
    cell, place = f"{objective}-{space}-{ipc}", experiment.params.place(objective, space, ipc, runs[0])
    checkpoint = _checkpoint(experiment, cell, place, sets, found)
    judged = experiment.judge(list(sets.values()), experiment.dataset.test, checkpoint=checkpoint)
    scores = dict(zip(runs, judged, strict=True))
    end_workers()
    folder = paths.scores_folder(place, cell)
    _write(experiment, folder, cell, sets, scores, images=found[runs[0]][0] if objective == "none" else None)
    checkpoint.remove()
    return scores


def judge_foreign(experiment: Experiment, images: Tensor, labels: Tensor, name: str) -> Accuracies:
    """What `judge_runs` does, for a set that no stage made."""
    judged = experiment.judged(images, labels, plain=True)
    place = f"{experiment.params.dataset}/judged"
    checkpoint = _checkpoint(experiment, name, place, {0: judged}, {0: (images, labels)})
    (scores,) = experiment.judge([judged], experiment.dataset.test, checkpoint=checkpoint)
    end_workers()
    folder = paths.judged_folder(experiment.params.dataset, name)
    _write(experiment, folder, name, {0: judged}, {0: scores}, images=images)
    checkpoint.remove()
    return scores


def _checkpoint(
    experiment: Experiment,
    name: str,
    place: str,
    sets: dict[int, EvaluationJob],
    found: dict[int, tuple[Tensor | None, Tensor]],
) -> Checkpoint:
    """Where the scores of networks that are done wait for those that are not."""
    configuration = {}
    for run, judged in sets.items():
        images, labels = found[run]
        configuration[f"run {run}"] = {
            "set_sha256": tensors_hash({"labels": labels} | ({} if images is None else {"images": images})),
            "networks": len(judged.seeds),
            "judging": {name: _judging(experiment, name, recipe) for name, recipe in judged.recipes.items()},
            "seed": judged.seed,
        }
    return experiment.params.checkpoint(f"evaluate-{name}", configuration, place=place)


def _write(
    experiment: Experiment,
    folder: Path,
    cell: str,
    sets: dict[int, EvaluationJob],
    scores: dict[int, Accuracies],
    *,
    images: Tensor | None,
) -> None:
    first = next(iter(sets))
    with new_folder(folder) as partial:
        for architecture, recipe in sets[first].recipes.items():
            accuracy = {str(run): found[architecture] for run, found in scores.items() if architecture in found}
            judging = _judging(experiment, architecture, recipe)
            record = {"cell": cell, "architecture": architecture, "accuracy": accuracy, "judging": judging}
            write_json(partial / f"{architecture}.json", record)
        if images is not None:
            pixels = experiment.dataset.normalization.denormalize(images)
            metadata = {"classes": list(experiment.dataset.train.classes)}
            write_tensors(partial / "images.safetensors", {"pixels": pixels}, metadata)


def _judging(experiment: Experiment, architecture: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Plain values that two scores must share to be compared."""
    return {
        "data_sha256": experiment.dataset.fingerprint,
        "network": experiment.network_arguments(architecture),
        "recipe": recipe,
        "seed": experiment.params.seed,
    }


def comparable(experiment: Experiment, labels: Tensor) -> dict[str, Any]:
    """The arguments of `metrics.compare` to lay beside a set with `labels` (N,), as far as they are there; says what is
    not."""
    counts = set(torch.bincount(labels).tolist())
    wanted = {"full_data": 0} | ({"random_real": counts.pop()} if len(counts) == 1 else {})
    found: dict[str, Any] = {"seen": experiment.params.distill.network}
    for control, ipc in wanted.items():
        try:
            found[control] = _read(experiment, control, ipc)
        except (FileNotFoundError, ValueError) as problem:
            print(problem)
    return found


def _read(experiment: Experiment, control: str, ipc: int) -> Accuracies:
    """What `judge_runs` wrote of run 0 of a control; FileNotFoundError where it is not there, ValueError where it was
    judged otherwise."""
    given = f"-r objective none -r space {control} -p ipc {ipc}"
    again = f"python -m papermill notebooks/03_evaluate.ipynb evaluated.ipynb {given}"
    folder = paths.scores_folder(experiment.params.place("none", control, ipc, 0), f"none-{control}-{ipc}")
    accuracies = {}
    for architecture, recipe in experiment.recipes(ipc, plain=ipc > 0).items():
        file = folder / f"{architecture}.json"
        if not file.is_file():
            raise FileNotFoundError(f"{control} has no scores of {architecture}: {again}")
        record = json.loads(file.read_text())
        if record.get("judging") != _judging(experiment, architecture, recipe):
            raise ValueError(f"{control} was judged with other parameters or data: {again}")
        accuracies[architecture] = record["accuracy"]["0"]
    return accuracies
