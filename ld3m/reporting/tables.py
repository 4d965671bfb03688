"""From scores to tables. Cells are enumerated from the parameters, never globbed: a missing one is an error."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from ld3m.evaluation.scores import read_scores
from ld3m.evaluation.statistics import STATISTICS, compare, interval, p_value
from ld3m.pipeline.cells import NAMES, UNSEEN, Cell, costs_path, runs_path
from ld3m.pipeline.params import Params

SCORES = ["dataset", "ipc", "objective", "space", "run", "architecture", "seed", "accuracy"]
CELL = ["ipc", "objective", "space", "architecture"]
SPREAD = [*CELL, "networks", "runs", "net_sd", "run_sd", "total_sd"]
COLUMNS = ["dataset", "ipc", "objective", "space", "architecture", "n", "mean", "ci_low", "ci_high"]
CHANGES = ["ipc", "objective", "space", "minus", "architecture", "n", "mean", "ci_low", "ci_high", "p"]
COSTS = ["dataset", "ipc", "objective", "space", "iterations", "seconds", "peak_mib"]
MEASURES = {
    "classifier_accuracy": "Accuracy of the classifier on real images",
    "sample_class_accuracy": "Share of samples that it gives the class asked for",
    "samples": "Samples",
    "mse": "Reconstruction: mean squared error",
    "psnr_db": "Reconstruction: dB",
    "spread": "Distance within a class, of that of real images",
}


def _columns(form: str, **headers: str) -> dict[str, str]:
    return {header: f"{{{column}:{form}}}" for column, header in headers.items()}


SET = {"IPC": "{ipc}", "Set": "{set}"}
POINTS = {"Points": "{mean:+.1f}", "95 % interval": "{ci_low:+.1f} to {ci_high:+.1f}", "p": "{p}", "n": "{n}"}
SDS = _columns(".1f", net_sd="Networks on one set", run_sd="Runs beyond that", total_sd="Both together")
COMPARED = _columns(".3f", accuracy="Accuracy", random_real="Random real", full_data="Full data")
LAYOUTS = {  # {table: {header: text of a row, accuracies in percent, their differences in points}}
    "differences": {**SET, "Minus": "{minus}", **POINTS},
    "ablation_changes": {"Setting": "{setting}", **POINTS},
    "ablations": {"Setting": "{setting}", **_columns(".1f", mean="mean")},
    "spread": {"Set": "{set}", "Network": "{architecture}", **SDS},
    "validation": {**SET, **_columns(".1f", first="Start", last="End")},
    "metrics": {**SET, **COMPARED, **_columns(".3f", **{name: name for name in STATISTICS})},
    "costs": {**SET, "Iterations": "{iterations}", **_columns(".0f", seconds="Seconds", peak_mib="Peak MiB")},
}
PERCENT = ["mean", "ci_low", "ci_high", "net_sd", "run_sd", "total_sd", "first", "last"]


def scores_of(params: Params, found: list[Cell]) -> pd.DataFrame:
    """`SCORES` of every run of some cells: one row a run, architecture and network."""
    rows = []
    for cell in found:
        file = cell.scores / "scores.json"
        scores = read_scores(file).runs
        for run, architecture in product(cell.runs, params.architectures):
            accuracies, asked = scores.get(run, {}).get(architecture, []), params.networks_a_set(run)
            if len(accuracies) != asked:
                raise ValueError(
                    f"{file} has {len(accuracies)} networks of {architecture} for run {run}, params.yaml asks for "
                    f"{asked} (evaluate.seeds, evaluate.seeds_further_runs): dvc repro"
                )
            key = (params.dataset, cell.ipc, cell.objective, cell.space, run, architecture)
            rows += [(*key, seed, accuracy) for seed, accuracy in enumerate(accuracies)]
    return pd.DataFrame(rows, columns=SCORES)


def of_several_runs(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores of the sets that were distilled several times."""
    return scores.groupby(["objective", "space", "ipc"]).filter(lambda of: of.run.nunique() > 1)


def with_unseen_mean(scores: pd.DataFrame, seen: str) -> pd.DataFrame:
    """The scores with, for every cell, run and network, the mean over the unseen architectures as one more."""
    keys = ["dataset", "ipc", "objective", "space", "run", "seed"]
    unseen = scores[scores.architecture != seen].groupby(keys, sort=False).accuracy.mean().reset_index()
    return pd.concat([scores, unseen.assign(architecture=UNSEEN)], ignore_index=True)


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """`COLUMNS`: one row per cell and architecture; the interval is over networks (of one run) or runs (of one
    network each), whichever there are."""
    keys = ["dataset", "ipc", "objective", "space", "architecture"]
    rows = [(*key, len(group), *interval(group.accuracy)) for key, group in scores.groupby(keys, sort=False)]
    return pd.DataFrame(rows, columns=COLUMNS)


def spread(runs: pd.DataFrame) -> pd.DataFrame:
    """`SPREAD`: standard deviations of accuracy over networks and over runs.

    `net_sd` is over the networks of run 0, `total_sd` over runs with one network each, `run_sd` the root of the
    difference of these variances (zero where it is negative). The row "all" has the roots of the mean variances of
    all distilled cells.
    """
    one_each = runs[runs.seed == 0].groupby(CELL, sort=False).accuracy
    of_run_0 = runs[runs.run == 0].groupby(CELL, sort=False).accuracy
    table = pd.DataFrame(
        {"networks": of_run_0.size(), "runs": one_each.size(), "net_var": of_run_0.var(), "total_var": one_each.var()}
    ).reset_index()
    distilled = table[table.objective != "none"]
    pooled = distilled.groupby("architecture", sort=False)[["networks", "runs", "net_var", "total_var"]].mean()
    table = pd.concat([table, pooled.reset_index().assign(ipc=0, objective="all", space="all")], ignore_index=True)
    roots = table.assign(
        net_sd=table.net_var**0.5,
        total_sd=table.total_var**0.5,
        run_sd=(table.total_var - table.net_var).clip(lower=0) ** 0.5,
    )
    return roots.astype({"networks": int, "runs": int})[SPREAD]


def metrics(scores: pd.DataFrame) -> pd.DataFrame:
    """`statistics.compare` of every distilled set and control, beside random real images and the full data."""
    rows, frames = {}, []
    for row, group in scores.groupby(["objective", "space", "ipc"], sort=False):
        rows[row] = group.groupby("architecture", sort=False).accuracy.agg(list).to_dict()
    for (objective, space, ipc), accuracies in rows.items():
        if ipc and space != "random_real":
            controls = {"random_real": rows["none", "random_real", ipc], "full_data": rows["none", "full_data", 0]}
            frame = compare(accuracies, **controls)
            frames.append(frame.assign(ipc=ipc, objective=objective, space=space))
    table = pd.concat(frames, ignore_index=True)
    return table[[*CELL, *table.columns.difference(CELL, sort=False)]]


def read_costs(params: Params, found: list[Cell]) -> pd.DataFrame:
    """`COSTS` of run 0 of every distilled cell: seconds of its iterations, and the peak memory of its process."""
    rows = [
        {"dataset": params.dataset, "ipc": cell.ipc, "objective": cell.objective, "space": cell.space}
        | _read(cell.cost_file(0))
        for cell in found
        if cell.objective != "none"
    ]
    return pd.DataFrame(rows, columns=COSTS)


def _read(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: `dvc repro` makes it, or take what it is of out of params.yaml")
    return json.loads(file.read_text())


def read_ablations(params: Params) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Read every setting of every ablation. One that changes nothing has the numbers of the baseline, measured once.

    Returns
    -------
    tuple of DataFrame
        Accuracy with its interval over networks; its change, paired by network, against the baseline, or against the
        ablation's first setting of the same objective and space where these are not the baseline's; and the cost.
    """
    records, measured = (
        {
            name: {record["setting"]: record for record in _read(place(params.dataset, "ablations", f"{name}.json"))}
            for name in params.ablations.settings
        }
        for place in (runs_path, costs_path)
    )
    ablation, setting = params.ablations.baseline
    baseline, baseline_cost = records[ablation][setting], measured[ablation][setting]
    scores, changes, costs = [], [], []
    for name, found in records.items():
        references = {(baseline["objective"], baseline["space"]): baseline}
        for setting in params.ablations.settings[name]:
            record, cost = found.get(setting, baseline), measured[name].get(setting, baseline_cost)
            cell = (params.dataset, name, setting, record["objective"], record["space"], 1)
            compared = references.setdefault(cell[3:5], record)
            accuracy, reference = (_with_unseen(of["accuracy"], params.distill.network) for of in (record, compared))
            for architecture, values in accuracy.items():
                scores.append((*cell, architecture, len(values), *interval(values)))
                if record is not compared:
                    change = values - reference[architecture]
                    changes.append((*cell, architecture, len(values), *interval(change), p_value(change)))
            norm = record.get("grad_norm_z", record.get("grad_norm_z_T"))
            measures = norm, record.get("grad_norm_c"), cost["seconds_per_iteration"], cost["peak_mib"]
            costs.append((*cell[:3], *measures))
    keys = ["dataset", "ablation", "setting"]
    columns = [*keys, "objective", "space", "ipc", "architecture", "n", "mean", "ci_low", "ci_high"]
    return (
        pd.DataFrame(scores, columns=columns),
        pd.DataFrame(changes, columns=[*columns, "p"]),
        pd.DataFrame(costs, columns=[*keys, "grad_norm_z", "grad_norm_c", "seconds_per_iteration", "peak_mib"]),
    )


def _with_unseen(accuracy: dict[str, list[float]], seen: str) -> pd.DataFrame:
    frame = pd.DataFrame(accuracy)
    return frame.assign(**{UNSEEN: frame.drop(columns=seen).mean(axis=1)})


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """`CHANGES`: every distilled set minus random real images, and LD3M minus the other spaces and controls, paired by
    run and network; `p` is that of the paired t test."""
    by_cell = scores[scores.ipc > 0].pivot(
        index=["ipc", "architecture", "run", "seed"], columns=["objective", "space"], values="accuracy"
    )
    rows = []
    for objective, space in by_cell.columns:
        others = [("none", "random_real")] if objective != "none" else []
        if space == "ld3m":
            controls = ("herding", "k_center", "iteration0", "prior_samples")
            others += [(objective, "pixel"), (objective, "glad"), *(("none", control) for control in controls)]
        for other in others:
            if other in by_cell.columns:
                paired = (by_cell[(objective, space)] - by_cell[other]).dropna()
                for (ipc, architecture), group in paired.groupby(level=["ipc", "architecture"], sort=False):
                    found = len(group), *interval(group), p_value(group)
                    rows.append((ipc, objective, space, other[1], architecture, *found))
    return pd.DataFrame(rows, columns=CHANGES)


def name_of(frame: pd.DataFrame) -> pd.Series:
    """The names of sets as they are read: "DM LD3M", "Random real"."""
    return (frame.objective.map(NAMES) + " " + frame.space.map(NAMES)).str.removeprefix("- ")


def paper_style(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows space x objective, columns architectures and the mean over unseen ones; percent, mean ± half interval."""
    means, highs = summary["mean"], summary.ci_high
    texts = [f"{100 * mean:.1f} ± {100 * (high - mean):.1f}" for mean, high in zip(means, highs, strict=True)]
    table = summary.assign(IPC=summary.ipc.map(lambda ipc: ipc or "all"), Set=name_of(summary), text=texts)
    return wide(table, index=["IPC", "Set"], columns="architecture").rename(columns=NAMES)


def wide(table: pd.DataFrame, *, index: list[str], columns: str) -> pd.DataFrame:
    """The column `text` spread over columns, both in the order in which they come first; "–" where there is none."""
    pivot = table.pivot(index=index, columns=columns, values="text").rename_axis(columns=None).reset_index()
    in_order = table[index].drop_duplicates().merge(pivot, on=index)
    return in_order[[*index, *dict.fromkeys(table[columns])]].fillna("–")


def verdicts(changes: pd.DataFrame, seen: str, *, paired_by: str) -> list[str]:
    """State which differences are significant at 95 %: of LD3M and the other spaces and herding on the unseen
    architectures, of every set and random real images on the architecture that distilled.

    `paired_by` is the plural of what the pairs are: networks or runs."""
    changes = changes.sort_values("ipc", kind="stable")
    between = changes[changes.minus.isin(["pixel", "glad", "herding"]) & (changes.architecture == UNSEEN)]
    against_real = changes[(changes.minus == "random_real") & (changes.architecture == seen)]
    lines = []
    for row in between.itertuples():
        other, better = NAMES[row.minus] if row.minus == "glad" else row.minus, row.ci_low > 0
        verdict = f"LD3M is significantly {'better' if better else 'worse'} than {other}"
        if not (better or row.ci_high < 0):
            verdict = f"no significant difference between LD3M and {other}"
        lines.append(
            f"- {NAMES[row.objective]}, IPC {row.ipc}: {verdict if better else f'**{verdict}**'} on the unseen "
            f"architectures: {_points(row)}, paired over {row.n} {paired_by}."
        )
    for row in against_real.itertuples():
        verdict = "significantly better" if row.ci_low > 0 else "**not significantly better**"
        name = f"{NAMES[row.objective]} {NAMES[row.space]}, IPC {row.ipc}"
        lines.append(f"- {name}: {verdict} than random real images on {NAMES[seen]}: {_points(row)}.")
    return lines


def _points(row: Any) -> str:
    return f"{100 * row.mean:+.1f} points (95 % interval {100 * row.ci_low:+.1f} to {100 * row.ci_high:+.1f})"


def latex(table: pd.DataFrame, caption: str) -> str:
    """Typeset a table of text in LaTeX, its characters escaped."""
    text = table.to_latex(index=False, escape=True, caption=caption.replace("%", r"\%"))
    for given, written in {"±": r"$\pm$", "‖∇": r"$\|\nabla$ ", "‖": r"$\|$", "–": "--"}.items():
        text = text.replace(given, written)
    return text


def shown(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """Lay a table out as text by `LAYOUTS`; of architectures the mean over the unseen ones where it has it."""
    if name == "validation":
        ends = table.groupby(["ipc", "objective", "space"], sort=False).accuracy
        table = ends.agg(["first", "last"]).reset_index()
    if "architecture" in table:
        wanted = {"metrics": ["mean"], "spread": [table.architecture.iloc[0], UNSEEN]}.get(name, [UNSEEN])
        table = table[table.architecture.isin(wanted)]
    if "objective" in table:
        table = table.assign(set=name_of(table).replace("all all", "All distilled sets"))
    if "p" in table:
        table = table.assign(p=["<0.001" if p < 0.001 else f"{p:.3f}" for p in table.p])
    table = table.assign(**{column: 100 * table[column] for column in PERCENT if column in table})
    rows = [
        {header: text.format_map(row) for header, text in LAYOUTS[name].items()}
        for row in table.replace({"minus": NAMES, "architecture": NAMES}).to_dict("records")
    ]
    text = pd.DataFrame(rows, columns=list(LAYOUTS[name]))
    signed = text.columns.intersection(["Points", "95 % interval"])
    return text.assign(**{column: text[column].str.replace("-", "−") for column in signed})


def shown_ablation(changes: pd.DataFrame, ablations: pd.DataFrame, ablation: str) -> pd.DataFrame:
    """Lay one ablation out: the mean over its unseen architectures in percent, and its change in points."""
    means, points = (
        shown(name, frame[frame.ablation == ablation])
        for name, frame in {"ablations": ablations, "ablation_changes": changes}.items()
    )
    unseen = [NAMES[name] for name in dict.fromkeys(ablations.architecture) if name != UNSEEN][1:]
    table = means.merge(points, on="Setting", how="left").fillna("–")
    return table.rename(columns={"mean": f"Mean of {' and '.join(unseen)}, %"})
