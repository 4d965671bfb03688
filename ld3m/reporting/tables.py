"""From scores to tables. Cells are enumerated from the parameters, never globbed: a missing one is an error."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ld3m.evaluation.scores import read_scores
from ld3m.evaluation.statistics import STATISTICS, Accuracies, compare, interval, p_value
from ld3m.pipeline.cells import NAMES, UNSEEN, Cell, cells, costs_path, runs_path
from ld3m.pipeline.params import Params

SCORES = ["dataset", "ipc", "objective", "space", "run", "architecture", "seed", "accuracy"]
CELL = ["ipc", "objective", "space", "architecture"]
SPREAD = [*CELL, "networks", "runs", "net_sd", "run_sd", "total_sd"]
COLUMNS = ["dataset", "ipc", "objective", "space", "architecture", "n", "mean", "ci_low", "ci_high"]
CHANGES = ["ipc", "objective", "space", "minus", "architecture", "n", "mean", "ci_low", "ci_high", "p"]
MEASURES = {
    "classifier_accuracy": "Accuracy of the classifier on real images",
    "sample_class_accuracy": "Share of samples that it gives the class asked for",
    "samples": "Samples",
    "mse": "Reconstruction: mean squared error",
    "psnr_db": "Reconstruction: dB",
    "spread": "Distance within a class, of that of real images",
}
COSTS = ["dataset", "ipc", "objective", "space", "iterations", "seconds", "peak_mib"]


def scores_of_run_0(params: Params, found: list[Cell]) -> pd.DataFrame:
    """`SCORES` of run 0 of some cells: one row a cell, architecture and network."""
    return pd.concat([_scores(params, cell, (0,)) for cell in found], ignore_index=True)


def scores_of_runs(params: Params) -> pd.DataFrame:
    """`SCORES` of every run of the rows that have several."""
    found = cells(params)
    runs = Counter(cell.row for cell in found for _ in cell.runs)
    frames = [_scores(params, cell, cell.runs) for cell in found if runs[cell.row] > 1]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=SCORES)


def _scores(params: Params, cell: Cell, runs: Iterable[int]) -> pd.DataFrame:
    rows = []
    for run in runs:
        file = cell.scores / "scores.json"
        scores = read_scores(file).runs
        for architecture in params.architectures:
            accuracies = scores.get(run, {}).get(architecture, [])
            if len(accuracies) != params.networks_a_set(run):
                raise ValueError(
                    f"{file} has {len(accuracies)} networks of {architecture} for run {run}, params.yaml asks for "
                    f"{params.networks_a_set(run)} (evaluate.seeds, evaluate.seeds_further_runs): dvc repro"
                )
            keys = (params.dataset, cell.ipc, cell.objective, cell.space, run, architecture)
            rows += [(*keys, seed, accuracy) for seed, accuracy in enumerate(accuracies)]
    return pd.DataFrame(rows, columns=SCORES)


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


def read_metrics(params: Params, found: list[Cell]) -> pd.DataFrame:
    """`statistics.compare` for run 0 of every distilled set and control, beside random real images and the full
    data."""

    def accuracies(cell: Cell) -> Accuracies:
        scores = read_scores(cell.scores / "scores.json").runs[0]
        return {architecture: scores[architecture] for architecture in params.architectures}

    rows, frames = {cell.row: accuracies(cell) for cell in found}, []
    for (objective, space, ipc), of_cell in rows.items():
        if ipc and space != "random_real":
            controls = {"random_real": rows["none", "random_real", ipc], "full_data": rows["none", "full_data", 0]}
            frame = compare(of_cell, **controls)
            frames.append(frame.assign(ipc=ipc, objective=objective, space=space))
    table = pd.concat(frames, ignore_index=True)
    return table[[*CELL, *table.columns.difference(CELL, sort=False)]]


def read_costs(params: Params, found: list[Cell]) -> pd.DataFrame:
    """`COSTS` of run 0 of every distilled cell: seconds of its iterations, and the peak memory of its process."""
    rows = []
    for cell in found:
        if cell.objective != "none":
            file = cell.cost_file(0)
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: `dvc repro` makes it, or take the cell out of params.yaml")
            cost = json.loads(file.read_text())
            rows.append((params.dataset, cell.ipc, cell.objective, cell.space, *(cost[key] for key in COSTS[4:])))
    return pd.DataFrame(rows, columns=COSTS)


def read_ablations(params: Params) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Of every setting of every ablation: accuracy with its interval over networks; the change of it, paired by
    network, against the baseline, or the ablation's first setting of another objective or space; and cost.

    A setting that changes nothing has the numbers of the baseline, which is measured once.
    """
    records, measured = (
        {name: _by_setting(place(params.dataset, "ablations", f"{name}.json")) for name in params.ablations.settings}
        for place in (runs_path, costs_path)
    )
    ablation, setting = params.ablations.baseline
    baseline, baseline_cost = records[ablation][setting], measured[ablation][setting]
    scores, changes, costs = [], [], []
    for name, found in records.items():
        references = {(baseline["objective"], baseline["space"]): baseline}
        for setting in params.ablations.settings[name]:
            record = found.get(setting, baseline)
            cell = (params.dataset, name, setting, record["objective"], record["space"], 1)
            compared = references.setdefault(cell[3:5], record)
            accuracy, reference = (_with_unseen(of["accuracy"], params.distill.network) for of in (record, compared))
            for architecture, values in accuracy.items():
                scores.append((*cell, architecture, len(values), *interval(values)))
                if record is not compared:
                    change = values - reference[architecture]
                    changes.append((*cell, architecture, len(values), *interval(change), p_value(change)))
            norms = [record.get(f"grad_norm_{latent}") for latent in ("z", "z_T", "c")]
            cost = measured[name].get(setting, baseline_cost)
            latent = norms[0] if norms[0] is not None else norms[1]
            costs.append((*cell[:3], latent, norms[2], cost["seconds_per_iteration"], cost["peak_mib"]))
    keys = ["dataset", "ablation", "setting"]
    columns = [*keys, "objective", "space", "ipc", "architecture", "n", "mean", "ci_low", "ci_high"]
    measures = ["grad_norm_z", "grad_norm_c", "seconds_per_iteration", "peak_mib"]
    return (
        pd.DataFrame(scores, columns=columns),
        pd.DataFrame(changes, columns=[*columns, "p"]),
        pd.DataFrame(costs, columns=[*keys, *measures]),
    )


def _with_unseen(accuracy: dict[str, list[float]], seen: str) -> pd.DataFrame:
    frame = pd.DataFrame(accuracy)
    return frame.assign(**{UNSEEN: frame.drop(columns=seen).mean(axis=1)})


def _by_setting(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: `dvc repro ablation` makes it")
    return {record["setting"]: record for record in json.loads(file.read_text())}


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


def paper_style(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows space x objective, columns architectures and the mean over unseen ones; percent, mean ± half interval."""
    table = summary.assign(
        Set=summary.objective.map(NAMES) + " " + summary.space.map(NAMES),
        text=[
            f"{100 * m:.1f} ± {100 * (high - m):.1f}" for m, high in zip(summary["mean"], summary.ci_high, strict=True)
        ],
    )
    table["Set"] = table["Set"].str.removeprefix("- ")
    table["IPC"] = table.ipc.map(lambda ipc: ipc or "all")
    pivot = table.pivot(index=["IPC", "Set"], columns="architecture", values="text")
    order = table[["IPC", "Set"]].drop_duplicates()
    architectures = list(dict.fromkeys(summary.architecture))
    return (
        pivot.loc[pd.MultiIndex.from_frame(order), architectures]
        .rename(columns=NAMES)
        .reset_index()
        .rename_axis(columns=None)
    )


def verdicts(changes: pd.DataFrame, seen: str, *, paired_by: str) -> list[str]:
    """State which differences are significant at 95 %: of LD3M and the other spaces and herding on the unseen
    architectures, of every set and random real images on the architecture that distilled.

    `paired_by` is the plural of what the pairs are: networks or runs."""
    changes = changes.sort_values("ipc", kind="stable")
    between = changes[changes.minus.isin(["pixel", "glad", "herding"]) & (changes.architecture == UNSEEN)]
    against_real = changes[(changes.minus == "random_real") & (changes.architecture == seen)]
    lines = []
    for row in between.itertuples():
        other = NAMES[row.minus] if row.minus == "glad" else row.minus
        if row.ci_low > 0:
            verdict = f"LD3M is significantly better than {other}"
        elif row.ci_high < 0:
            verdict = f"**LD3M is significantly worse than {other}**"
        else:
            verdict = f"**no significant difference between LD3M and {other}**"
        lines.append(
            f"- {NAMES[row.objective]}, IPC {row.ipc}: {verdict} on the unseen architectures: {_points(row)}, paired "
            f"over {row.n} {paired_by}."
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


def name_of(frame: pd.DataFrame) -> pd.Series:
    """The names of sets as they are read: "DM LD3M", "Random real"."""
    return (frame.objective.map(NAMES) + " " + frame.space.map(NAMES)).str.removeprefix("- ")


def shown_differences(changes: pd.DataFrame) -> pd.DataFrame:
    """Lay differences of the unseen mean out in points of accuracy."""
    shown = changes[changes.architecture == UNSEEN]
    first = {"IPC": shown.ipc, "Set": name_of(shown), "Minus": shown.minus.map(NAMES)}
    return pd.DataFrame(first | _intervals(shown))


def shown_ablation(changes: pd.DataFrame, ablations: pd.DataFrame, ablation: str) -> pd.DataFrame:
    """Lay one ablation out: the mean over its unseen architectures in percent, and its change in points."""
    of = [frame[(frame.ablation == ablation) & (frame.architecture == UNSEEN)] for frame in (ablations, changes)]
    table = of[0][["setting", "mean"]].assign(mean=(100 * of[0]["mean"]).map("{:.1f}".format))
    table = table.merge(of[1][["setting"]].assign(**_intervals(of[1])), on="setting", how="left").fillna("–")
    unseen = [NAMES[name] for name in dict.fromkeys(ablations.architecture) if name != UNSEEN][1:]
    return table.rename(columns={"setting": "Setting", "mean": f"Mean of {' and '.join(unseen)}, %"})


def _intervals(changes: pd.DataFrame) -> dict[str, list[str]]:
    points = [(100 * row.mean, 100 * row.ci_low, 100 * row.ci_high) for row in changes.itertuples()]
    return {
        "Points": [f"{mean:+.1f}".replace("-", "−") for mean, _, _ in points],
        "95 % interval": [f"{low:+.1f} to {high:+.1f}".replace("-", "−") for _, low, high in points],
        "p": ["<0.001" if p < 0.001 else f"{p:.3f}" for p in changes.p],
        "n": [str(n) for n in changes.n],
    }


def shown_spread(spread: pd.DataFrame) -> pd.DataFrame:
    """Lay standard deviations out in points of accuracy, of the distilling architecture and the unseen mean."""
    shown = spread[spread.architecture.isin([spread.architecture.iloc[0], UNSEEN])]
    names = name_of(shown).replace("all all", "All distilled sets")
    frame = pd.DataFrame({"Set": names, "Network": shown.architecture.map(NAMES)})
    labels = {"net_sd": "Networks on one set", "run_sd": "Runs beyond that", "total_sd": "Both together"}
    return frame.assign(**{label: (100 * shown[column]).map("{:.1f}".format) for column, label in labels.items()})


def shown_metrics(metrics: pd.DataFrame) -> pd.DataFrame:
    """Lay the statistics of every set out beside the accuracies that they compare, means over architectures."""
    shown = metrics[metrics.architecture == "mean"]
    values = {"accuracy": "Accuracy", "random_real": "Random real", "full_data": "Full data"}
    values |= {name: name for name in STATISTICS}
    frame = pd.DataFrame({"IPC": shown.ipc, "Set": name_of(shown)})
    return frame.assign(**{label: shown[column].map("{:.3f}".format) for column, label in values.items()})


def shown_validation(checks: pd.DataFrame) -> pd.DataFrame:
    """Lay validation accuracies at iteration 0 and at the last check out in percent."""
    ends = checks.groupby(["ipc", "objective", "space"], sort=False).accuracy.agg(["first", "last"]).reset_index()
    start, end = ((100 * ends[column]).map("{:.1f}".format) for column in ("first", "last"))
    return pd.DataFrame({"IPC": ends.ipc, "Set": name_of(ends), "Start": start, "End": end})


def shown_costs(costs: pd.DataFrame) -> pd.DataFrame:
    """Lay iterations, seconds and peak memory of every distilled set out."""
    frame = pd.DataFrame({"IPC": costs.ipc, "Set": name_of(costs), "Iterations": costs.iterations})
    return frame.assign(Seconds=costs.seconds.map("{:.0f}".format), **{"Peak MiB": costs.peak_mib.map("{:.0f}".format)})
