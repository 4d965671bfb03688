"""Write tables and figures of what the stages have computed; export the executed report notebook as one offline page.

python -m ld3m.reporting.report reports/mnist5k/notebooks/report.ipynb reports/mnist5k/index.html
"""

import json
import sys
from pathlib import Path

import jinja2
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from torch import Tensor

from ld3m.data.dataset import Normalization
from ld3m.evaluation.artefact import read_artefact
from ld3m.pipeline.cells import NAMES, UNSEEN, Cell, cells, first_runs, reports_path, runs_path
from ld3m.pipeline.params import Params
from ld3m.reporting import figures, published, tables
from ld3m.runtime.storage import read_tensors, write_bytes, write_json

DIGITS = 6  # after the point of a fraction in a csv file
MEASURED = {"costs", "ablation_costs"}  # seconds and memory: never the same twice


def write_tables(params: Params, *, table: str) -> dict[str, pd.DataFrame]:
    """Write every table as csv, and main, runs and comparison as md and tex too.

    Parameters
    ----------
    params
        Its cells are the rows. A cell whose scores are missing is an error.
    table
        "main" or "report", which has the cells of the main table too, and further runs, ablations and statistics.
        Tables with seconds and memory, which vary, go to a folder of their own.

    Returns
    -------
    dict of DataFrame
        The tables by name, rounded as their files are.
    """
    seen, found = params.distill.network, first_runs(params, table)
    folder, costs = (reports_path(params.dataset, place, table) for place in ("tables", "costs"))
    scores = tables.scores_of(params, cells(params, table))
    every = tables.with_unseen_mean(scores, seen)
    of_run_0 = every[every.run == 0]
    written = {"main": tables.summarize(of_run_0), "differences": tables.differences(of_run_0)}
    written["costs"] = tables.read_costs(params, found)
    written["scores"] = written["main"][written["main"].architecture != UNSEEN]
    norms = _gradient_norms(params).groupby(["learned", "skip", "steps"]).norm
    written["gradient_norms"] = norms.agg(["mean", "min", "max"]).reset_index()
    written["prior"] = _check(runs_path(params.dataset, "prior-check"))
    if table == "main":
        history = _records(found, "history")
        written["history"] = history[["cell", "step", "loss", *history.filter(like="grad_norm_")]]
    else:
        written["metrics"] = tables.metrics(scores[scores.run == 0])
        written["validation"] = _records(found, "validation")[["ipc", "objective", "space", "iteration", "accuracy"]]
        names = "ablations", "ablation_changes", "ablation_costs"
        written |= dict(zip(names, tables.read_ablations(params), strict=True))
        if any(cell.prior == "gan" for cell in found):
            written["gan"] = _check(runs_path(params.dataset, "gan-check"))
        runs = tables.of_several_runs(every)
        if len(runs):
            one_each = runs[runs.seed == 0]
            written |= {"runs": tables.summarize(one_each), "runs_differences": tables.differences(one_each)}
            written["spread"] = tables.spread(runs)
    # rounded as the csv files have them, so that what is printed from either is the same
    written = {name: frame.round(DIGITS) for name, frame in written.items()}
    written |= {"paper": published.printed(), "settings": published.settings(params, found)}
    written["comparison"] = published.comparison(written["main"], written["differences"])
    for name, frame in written.items():
        file = (costs if name in MEASURED else folder) / f"{name}.csv"
        write_bytes(file, frame.to_csv(index=False, float_format=f"%.{DIGITS}f").encode())
    for name in {"main", "runs", "comparison"} & set(written):
        text, note, sentences = described(params, written, name)
        markdown = [text.to_markdown(index=False, disable_numparse=True), "", note, *([""] if sentences else [])]
        write_bytes(folder / f"{name}.md", "\n".join([*markdown, *sentences, ""]).encode())
        write_bytes(folder / f"{name}.tex", tables.latex(text, note).encode())
    if table == "main":
        rows = written["main"].set_index("architecture").groupby(["objective", "space", "ipc"])["mean"]
        means = {cell.name: rows.get_group(cell.row).to_dict() for cell in found}
        write_json(folder / "metrics.json", means)  # for `dvc metrics`: {cell: {architecture: mean}}
    return written


def described(params: Params, found: dict[str, pd.DataFrame], name: str) -> tuple[pd.DataFrame, str, list[str]]:
    """The table main, runs or comparison laid out as text, a note to it, and sentences that say what is significant."""
    seen, table, dataset = params.distill.network, found[name], params.dataset
    if name == "comparison":
        note = (
            "Mean test accuracy in percent over the architectures that were not used to distill, and paired "
            "differences between spaces. Paper: LD3M, Table 4, 128 px, IPC 10, with what it prints after ±. Ours: ± "
            "half of the 95 % interval. The settings differ (settings.csv): compare the differences between the "
            "spaces and their signs, not the accuracies."
        )
        return published.comparison_table(table), note, []
    if name == "main":
        pairs, changes = "networks", found["differences"]
        over = (
            f"{params.evaluate.seeds} networks trained on one distilled set. {NAMES[seen]} is the architecture used to "
            "distill; the unseen mean is over the others."
        )
    else:
        pairs, changes = "runs", found["runs_differences"]
        over = (
            f"{' to '.join(map(str, sorted({table.n.min(), table.n.max()})))} distillation runs, each from other real "
            "images, with other noise and batches, evaluated by one network of each architecture. spread.csv has the "
            "standard deviations over networks and over runs."
        )
    note = f"Test accuracy in percent on {dataset}: mean ± half of the 95 % t interval over n = {over}"
    return tables.paper_style(table), note, tables.verdicts(changes, seen, paired_by=pairs)


def write_figures(params: Params, written: dict[str, pd.DataFrame], *, table: str) -> list[Path]:
    """Write the figures of what `write_tables` gave, and a sheet of images of every set; return the files."""
    found, folder = first_runs(params, table), reports_path(params.dataset, "figures", table)
    history, validation = _records(found, "history"), _records(found, "validation")
    prior, metadata = read_tensors(runs_path(params.dataset, "prior-check", "images.safetensors"))
    drawn = {"prior": figures.prior_check(**prior, classes=tuple(metadata["classes"]))}
    for ipc in sorted({cell.ipc for cell in found if cell.objective != "none"}):
        drawn |= {
            f"distilled-ipc{ipc}": _distilled(found, ipc),
            f"accuracy-ipc{ipc}": figures.accuracy_by_architecture(written["main"], ipc=ipc),
            f"curves-ipc{ipc}": figures.learning_curves(history, validation, ipc=ipc),
        }
    drawn["gradient-norms"] = figures.gradient_norms(_gradient_norms(params))
    for name in {"differences", "runs_differences"} & set(written):
        drawn[name.replace("_", "-")] = figures.forest(written[name])
    if "ablations" in written and "steps" in set(written["ablations"].ablation):
        drawn["steps"] = figures.accuracy_against_steps(written["ablations"], written["ablation_costs"])
    files = [figures.save(figure, name, folder) for name, figure in drawn.items()]
    for cell in found:
        if cell.ipc:
            x, classes = _images(cell)
            files.append(figures.save_sheet(x, f"set-{cell.name}", columns=len(classes), folder=folder))
    return files


def styled(table: pd.DataFrame, name: str, caption: str, *, headers: int = 1) -> Styler:
    """A table of text for the page; its first `headers` columns are aligned left."""
    text = table.astype(str)
    left = [{"selector": f".col{column}", "props": "text-align: left"} for column in range(headers)]
    return text.style.hide(axis="index").set_uuid(name).set_caption(caption).set_table_styles(left)


def write_page(notebook: Path, file: Path) -> None:
    """Write an executed notebook as one file without code, scripts or references to other files."""
    import nbformat  # takes a second, as does the next
    from nbconvert import HTMLExporter

    executed = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True, embed_images=True)
    exporter.exclude_anchor_links = True
    body, _ = exporter.from_notebook_node(executed)
    title = executed.cells[0].source.splitlines()[0].lstrip("# ")
    page = jinja2.Template(Path(__file__).with_name("report.html").read_text(), keep_trailing_newline=True)
    write_bytes(file, page.render(title=title, body=body).encode())


def _gradient_norms(params: Params) -> pd.DataFrame:
    return pd.DataFrame(json.loads(runs_path(params.dataset, "gradient_norms.json").read_text()))


def _check(folder: Path) -> pd.DataFrame:
    """The measurements of a prior, in one row."""
    return pd.DataFrame([json.loads((folder / "check.json").read_text())])


def _distilled(found: list[Cell], ipc: int) -> Figure:
    """Draw a row for each cell and control: the first image of every class."""
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
    """`history` or `validation` of every distilled cell, with columns cell, objective, space and ipc."""
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
