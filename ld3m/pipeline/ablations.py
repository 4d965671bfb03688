"""One change at a time: for every setting of an ablation a set is distilled, evaluated on test images and measured."""

from typing import Any

from torch import Tensor

from ld3m.method.distill import distill
from ld3m.pipeline.cells import costs_path, runs_path
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.params import Params
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.memory import explain_out_of_memory, forget_peak, peak_gib
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.storage import write_json

MEASURED = ("seconds", "seconds_per_iteration", "peak_mib")
# the parameters that a record depends on
DECISIVE = {"seed", "datasets", "networks", "trajectories", "objectives", "spaces", "distill", "evaluate", "ablations"}


def ablation_checkpoint(ablation: str, params: Params, settings: dict[str, tuple[Params, str, str, int]]) -> Checkpoint:
    """Where `ablate` keeps the settings of an ablation that are done."""
    experiment = Experiment(params)
    given = {
        name: {"objective": objective, "space": space, "ipc": ipc}
        | changed.model_dump(include=DECISIVE, exclude={"ablations": {"settings"}})
        for name, (changed, objective, space, ipc) in settings.items()
    }
    configuration = {
        "settings": given,
        "data_sha256": experiment.dataset.fingerprint,
        "prior_sha256": experiment.prior.fingerprint(),
    }
    return params.checkpoint(f"ablation-{ablation}", configuration)


def ablate(
    settings: dict[str, tuple[Params, str, str, int]],
    *,
    processes: int,
    cluster: str | None = None,
    checkpoint: Checkpoint,
) -> list[dict[str, Any]]:
    """One record a setting, in their order: what `measure` returns of its arguments, and the setting's name.

    Settings run side by side, one thread each; those that an interrupted call left in `checkpoint` are not run again.
    """
    tasks = [dict(zip(("params", "objective", "space", "ipc"), setting, strict=True)) for setting in settings.values()]
    records = fan_out(measure, tasks, processes=processes, cluster=cluster, label="settings", checkpoint=checkpoint)
    end_workers()
    return [{"setting": name} | record for name, record in zip(settings, records, strict=True)]


def write_records(dataset: str, ablation: str, records: list[dict[str, Any]]) -> None:
    """Write what `ablate` gives but the images; seconds and memory, which never repeat, to a file of their own."""
    measured = [{"setting": record["setting"]} | {key: record[key] for key in MEASURED} for record in records]
    write_json(costs_path(dataset, "ablations", f"{ablation}.json"), measured)
    left_out = (*MEASURED, "images")
    repeating = [{key: value for key, value in record.items() if key not in left_out} for record in records]
    write_json(runs_path(dataset, "ablations", f"{ablation}.json"), repeating)


def measure(params: Params, objective: str, space: str, ipc: int) -> dict[str, Any]:
    """Distill the sets of all runs, or make those of a control, and evaluate each: that of the last iteration.

    `ablations.select_on_test` of the parameters, the released code's selection, evaluates the set at every check and
    keeps each architecture's best mean on the test images.

    Returns
    -------
    dict
        `images` (N, C, H, W) of the first run in [-1, 1]; `accuracy`, {architecture: [one for each run and network]}
        on test images, in [0, 1]; `seconds`, to distill a set; `peak_mib` of the process, None where the system cannot
        tell a setting from those before it; and, but of a control, `seconds_per_iteration` and `grad_norm_<learnable>`,
        the mean over iterations.
    """
    experiment, given = Experiment(params), params.ablations
    forgotten = forget_peak()  # of the setting that this process ran before
    runs = [experiment.of_run(run) for run in range(given.runs)]
    made = [_made(run, objective, space, ipc) for run in runs]
    peak_mib = 1024 * peak_gib() if forgotten else None
    accuracy: dict[str, list[float]] = {name: [] for name in given.architecture}
    for run, (candidates, labels, _, _) in zip(runs, made, strict=True):
        jobs = [run.evaluation_job(images, labels, networks=given.seeds) for images in candidates]
        scores = run.evaluate(jobs, experiment.dataset.test)
        for name, values in accuracy.items():
            values += max((score[name] for score in scores), key=sum)
    candidates, _, history, _ = made[0]
    record = {
        "objective": objective,
        "space": space,
        "ipc": ipc,
        "images": experiment.dataset.normalization.denormalize(candidates[-1]).cpu(),
        "accuracy": accuracy,
        "seconds": sum(seconds for *_, seconds in made) / len(made),
        "peak_mib": peak_mib,
    }
    for name in history[0] if history else ():
        if name.startswith("grad_norm_"):
            record[name] = sum(step[name] for step in history) / len(history)
    return record | {"seconds_per_iteration": record["seconds"] / len(history) if history else None}


def _made(
    experiment: Experiment, objective: str, space: str, ipc: int
) -> tuple[list[Tensor], Tensor, list[dict[str, float]], float]:
    """One run: the sets to evaluate, of which the best counts; labels, history and seconds."""
    if objective == "none":
        images, labels = experiment.control(space, ipc)
        return [images], labels, [], 0.0
    params = experiment.params
    synthetic, matched = experiment.synthetic(space, ipc), experiment.objective(objective)
    candidates: list[Tensor] = []
    budget = params.budget(objective, space, ipc)
    with explain_out_of_memory(*params.lowers_memory(objective, space), "processes"):
        run = distill(
            synthetic,
            matched,
            iterations=budget.iterations,
            learning_rates=budget.learning_rates,
            optimizer=budget.optimizer,
            momentum=params.distill.momentum,
            validate=lambda images: candidates.append(images.detach().clone()) or [len(candidates)],  # the last is kept
            validation_checks=params.distill.validation_checks if params.ablations.select_on_test else 0,
            checkpoint=Checkpoint(),
        )
    return candidates, synthetic.labels, run.history, run.seconds
