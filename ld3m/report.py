"""Gathers what the stages wrote and writes the tables and figures of reports/.

python -m ld3m.report        # copies the main table into README.md
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from ld3m import figures, paths, published
from ld3m.artefact import read_artefact
from ld3m.data import Normalization
from ld3m.schema import Params
from ld3m.storage import read_tensors, write_bytes
from ld3m.tables import (
    COLUMNS,
    NAMES,
    UNSEEN,
    cells,
    differences,
    paper_style,
    read_ablations,
    read_costs,
    read_scores,
    summarise,
    verdicts,
    with_unseen_mean,
)


def write_tables(params: Params, *, folder: Path) -> str:
    """Writes the tables of the grid's cells as csv, those that are read as md and tex too; returns main.md."""
    scores = with_unseen_mean(read_scores(params), params.distill.network)
    summary, changes = summarise(scores), differences(scores)
    table = paper_style(summary)
    note = (
        f"Test accuracy in percent on {params.dataset}: mean ± half of the 95 % t interval over n = "
        f"{params.evaluate.seeds} evaluation seeds of one distilled set. {NAMES[params.distill.network]} is the "
        "architecture used to distil; the unseen mean is over the others."
    )
    markdown = "\n".join(
        [
            table.to_markdown(index=False, disable_numparse=True),
            "",
            note,
            "",
            *verdicts(changes, params.distill.network),
            "",
        ]
    )
    _write_csv(folder, "scores", summary[summary.architecture != UNSEEN][COLUMNS])
    _write_csv(folder, "main", summary)
    _write_csv(folder, "differences", changes)
    _write_csv(folder, "costs", read_costs(params))
    _write_csv(
        folder,
        "gradient_norms",
        _gradient_norms(params).groupby(["learned", "skip", "steps"]).norm.agg(["mean", "min", "max"]).reset_index(),
    )
    _write_csv(folder, "prior", _check(paths.prior_check_folder(params.dataset)))
    if "glad" in params.grid.space:  # the report's, see `Params.with_more`
        _write_csv(folder, "gan", _check(paths.gan_check_folder(params.dataset)))
    write_bytes(folder / "main.md", markdown.encode())
    write_bytes(folder / "main.tex", _latex(table, note))
    _write_comparison(params, summary, changes, folder)
    return markdown


def write_ablations(params: Params, *, folder: Path) -> pd.DataFrame:
    """Writes ablations.csv and ablation_costs.csv; returns the mean accuracies, one row a setting."""
    ablations, costs = read_ablations(params)
    _write_csv(folder, "ablations", ablations)
    _write_csv(folder, "ablation_costs", costs)
    return ablations.pivot_table(
        index=["ablation", "setting"], columns="architecture", values="mean", sort=False
    ).rename(columns=NAMES)


def write_figures(params: Params, *, tables: Path, folder: Path) -> list[Path]:
    """Writes a figure for everything there is to see and returns the files, in reading order."""
    summary = summarise(with_unseen_mean(read_scores(params), params.distill.network))
    history, validation = _records(params, "history"), _records(params, "validation")
    drawn = {"prior": _prior(params)}
    for ipc in params.grid.ipc:
        drawn |= {
            f"distilled-ipc{ipc}": _distilled(params, ipc),
            f"accuracy-ipc{ipc}": figures.accuracy_by_architecture(summary, ipc=ipc),
            f"curves-ipc{ipc}": figures.learning_curves(history, validation, ipc=ipc),
        }
    drawn["gradient-norms"] = figures.gradient_norms(_gradient_norms(params))
    ablations, costs = (tables / f"{name}.csv" for name in ("ablations", "ablation_costs"))
    if ablations.exists() and costs.exists():
        drawn["steps"] = figures.accuracy_against_steps(pd.read_csv(ablations), pd.read_csv(costs))
    files = [figures.save(figure, name, folder) for name, figure in drawn.items()]
    return files + [_sheet(params, cell, folder) for cell in cells(params) if cell[2]]


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
    _write_csv(folder, "settings", published.settings(params))
    write_bytes(folder / "comparison.md", f"{markdown}\n\n{note}\n".encode())
    write_bytes(folder / "comparison.tex", _latex(table, note))


def _latex(table: pd.DataFrame, caption: str) -> bytes:
    return table.to_latex(index=False, caption=caption.replace("%", r"\%")).replace("±", r"$\pm$").encode()


def _gradient_norms(params: Params) -> pd.DataFrame:
    return pd.DataFrame(json.loads(paths.gradient_norms_file(params.dataset).read_text()))


def _check(folder: Path) -> pd.DataFrame:
    """What a prior was measured to be, in one row."""
    return pd.DataFrame([json.loads((folder / "check.json").read_text())])


def _sheet(params: Params, cell: tuple[str, str, int], folder: Path) -> Path:
    pixels, classes = _pixels(params, *cell)
    return figures.save_sheet(pixels, "set-{}-{}-{}".format(*cell), columns=len(classes), folder=folder)


def _write_csv(folder: Path, name: str, frame: pd.DataFrame) -> None:
    write_bytes(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.6f").encode())


def _prior(params: Params) -> Figure:
    shown, metadata = read_tensors(paths.prior_check_folder(params.dataset) / "images.safetensors")
    return figures.prior_check(**shown, classes=tuple(metadata["classes"]))


def _distilled(params: Params, ipc: int) -> Figure:
    """One row a cell or control: the first image of every class."""
    rows, classes = {}, None
    for objective, space, cell_ipc in cells(params):
        if cell_ipc == ipc:
            name = f"{NAMES[objective]} {NAMES[space]}".removeprefix("- ")
            pixels, classes = _pixels(params, objective, space, ipc)
            rows[name] = pixels[::ipc]
    return figures.image_rows(rows, columns=classes)


def _pixels(params: Params, objective: str, space: str, ipc: int) -> tuple[Tensor, list[str]]:
    """Pixels (N, C, H, W) of a cell or a control, and the class names."""
    cell = f"{objective}-{space}-{ipc}"
    if objective == "none":
        tensors, metadata = read_tensors(paths.scores_folder(params.place(space), cell) / "images.safetensors")
        return tensors["pixels"], metadata["classes"]
    tensors, metadata = read_artefact(paths.distilled_folder(params.place(space), cell))
    return Normalization(**metadata["normalization"]).to_pixels(tensors["images"]), metadata["classes"]


def _records(params: Params, key: str) -> pd.DataFrame:
    """`history` or `validation` of every distilled cell, with columns objective, space and ipc."""
    frames = [
        pd.DataFrame(_metadata(params, cell)[key]).assign(objective=cell[0], space=cell[1], ipc=cell[2])
        for cell in cells(params)
        if cell[0] != "none"
    ]
    return pd.concat(frames, ignore_index=True)


def _metadata(params: Params, cell: tuple[str, str, int]) -> dict[str, Any]:
    return read_artefact(paths.distilled_folder(params.place(cell[1]), "{}-{}-{}".format(*cell)))[1]


def with_table(readme: str, table: str) -> str:
    """The text of a README with the table between its two marks."""
    before, _, rest = readme.partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- /table -->\n")
    return f"{before}<!-- table -->\n{table}<!-- /table -->\n{after}"


if __name__ == "__main__":
    readme = paths.ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), (paths.TABLES / "main.md").read_text()))
