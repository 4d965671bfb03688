"""Gathers what the stages wrote and writes the tables and figures of reports/.

python -m ld3m.reporting.report      # copies those of the data set in params.yaml to where no other replaces them
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from ld3m.data.dataset import Normalization
from ld3m.evaluation.artefact import read_artefact
from ld3m.pipeline.params import Params
from ld3m.pipeline.profiles import load_params
from ld3m.reporting import figures, published
from ld3m.reporting.tables import (
    COLUMNS,
    NAMES,
    UNSEEN,
    Cell,
    cells,
    costs_beside,
    differences,
    latex,
    paper_style,
    read_ablations,
    read_costs,
    read_metrics,
    scores_of_run_0,
    scores_of_runs,
    spread,
    summarise,
    verdicts,
    with_unseen_mean,
)
from ld3m.runtime import paths
from ld3m.runtime.storage import read_tensors, write_bytes

DIGITS = 6  # after the point of a fraction in a csv file


def write_tables(params: Params, *, folder: Path, more: bool = False) -> str:
    """Writes the tables of the grid's cells, or with `more` of the report's, as csv, those that are read as md and tex
    too; returns main.md. What was measured in seconds goes to `costs_beside` the folder: it never repeats."""
    seen, found = params.distill.network, cells(params, more=more)
    scores = with_unseen_mean(scores_of_run_0(params, found), seen)
    summary, changes = _rounded(summarise(scores), differences(scores))
    note = (
        f"Test accuracy in percent on {params.dataset}: mean ± half of the 95 % t interval over n = "
        f"{params.evaluate.seeds} networks trained on one distilled set. {NAMES[seen]} is the architecture used to "
        "distil; the unseen mean is over the others."
    )
    markdown = _write_main(folder, "main", summary, note, verdicts(changes, seen, paired_by="networks"))
    _write_csv(folder, "scores", summary[summary.architecture != UNSEEN][COLUMNS])
    _write_csv(folder, "differences", changes)
    _write_csv(costs_beside(folder), "costs", read_costs(params, found))
    norms = _gradient_norms(params).groupby(["learned", "skip", "steps"]).norm
    _write_csv(folder, "gradient_norms", norms.agg(["mean", "min", "max"]).reset_index())
    _write_csv(folder, "prior", _check(paths.prior_check_folder(params.dataset)))
    if more and any(space == "glad" for _, space, _ in found):
        _write_csv(folder, "gan", _check(paths.gan_check_folder(params.dataset)))
    if more:
        _write_csv(folder, "metrics", read_metrics(params, found))
        _write_runs(params, folder)
    _write_comparison(params, summary, changes, folder)
    return markdown


def _rounded(*frames: pd.DataFrame) -> list[pd.DataFrame]:
    """As the csv files have them, so that what is printed from either is the same."""
    return [frame.round(DIGITS) for frame in frames]


def _write_runs(params: Params, folder: Path) -> None:
    """What several distillation runs say: their mean and interval, paired differences, and where the spread is."""
    seen, runs = params.distill.network, with_unseen_mean(scores_of_runs(params), params.distill.network)
    if runs.empty:
        return
    one_each = runs[runs.seed == 0]
    summary, changes = _rounded(summarise(one_each), differences(one_each))
    counts = " to ".join(map(str, sorted({summary.n.min(), summary.n.max()})))
    note = (
        f"Test accuracy in percent on {params.dataset}: mean ± half of the 95 % t interval over n = {counts} "
        "distillation runs, each from other real images, with other noise and batches, and judged by one network of "
        "each architecture. What several networks or runs would differ by is in spread.csv."
    )
    _write_main(folder, "runs", summary, note, verdicts(changes, seen, paired_by="runs"))
    _write_csv(folder, "runs_differences", changes)
    _write_csv(folder, "spread", spread(runs))


def _write_main(folder: Path, name: str, summary: pd.DataFrame, note: str, sentences: list[str]) -> str:
    """A paper-style table as csv, tex and md, with a note and sentences under it; returns the md."""
    table = paper_style(summary)
    markdown = "\n".join([table.to_markdown(index=False, disable_numparse=True), "", note, "", *sentences, ""])
    _write_csv(folder, name, summary)
    write_bytes(folder / f"{name}.md", markdown.encode())
    write_bytes(folder / f"{name}.tex", latex(table, note).encode())
    return markdown


def write_validation(params: Params, *, folder: Path) -> pd.DataFrame:
    """Writes validation.csv, the mean validation accuracy of run 0 of the report's cells at every check; returns the
    first and the last of each: what a space starts from, and where it ends."""
    keys = ["ipc", "objective", "space"]
    checks = _records(params, cells(params, more=True), "validation")[[*keys, "iteration", "accuracy"]]
    _write_csv(folder, "validation", checks)
    return checks.groupby(keys, sort=False).accuracy.agg(["first", "last"])


def write_ablations(params: Params, *, folder: Path) -> pd.DataFrame:
    """Writes ablations.csv, ablation_changes.csv and ablation_costs.csv; returns mean accuracies, one row a setting."""
    ablations, changes, costs = read_ablations(params)
    _write_csv(folder, "ablations", ablations)
    _write_csv(folder, "ablation_changes", changes)
    _write_csv(costs_beside(folder), "ablation_costs", costs)
    return ablations.pivot_table(
        index=["ablation", "setting"], columns="architecture", values="mean", sort=False
    ).rename(columns=NAMES)


def write_figures(params: Params, *, tables: Path, folder: Path, more: bool = False) -> list[Path]:
    """Writes a figure for everything there is to see and returns the files, in reading order."""
    found = cells(params, more=more)
    summary = summarise(with_unseen_mean(scores_of_run_0(params, found), params.distill.network))
    history, validation = _records(params, found, "history"), _records(params, found, "validation")
    drawn = {"prior": _prior(params)}
    for ipc in _ipcs(found):
        drawn |= {
            f"distilled-ipc{ipc}": _distilled(params, found, ipc),
            f"accuracy-ipc{ipc}": figures.accuracy_by_architecture(summary, ipc=ipc),
            f"curves-ipc{ipc}": figures.learning_curves(history, validation, ipc=ipc),
        }
    drawn["gradient-norms"] = figures.gradient_norms(_gradient_norms(params))
    ablations, costs = tables / "ablations.csv", costs_beside(tables) / "ablation_costs.csv"
    if ablations.exists() and costs.exists():
        drawn["steps"] = figures.accuracy_against_steps(pd.read_csv(ablations), pd.read_csv(costs))
    files = [figures.save(figure, name, folder) for name, figure in drawn.items()]
    return files + [_sheet(params, cell, folder) for cell in found if cell[2]]


def _ipcs(found: list[Cell]) -> list[int]:
    """Images per class that some cells are distilled at, ascending."""
    return sorted({ipc for objective, _, ipc in found if objective != "none"})


def _write_comparison(params: Params, summary: pd.DataFrame, changes: pd.DataFrame, folder: Path) -> None:
    """The paper's numbers, ours beside them, and what differs in the setting."""
    frame = published.comparison(summary, changes)
    table = published.comparison_table(frame)
    note = (
        "Mean test accuracy in percent over the architectures that were not used to distil, and paired differences "
        "between spaces. Paper: LD3M, Table 4, 128 px, IPC 10, with what it prints after ±. "
        "Ours: ± half of the 95 % interval. The settings differ (settings.csv): compare the differences between the "
        "spaces and their signs, not the accuracies."
    )
    markdown = table.to_markdown(index=False, disable_numparse=True)
    _write_csv(folder, "paper", published.printed())
    _write_csv(folder, "comparison", frame)
    distilled = summary[summary.objective != "none"]
    shown = dict(spaces=list(dict.fromkeys(distilled.space)), ipcs=sorted(set(distilled.ipc)))
    _write_csv(folder, "settings", published.settings(params, **shown))
    write_bytes(folder / "comparison.md", f"{markdown}\n\n{note}\n".encode())
    write_bytes(folder / "comparison.tex", latex(table, note).encode())


def _gradient_norms(params: Params) -> pd.DataFrame:
    return pd.DataFrame(json.loads(paths.gradient_norms_file(params.dataset).read_text()))


def _check(folder: Path) -> pd.DataFrame:
    """What a prior was measured to be, in one row."""
    return pd.DataFrame([json.loads((folder / "check.json").read_text())])


def _sheet(params: Params, cell: Cell, folder: Path) -> Path:
    pixels, classes = _pixels(params, *cell)
    return figures.save_sheet(pixels, "set-{}-{}-{}".format(*cell), columns=len(classes), folder=folder)


def _write_csv(folder: Path, name: str, frame: pd.DataFrame) -> None:
    write_bytes(folder / f"{name}.csv", frame.to_csv(index=False, float_format=f"%.{DIGITS}f").encode())


def _prior(params: Params) -> Figure:
    shown, metadata = read_tensors(paths.prior_check_folder(params.dataset) / "images.safetensors")
    return figures.prior_check(**shown, classes=tuple(metadata["classes"]))


def _distilled(params: Params, found: list[Cell], ipc: int) -> Figure:
    """One row a cell or control: the first image of every class."""
    rows, classes = {}, None
    for objective, space, cell_ipc in found:
        if cell_ipc == ipc:
            name = f"{NAMES[objective]} {NAMES[space]}".removeprefix("- ")
            pixels, classes = _pixels(params, objective, space, ipc)
            rows[name] = pixels[::ipc]
    return figures.image_rows(rows, columns=classes)


def _pixels(params: Params, objective: str, space: str, ipc: int) -> tuple[Tensor, list[str]]:
    """Pixels (N, C, H, W) of a cell or a control, and the class names."""
    cell = f"{objective}-{space}-{ipc}"
    if objective == "none":
        folder = paths.scores_folder(params.place(objective, space, ipc, 0), cell)
        tensors, metadata = read_tensors(folder / "images.safetensors")
        return tensors["pixels"], metadata["classes"]
    tensors, metadata = _artefact(params, (objective, space, ipc))
    return Normalization(**metadata["normalization"]).denormalize(tensors["images"]), metadata["classes"]


def _records(params: Params, found: list[Cell], key: str) -> pd.DataFrame:
    """`history` or `validation` of every distilled cell, with columns objective, space and ipc."""
    frames = [
        pd.DataFrame(_artefact(params, cell)[1][key]).assign(objective=cell[0], space=cell[1], ipc=cell[2])
        for cell in found
        if cell[0] != "none"
    ]
    return pd.concat(frames, ignore_index=True)


def _artefact(params: Params, cell: Cell) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of run 0 of a distilled cell."""
    return read_artefact(paths.distilled_folder(params.place(*cell, 0), "-".join(map(str, cell)), 0))


def keep(dataset: str, *, reports: Path = paths.TABLES.parent) -> list[Path]:
    """Copies the main table to tables/<dataset>.{csv,md,tex} of the folder of reports, and the other tables, costs and
    figures of the stage `tables` to <dataset>/, where the stage `report` is of that data set too with its runs and
    ablations, and returns the new files. ValueError where the main table is of another."""
    if (found := _datasets(reports)) != [dataset]:
        raise ValueError(f"{reports / 'tables/main.csv'} is of {found}, not of {dataset}: `dvc repro tables` makes it")
    targets = {reports / f"tables/main.{kind}": reports / f"tables/{dataset}.{kind}" for kind in ("csv", "md", "tex")}
    others = [reports / f"tables/{name}.csv" for name in ("differences", "gradient_norms", "prior", "settings")]
    others += [*reports.glob("costs/*.csv"), *reports.glob("figures/*.png")]
    if _datasets(full := reports / "full") == [dataset]:
        patterns = ("tables/runs*", "tables/spread.csv", "*/ablation*.csv", "figures/steps.png")
        others += [file for pattern in patterns for file in full.glob(pattern)]
    targets |= {file: reports / dataset / file.name for file in others}
    for file, target in targets.items():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    return list(targets.values())


def _datasets(reports: Path) -> list[str]:
    """The data sets that the main table in a folder of reports is of."""
    file = reports / "tables/main.csv"
    return pd.read_csv(file).dataset.unique().tolist() if file.is_file() else []


if __name__ == "__main__":
    for file in keep(load_params().dataset):
        print(file.relative_to(paths.ROOT))
