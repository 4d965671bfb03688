"""From scores to tables. Cells are enumerated from the grid, never found by looking: a missing one is an error."""

import json
from typing import Any

import pandas as pd

from ld3m import paths
from ld3m.metrics import interval
from ld3m.schema import Params

COLUMNS = ["dataset", "ipc", "objective", "space", "architecture", "n", "mean", "ci_low", "ci_high"]
CHANGES = ["ipc", "objective", "space", "minus", "architecture", "n", "mean", "ci_low", "ci_high"]
COSTS = ["dataset", "ipc", "objective", "space", "iterations", "seconds", "peak_mib"]
UNSEEN = "unseen"  # the mean over the architectures that were not used to distil
NAMES = {
    "convnet": "ConvNet", "alexnet": "AlexNet", "vgg11": "VGG11", "resnet18": "ResNet18", "vit": "ViT",
    "dc": "DC", "dm": "DM", "mtt": "MTT", "pixel": "Pixel", "glad": "GLaD", "ld3m": "LD3M", "none": "-",
    "random_real": "Random real", "herding": "Herding", "k_center": "k-center",
    "iteration0": "Iteration 0", "prior_samples": "Prior samples",
    "full_data": "Full data", UNSEEN: "Unseen mean",
}  # fmt: skip


def cells(params: Params) -> list[tuple[str, str, int]]:
    """(objective, space, ipc) of every row: the controls first, the full data (ipc 0) last."""
    controls = [("none", control, ipc) for ipc in params.grid.ipc for control in params.grid.control]
    distilled = [
        (objective, space, ipc)
        for ipc in params.grid.ipc
        for objective in params.grid.objective
        for space in params.grid.space
    ]
    return [*controls, *distilled, ("none", "full_data", 0)]


def read_scores(params: Params) -> pd.DataFrame:
    """One row per cell, architecture and seed: dataset, ipc, objective, space, architecture, seed, accuracy."""
    rows = []
    for objective, space, ipc in cells(params):
        for architecture in params.grid.architecture:
            file = paths.scores_folder(params.place(space), f"{objective}-{space}-{ipc}") / f"{architecture}.json"
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: `dvc repro` makes it, or take the cell out of `grid`")
            accuracies = json.loads(file.read_text())["accuracy"]
            if len(accuracies) != params.evaluate.seeds:
                raise ValueError(
                    f"{file} has {len(accuracies)} seeds, evaluate.seeds is {params.evaluate.seeds}: dvc repro"
                )
            for seed, accuracy in enumerate(accuracies):
                rows.append((params.dataset, ipc, objective, space, architecture, seed, accuracy))
    columns = ["dataset", "ipc", "objective", "space", "architecture", "seed", "accuracy"]
    return pd.DataFrame(rows, columns=columns)


def with_unseen_mean(scores: pd.DataFrame, seen: str) -> pd.DataFrame:
    """The scores with, for every cell and seed, the mean over the unseen architectures as one more."""
    keys = ["dataset", "ipc", "objective", "space", "seed"]
    unseen = scores[scores.architecture != seen].groupby(keys, sort=False).accuracy.mean().reset_index()
    return pd.concat([scores, unseen.assign(architecture=UNSEEN)], ignore_index=True)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """`COLUMNS`: one row per cell and architecture; the interval is over seeds."""
    keys = ["dataset", "ipc", "objective", "space", "architecture"]
    rows = [(*key, len(group), *interval(group.accuracy)) for key, group in scores.groupby(keys, sort=False)]
    return pd.DataFrame(rows, columns=COLUMNS)


def read_costs(params: Params) -> pd.DataFrame:
    """What distilling every cell took: the seconds of its iterations, and the largest memory of its process."""
    rows = []
    for objective, space, ipc in cells(params):
        if objective != "none":
            file = paths.cost_file(params.place(space), f"{objective}-{space}-{ipc}")
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: `dvc repro` makes it, or take the cell out of `grid`")
            rows.append((params.dataset, ipc, objective, space, *map(json.loads(file.read_text()).get, COSTS[4:])))
    return pd.DataFrame(rows, columns=COSTS)


def read_ablations(params: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy with its interval over networks, and cost, of every setting of every ablation.

    A setting that changes nothing has the numbers of the baseline, which is run once.
    """
    files = {name: paths.ablation_file(params.dataset, name) for name in params.ablations.settings}
    if absent := [str(file) for file in files.values() if not file.is_file()]:
        raise FileNotFoundError(f"{', '.join(absent)} missing: `dvc repro ablation` makes them")
    records = {name: {r["setting"]: r for r in json.loads(file.read_text())} for name, file in files.items()}
    (baseline,) = records.pop("baseline").values()
    scores, costs = [], []
    for name, found in records.items():
        for setting in params.ablations.settings[name]:
            record = found.get(setting, baseline)
            cell = (params.dataset, name, setting, record["objective"], record["space"], 1)
            accuracy = pd.DataFrame(record["accuracy"])
            unseen = accuracy.drop(columns=params.distill.network).mean(axis=1)
            for architecture, values in accuracy.assign(**{UNSEEN: unseen}).items():
                scores.append((*cell, architecture, len(values), *interval(values)))
            norms = [record.get(f"grad_norm_{latent}") for latent in ("z", "z_T", "c")]
            measured = (norms[0] if norms[0] is not None else norms[1], norms[2])
            costs.append((*cell[:3], *measured, record["seconds_per_iteration"], record["peak_mib"]))
    keys = ["dataset", "ablation", "setting"]
    columns = [*keys, "objective", "space", "ipc", "architecture", "n", "mean", "ci_low", "ci_high"]
    measures = ["grad_norm_z", "grad_norm_c", "seconds_per_iteration", "peak_mib"]
    return pd.DataFrame(scores, columns=columns), pd.DataFrame(costs, columns=[*keys, *measures])


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """`CHANGES`: every distilled set minus random real images, and LD3M minus the other spaces, paired by seed."""
    by_cell = scores[scores.ipc > 0].pivot(
        index=["ipc", "architecture", "seed"], columns=["objective", "space"], values="accuracy"
    )
    rows = []
    for objective, space in by_cell.columns:
        others = [("none", "random_real")] if objective != "none" else []
        others += [(objective, "pixel"), (objective, "glad")] if space == "ld3m" else []
        for other in others:
            if other in by_cell.columns:
                paired = (by_cell[(objective, space)] - by_cell[other]).dropna()
                for (ipc, architecture), group in paired.groupby(level=["ipc", "architecture"], sort=False):
                    rows.append((ipc, objective, space, other[1], architecture, len(group), *interval(group)))
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


def verdicts(changes: pd.DataFrame, seen: str) -> list[str]:
    """Plain sentences: is LD3M above the others on unseen architectures, is every set above random real images?"""
    between = changes[(changes.minus != "random_real") & (changes.architecture == UNSEEN)]
    against_real = changes[(changes.minus == "random_real") & (changes.architecture == seen)]
    lines = []
    for row in between.itertuples():
        other = NAMES[row.minus] if row.minus != "pixel" else "pixel"
        if row.ci_low > 0:
            verdict = f"LD3M is above {other}"
        elif row.ci_high < 0:
            verdict = f"**LD3M is below {other}**"
        else:
            verdict = f"**LD3M and {other} are not told apart**"
        lines.append(
            f"- {NAMES[row.objective]}, IPC {row.ipc}: {verdict} on the unseen architectures; the difference is "
            f"{_points(row)}, paired over {row.n} seeds."
        )
    for row in against_real.itertuples():
        told = "above" if row.ci_low > 0 else "**not clearly above**"
        name = f"{NAMES[row.objective]} {NAMES[row.space]}, IPC {row.ipc}"
        lines.append(f"- {name}: {told} random real images on {NAMES[seen]}, by {_points(row)}.")
    return lines


def _points(row: Any) -> str:
    return f"{100 * row.mean:+.1f} points (95 % interval {100 * row.ci_low:+.1f} to {100 * row.ci_high:+.1f})"
