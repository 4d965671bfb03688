"""The stages of dvc.yaml without DVC and papermill, several at once: for a large GPU, which one cell does not fill.

    python -m ld3m.pipeline.batch --jobs 12 --minutes 9    # stops after nine minutes; the same command resumes

A job is a notebook with its parameters, or one setting of an ablation, in a process of its own. Done is what is there
under runs/: unlike DVC this does not notice that something it was made from has changed since. `dvc commit` then tells
DVC of the results, and notebooks 05 and 06 make their tables.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ld3m.pipeline.cells import cells
from ld3m.pipeline.params import Params
from ld3m.pipeline.profiles import ablation_settings, load_params
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import SIGNALS
from ld3m.runtime.storage import write_json

GRACE_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """Calls `run` once everything in `needs` is there; it writes `outputs`."""

    name: str
    outputs: tuple[Path, ...]
    needs: tuple[Path, ...]
    run: Callable[[], None]


def jobs(params: Params) -> list[Job]:
    """A job for everything that the grid, `more` and the ablations ask for, in the order in which they should start."""
    name, found = params.dataset, cells(params, more=True)
    prior, gan, trajectories = paths.prior_folder(name), paths.gan_folder(name), paths.trajectories_folder(name)
    ablated = [given for key in params.ablations.settings for _, *given in ablation_settings(key).values()]
    wanted = {part for objective, space, _ in found for part in (objective, space)}.union(*ablated)
    made = [Job("prior", (paths.prior_check_folder(name) / "images.safetensors",), (), _notebook("00_prior"))]
    if "glad" in wanted:
        made.append(Job("gan", (paths.gan_check_folder(name) / "images.safetensors",), (), _notebook("00_gan")))
    if "mtt" in wanted:
        made.append(Job("trajectories", (trajectories,), (), _notebook("01_trajectories")))
    needs = {"pixel": (), "random_real": (), "full_data": (), "glad": (gan,), "mtt": (trajectories,)}
    evaluated = []
    for cell in found:
        given, title = dict(zip(("objective", "space", "ipc"), cell, strict=True)), "-".join(map(str, cell))
        for more in (False, True):
            if not (runs := params.runs(*cell, more=more)) or (not more and not params.in_grid(*cell)):
                continue
            place, label = params.place(*cell, runs[0]), f"{'more-' if more else ''}{title}"
            needed = needs.get(cell[1], (prior,)) + needs.get(cell[0], ())
            if cell[0] != "none":
                distilled = tuple(paths.distilled_folder(place, title, run) for run in runs)
                made.append(Job(f"distill-{label}", distilled, needed, _notebook("02_distill", **given, more=more)))
                needed = distilled
            scores = paths.scores_folder(place, title)
            evaluated.append(Job(f"evaluate-{label}", (scores,), needed, _notebook("03_evaluate", **given, more=more)))
    norms = Job("gradient-norms", (paths.gradient_norms_file(name),), (prior,), _notebook("04_gradient_norms"))
    return [*made, *evaluated, norms, *_ablation_jobs(params)]


def _ablation_jobs(params: Params) -> list[Job]:
    settled = []
    for ablation in params.ablations.settings:
        target, parts = paths.ablation_file(params.dataset, ablation), []
        for k, (setting, (_, objective, space)) in enumerate(ablation_settings(ablation).items()):
            part = target.with_name(f"{ablation}-{k}.part")
            parts.append(part)
            if not target.exists():
                run = partial(_measure, ablation, setting, part)
                needs = (paths.prior_folder(params.dataset),)
                if objective == "mtt":
                    needs += (paths.trajectories_folder(params.dataset),)
                if space == "glad":
                    needs += (paths.gan_folder(params.dataset),)
                settled.append(Job(f"ablation-{ablation}-{k}", (part,), needs, run))
        merge = partial(_merge, params.dataset, ablation, parts)
        settled.append(Job(f"ablation-{ablation}", (target,), tuple(parts), merge))
    return settled


def _notebook(name: str, **parameters: Any) -> Callable[[], None]:
    return partial(run_notebook, paths.ROOT / "notebooks" / f"{name}.ipynb", parameters)


def run_notebook(file: Path, parameters: dict[str, Any]) -> None:
    """Runs the code of a notebook in this process, with `parameters` set after the cell tagged "parameters"."""
    namespace = {"__name__": file.stem}
    for number, cell in enumerate(json.loads(file.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{file.name}, cell {number}", "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace.update(parameters)


def _measure(ablation: str, setting: str, part: Path) -> None:
    from ld3m.pipeline.ablations import measure

    params, objective, space = ablation_settings(ablation)[setting]
    write_json(part, {"setting": setting} | measure(params, objective, space))


def _merge(dataset: str, ablation: str, parts: list[Path]) -> None:
    from ld3m.pipeline.ablations import write_records

    write_records(dataset, ablation, [json.loads(part.read_text()) for part in parts])
    for part in parts:
        part.unlink()


def run(todo: list[Job], *, at_once: int, minutes: float, log_folder: Path) -> list[str]:
    """Runs the jobs whose output is not there, `at_once` of them at a time, and returns the names of those left over:
    failed, without something they need, or not finished after `minutes` or when a signal came. What a job prints is in
    `log_folder`."""
    deadline = time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ld3m.pipeline.experiment", "ld3m.reporting.figures"])
    log_folder.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in todo if not _are_there(job.outputs)]
    running: dict[str, tuple[multiprocessing.Process, Job, float]] = {}
    left: list[str] = []
    signals: list[int] = []
    former = {number: signal.signal(number, lambda number, frame: signals.append(number)) for number in SIGNALS}
    try:
        while (waiting or running) and time.monotonic() < deadline and not signals:
            for job in [job for job in waiting if _are_there(job.needs)][: at_once - len(running)]:
                waiting.remove(job)
                process = context.Process(target=_logged, args=(job, log_folder / f"{job.name}.log"))
                process.start()
                running[job.name] = process, job, time.monotonic()
            if not running:
                break
            for name, (process, _, began) in list(running.items()):
                if not process.is_alive():
                    del running[name]
                    is_done = process.exitcode == 0
                    left += [] if is_done else [name]
                    outcome = "done" if is_done else f"failed, see {log_folder / name}.log"
                    print(f"{name}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
            time.sleep(0.2)
    finally:
        for process, *_ in running.values():
            process.terminate()  # what is at work finishes its step and writes its state
        for process, *_ in running.values():
            process.join(GRACE_SECONDS)
            process.kill()
        for number, handler in former.items():
            signal.signal(number, handler)
    unfinished = [name for name, (_, job, _) in running.items() if not _are_there(job.outputs)]
    return left + unfinished + [job.name for job in waiting]


def _are_there(files: tuple[Path, ...]) -> bool:
    return all(file.exists() for file in files)


def _logged(job: Job, log: Path) -> None:
    os.environ |= {"DVC_STAGE": job.name, "MPLBACKEND": "Agg"}  # lines instead of bars, figures without a screen
    if job.name not in ("prior", "gan"):  # as in dvc.yaml
        torch.set_num_threads(1)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            job.run()
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4, help="how many run at once (4)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many (never)")
    parser.add_argument("--only", default="", help="only jobs whose name this regular expression finds")
    given = parser.parse_args()
    params = load_params()
    todo = [job for job in jobs(params) if re.search(given.only, job.name)]
    logs = paths.ROOT / "runs" / params.dataset / "logs"
    if left := run(todo, at_once=given.jobs, minutes=given.minutes, log_folder=logs):
        sys.exit(f"left over: {', '.join(left)}")
