"""The runs of a cell: several sets distilled and evaluated side by side."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld3m.evaluation.evaluate import exchanged_classes
from ld3m.evaluation.scores import Scores, read_scores, write_scores
from ld3m.evaluation.statistics import Accuracies
from ld3m.pipeline.cells import Cell, evaluated_folder, first_runs
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.params import Params
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.storage import new_folder, tensors_hash, write_tensors


def distill_runs(experiment: Experiment, cell: Cell) -> list[Path]:
    """Distill the set of every run of a cell and return their folders.

    One run uses all `processes`; several run side by side with one process each.
    """
    params = experiment.params
    if len(cell.runs) == 1 or params.processes == 1 and params.cluster is None:
        folders = [experiment.of_run(run).distill(cell) for run in cell.runs]
    else:
        alone = params.model_copy(update={"processes": 1, "cluster": None})
        tasks = [{"params": alone, "cell": cell, "run": run} for run in cell.runs]
        folders = fan_out(_distill, tasks, processes=params.processes, cluster=params.cluster, label="runs")
        end_workers()
    for run in cell.runs:
        experiment.of_run(run).checkpoint_of(cell, {}).remove()
    return folders


def _distill(params: Params, cell: Cell, run: int) -> Path:
    return Experiment(params, run).distill(cell)


def evaluate_runs(experiment: Experiment, cell: Cell) -> dict[int, Accuracies]:
    """Evaluate the set of every run of a cell or a control on test images, and write the scores.

    The images of a control are written too; those of a cell are in its artefact.
    """
    found = {run: experiment.of_run(run).images_of(cell) for run in cell.runs}
    images = found[cell.runs[0]][0] if cell.objective == "none" else None
    return _evaluate(experiment, cell.name, f"evaluate-{cell.key}", found, folder=cell.scores, images=images)


def evaluate_foreign(experiment: Experiment, images: Tensor, labels: Tensor, name: str) -> Accuracies:
    """Evaluate a set that no stage made as `evaluate_runs` does ours, and print what says that its labels are wrong."""
    folder, found = evaluated_folder(experiment.params.dataset, name), {0: (images, labels)}
    classes = experiment.dataset.train.classes
    accuracies = _evaluate(experiment, name, f"evaluated-{name}", found, folder=folder, images=images)[0]
    chance = 1 / len(classes)
    for architecture, values in accuracies.items():
        if (mean := sum(values) / len(values)) < chance / 2:
            below = f"{architecture} reaches {mean:.1%}, far below chance, {chance:.1%}"
            print(f"{below}: the set's classes may be in another order")
    job = experiment.evaluation_job(images, labels)
    if order := exchanged_classes(job, experiment.dataset, experiment.new_network(next(iter(job.recipes)))):
        seen = [f"{name} as {classes[k]}" for name, k in zip(classes, order, strict=True) if name != classes[k]]
        print(f"the set's labels are probably exchanged: a network trained on it sees {', '.join(seen[:10])}")
    return accuracies


def _evaluate(
    experiment: Experiment,
    name: str,
    checkpoint_name: str,
    found: dict[int, tuple[Tensor | None, Tensor]],
    *,
    folder: Path,
    images: Tensor | None,
) -> dict[int, Accuracies]:
    """Train and test the networks of every run, from the checkpoint of an interrupted call where there is one."""
    jobs = {run: experiment.of_run(run).evaluation_job(*images) for run, images in found.items()}
    configuration = {
        f"run {run}": {
            "set_sha256": tensors_hash({"labels": labels} | ({} if images is None else {"images": images})),
            "networks": len(jobs[run].seeds),
            "recipes": _recipes(experiment, jobs[run].recipes),
            "seed": jobs[run].seed,
        }
        for run, (images, labels) in found.items()
    }
    checkpoint = experiment.params.checkpoint(checkpoint_name, configuration)
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
    """Read the scores with which `statistics.compare` compares a set of `labels` (N,); print which are missing."""
    counts = set(torch.bincount(labels).tolist())
    wanted = {"full_data": 0} | ({"random_real": counts.pop()} if len(counts) == 1 else {})
    found = {}
    for control, ipc in wanted.items():
        try:
            found[control] = _read(experiment, control, ipc)
        except ValueError as problem:
            print(problem)
    return found


def _read(experiment: Experiment, control: str, ipc: int) -> Accuracies:
    """Return what `evaluate_runs` wrote of run 0 of a control; ValueError where other parameters or data made it."""
    rows = {cell.row: cell for cell in first_runs(experiment.params)}
    if ("none", control, ipc) not in rows:
        raise ValueError(f"params.yaml has no control {control} of {ipc} images a class: add it to `controls`")
    cell = rows["none", control, ipc]
    try:
        scores = read_scores(cell.scores / "scores.json")
        if scores.recipes != _recipes(experiment, experiment.recipes(ipc)):
            raise ValueError(f"{cell.scores} was evaluated with other parameters or data: evaluate it again")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error} (`dvc repro control@{cell.key}`)") from error
    return scores.runs[0]
