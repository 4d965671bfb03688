"""Writes the tables and figures of what the stages wrote, and the report: the executed notebook as one offline file.

python -m ld3m.reporting.report reports/mnist5k/notebooks/report.ipynb reports/mnist5k/index.html
"""

import json
import sys
from pathlib import Path

import nbformat
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from torch import Tensor

from ld3m.data.dataset import Normalization
from ld3m.evaluation.artefact import read_artefact
from ld3m.pipeline.cells import (
    NAMES,
    UNSEEN,
    Cell,
    first_runs,
    reports_path,
    runs_path,
)
from ld3m.pipeline.params import Params
from ld3m.reporting import figures, published
from ld3m.reporting.tables import (
    COLUMNS,
    differences,
    latex,
    paper_style,
    read_ablations,
    read_costs,
    read_metrics,
    scores_of_run_0,
    scores_of_runs,
    spread,
    summarize,
    verdicts,
    with_unseen_mean,
)
from ld3m.runtime.storage import read_tensors, write_bytes, write_json

DIGITS = 6  # after the point of a fraction in a csv file
MEASURED = {"costs", "ablation_costs"}  # seconds and memory: never the same twice
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def write_tables(params: Params, *, table: str) -> dict[str, pd.DataFrame]:
    """Write every table as csv, and main, runs and comparison as md and tex too.

    Parameters
    ----------
    params : Params
        Its cells are the rows. A cell whose scores are missing is an error.
    table : {"main", "report"}
        The report has the cells of the main table too, and further runs, ablations and statistics. Tables with seconds
        and memory, which vary, go to a folder of their own.

    Returns
    -------
    dict of pandas.DataFrame
        The tables by name, rounded as their files are.
    """
    seen, found = params.distill.network, first_runs(params, table)
    folder = reports_path(params.dataset, "tables", table)
    scores = with_unseen_mean(scores_of_run_0(params, found), seen)
    tables = {"main": summarize(scores), "differences": differences(scores), "costs": read_costs(params, found)}
    tables["scores"] = tables["main"][tables["main"].architecture != UNSEEN][COLUMNS]
    norms = _gradient_norms(params).groupby(["learned", "skip", "steps"]).norm
    tables["gradient_norms"] = norms.agg(["mean", "min", "max"]).reset_index()
    tables["prior"] = _check(runs_path(params.dataset, "prior-check"))
    tables = _rounded(tables)
    tables |= {"paper": published.printed(), "settings": published.settings(params, found)}
    tables["comparison"] = published.comparison(tables["main"], tables["differences"])
    if table == "main":
        history = _records(found, "history")
        norms = [name for name in history if name.startswith("grad_norm_")]
        tables["history"] = history[["cell", "step", "loss", *norms]].round(DIGITS)
        write_json(folder / "metrics.json", _metrics(found, tables["main"]))
    if table == "report":
        tables |= _rounded(_tables_of_the_report(params, found))
    for name, frame in tables.items():
        place = reports_path(params.dataset, "costs", table) if name in MEASURED else folder
        write_bytes(place / f"{name}.csv", frame.to_csv(index=False, float_format=f"%.{DIGITS}f").encode())
    for name in {"main", "runs", "comparison"} & set(tables):
        text, note, sentences = described(params, tables, name)
        markdown = [text.to_markdown(index=False, disable_numparse=True), "", note, *([""] if sentences else [])]
        write_bytes(folder / f"{name}.md", "\n".join([*markdown, *sentences, ""]).encode())
        write_bytes(folder / f"{name}.tex", latex(text, note).encode())
    return tables


def _tables_of_the_report(params: Params, found: list[Cell]) -> dict[str, pd.DataFrame]:
    seen = params.distill.network
    tables = {"metrics": read_metrics(params, found)}
    checks = _records(found, "validation")
    tables["validation"] = checks[["ipc", "objective", "space", "iteration", "accuracy"]]
    tables |= dict(zip(("ablations", "ablation_changes", "ablation_costs"), read_ablations(params), strict=True))
    if any(cell.prior == "gan" for cell in found):
        tables["gan"] = _check(runs_path(params.dataset, "gan-check"))
    runs = with_unseen_mean(scores_of_runs(params), seen)
    if not runs.empty:
        one_each = runs[runs.seed == 0]
        tables |= {"runs": summarize(one_each), "runs_differences": differences(one_each), "spread": spread(runs)}
    return tables


def _metrics(found: list[Cell], summary: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Mean accuracies for `dvc metrics`: {cell: {architecture: mean}}."""
    means = {
        row: group.set_index("architecture")["mean"] for row, group in summary.groupby(["objective", "space", "ipc"])
    }
    return {cell.name: means[cell.row].to_dict() for cell in found}


def _rounded(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """As the csv files have them, so that what is printed from either is the same."""
    return {name: table.round(DIGITS) for name, table in tables.items()}


def described(params: Params, tables: dict[str, pd.DataFrame], name: str) -> tuple[pd.DataFrame, str, list[str]]:
    """The table main, runs or comparison laid out as text, a note to it, and sentences that say what is significant."""
    seen, percent = params.distill.network, f"Test accuracy in percent on {params.dataset}: mean ± half of the 95 % t "
    if name == "main":
        note = (
            f"{percent}interval over n = {params.evaluate.seeds} networks trained on one distilled set. {NAMES[seen]} "
            "is the architecture used to distill; the unseen mean is over the others."
        )
        return paper_style(tables[name]), note, verdicts(tables["differences"], seen, paired_by="networks")
    if name == "runs":
        counts = " to ".join(map(str, sorted({tables[name].n.min(), tables[name].n.max()})))
        note = (
            f"{percent}interval over n = {counts} distillation runs, each from other real images, with other noise and "
            "batches, evaluated by one network of each architecture. spread.csv has the standard deviations over "
            "networks and over runs."
        )
        return paper_style(tables[name]), note, verdicts(tables["runs_differences"], seen, paired_by="runs")
    note = (
        "Mean test accuracy in percent over the architectures that were not used to distill, and paired differences "
        "between spaces. Paper: LD3M, Table 4, 128 px, IPC 10, with what it prints after ±. "
        "Ours: ± half of the 95 % interval. The settings differ (settings.csv): compare the differences between the "
        "spaces and their signs, not the accuracies."
    )
    return published.comparison_table(tables[name]), note, []


def write_figures(params: Params, tables: dict[str, pd.DataFrame], *, table: str) -> list[Path]:
    """Write the figures of what `write_tables` gave, and a sheet of images of every set; return the files."""
    found, folder = first_runs(params, table), reports_path(params.dataset, "figures", table)
    history, validation = _records(found, "history"), _records(found, "validation")
    drawn = {"prior": _prior(params)}
    for ipc in sorted({cell.ipc for cell in found if cell.objective != "none"}):
        drawn |= {
            f"distilled-ipc{ipc}": _distilled(found, ipc),
            f"accuracy-ipc{ipc}": figures.accuracy_by_architecture(tables["main"], ipc=ipc),
            f"curves-ipc{ipc}": figures.learning_curves(history, validation, ipc=ipc),
        }
    drawn["gradient-norms"] = figures.gradient_norms(_gradient_norms(params))
    for name in [name for name in ("differences", "runs_differences") if name in tables]:
        drawn[name.replace("_", "-")] = figures.forest(tables[name])
    if "ablations" in tables and "steps" in set(tables["ablations"].ablation):
        drawn["steps"] = figures.accuracy_against_steps(tables["ablations"], tables["ablation_costs"])
    files = [figures.save(figure, name, folder) for name, figure in drawn.items()]
    return files + [_sheet(cell, folder) for cell in found if cell.ipc]


def styled(table: pd.DataFrame, name: str, caption: str, *, headers: int = 1) -> Styler:
    """A table of text for the page; its first `headers` columns are aligned left."""
    text = table.astype(str)
    left = [{"selector": f".col{column}", "props": "text-align: left"} for column in range(headers)]
    return text.style.hide(axis="index").set_uuid(name).set_caption(caption).set_table_styles(left)


def write_page(notebook: Path, file: Path) -> None:
    """Write an executed notebook as one file without code, scripts or references to other files."""
    from nbconvert import HTMLExporter  # takes a second to import

    executed = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True, embed_images=True)
    exporter.exclude_anchor_links = True
    body, _ = exporter.from_notebook_node(executed)
    title = executed.cells[0].source.splitlines()[0].lstrip("# ")
    style = Path(__file__).with_name("report.css").read_text()
    write_bytes(file, PAGE.format(title=title, style=style, body=body).encode())


def _gradient_norms(params: Params) -> pd.DataFrame:
    return pd.DataFrame(json.loads(runs_path(params.dataset, "gradient_norms.json").read_text()))


def _check(folder: Path) -> pd.DataFrame:
    """The measurements of a prior, in one row."""
    return pd.DataFrame([json.loads((folder / "check.json").read_text())])


def _sheet(cell: Cell, folder: Path) -> Path:
    x, classes = _images(cell)
    return figures.save_sheet(x, f"set-{cell.name}", columns=len(classes), folder=folder)


def _prior(params: Params) -> Figure:
    shown, metadata = read_tensors(runs_path(params.dataset, "prior-check") / "images.safetensors")
    return figures.prior_check(**shown, classes=tuple(metadata["classes"]))


def _distilled(found: list[Cell], ipc: int) -> Figure:
    """One row a cell or control: the first image of every class."""
    rows, classes = {}, None
    for cell in found:
        if cell.ipc == ipc:
            x, classes = _images(cell)
            rows[cell.title] = x[::ipc]
    return figures.image_rows(rows, columns=classes)


def _images(cell: Cell) -> tuple[Tensor, list[str]]:
    """Images x (N, C, H, W) of run 0 of a cell or a control, and the class names."""
    if cell.objective == "none":
        tensors, metadata = read_tensors(cell.scores / "images.safetensors")
        return tensors["pixels"], metadata["classes"]
    tensors, metadata = read_artefact(cell.artefact(0))
    return Normalization(**metadata["normalization"]).denormalize(tensors["images"]), metadata["classes"]


def _records(found: list[Cell], key: str) -> pd.DataFrame:
    """`history` or `validation` of every distilled cell, with columns objective, space and ipc."""
    frames = [
        pd.DataFrame(read_artefact(cell.artefact(0))[1][key]).assign(
            cell=cell.name, objective=cell.objective, space=cell.space, ipc=cell.ipc
        )
        for cell in found
        if cell.objective != "none"
    ]
    return pd.concat(frames, ignore_index=True)


if __name__ == "__main__":
    write_page(*map(Path, sys.argv[1:]))
