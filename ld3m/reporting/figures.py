"""The figures of the report; each function returns a matplotlib Figure, `save` writes it with bytes that repeat."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from ld3m.evaluation.artefact import to_pil
from ld3m.evaluation.statistics import interval
from ld3m.pipeline.cells import NAMES, UNSEEN
from ld3m.reporting.tables import name_of

plt.style.use(["seaborn-v0_8-whitegrid", "seaborn-v0_8-paper", {"lines.markeredgewidth": 1, "axes.linewidth": 0.8}])
SHEET_ROWS, SHEET_PX = 10, 64  # a sheet shows no more images a class, and none larger
DASHES = {"grad_norm_w": "--", "grad_norm_c": "--", "grad_norm_student_lr": ":"}  # what is learned beside the images
SPACE_COLORS = {"Pixel": "#d95f02", "GLaD": "#7570b3", "LD3M": "#1b9e77"}


def save(figure: Figure, name: str, folder: Path) -> Path:
    """Write <folder>/<name>.png and return that file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    figure.savefig(file, dpi=150, bbox_inches="tight", metadata={"Software": None})
    return file


def save_sheet(pixels: Tensor, name: str, *, columns: int, folder: Path) -> Path:
    """Write pixels (N, C, H, W), sorted by class, as one image without axes, one column per class; return the file."""
    rows = pixels.unflatten(0, (columns, -1)).transpose(0, 1)[:SHEET_ROWS]  # (rows, columns, C, H, W)
    size_px = min(SHEET_PX, pixels.shape[-1])
    small = torch.nn.functional.interpolate(rows.flatten(0, 1).clamp(-1, 1), size=size_px, mode="area")
    framed = torch.nn.functional.pad(small, (0, 1, 0, 1), value=1.0).unflatten(0, rows.shape[:2])
    sheet = framed.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (C, rows h, columns w)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    to_pil(sheet[None])[0].save(file, optimize=True)
    return file


def _closed(figure: Figure, *, tight: bool = True) -> Figure:
    """The figure, forgotten by pyplot, so that a notebook shows it once."""
    if tight:
        figure.tight_layout()
    plt.close(figure)
    return figure


def image_rows(rows: dict[str, Tensor], *, columns: list[str] | None = None, size_inch: float = 0.62) -> Figure:
    """One labeled row of images per entry; every value is pixels (n, C, H, W), shown clamped to [-1, 1]."""
    count = max(len(pixels) for pixels in rows.values())
    figure, axes = plt.subplots(
        len(rows), count, figsize=(size_inch * count + 1.2, size_inch * len(rows) + 0.3), squeeze=False
    )
    for line, (name, pixels) in zip(axes, rows.items(), strict=True):
        for column, axis in enumerate(line):
            axis.axis("off")
            if column < len(pixels):
                image = ((pixels[column].detach().clamp(-1, 1) + 1) / 2).movedim(0, -1).cpu().numpy()
                axis.imshow(image.repeat(3, axis=-1) if image.shape[-1] == 1 else image, interpolation="nearest")
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
    for axis, title in zip(axes[0], columns or [], strict=False):
        axis.set_title(title, fontsize=8, pad=3)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    return _closed(figure, tight=False)


def accuracy_by_architecture(summary: pd.DataFrame, *, ipc: int) -> Figure:
    """Test accuracy of every distilled set and control of one IPC, with 95 % intervals; one panel an architecture."""
    frame = summary[summary.ipc.isin([ipc, 0])].assign(Set=name_of)
    networks, sets = list(dict.fromkeys(frame.architecture)), list(dict.fromkeys(frame.Set))
    size = (1.75 * len(networks) + 1, 0.28 * len(sets) + 0.8)
    figure, axes = plt.subplots(1, len(networks), figsize=size, sharey=True)
    for axis, network in zip(np.atleast_1d(axes), networks, strict=True):
        part = frame[frame.architecture == network].set_index("Set").loc[sets]
        for place, row in enumerate(part.itertuples()):
            ends = [[100 * (row.mean - row.ci_low)], [100 * (row.ci_high - row.mean)]]
            color = SPACE_COLORS.get(row.Index.split()[-1], "#666666")
            axis.errorbar(100 * row.mean, place, xerr=ends, fmt="o", ms=3, capsize=2, color=color)
        axis.set(title=NAMES[network], yticks=range(len(sets)), yticklabels=sets, ylim=(len(sets) - 0.5, -0.5))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel(f"IPC {ipc}: test accuracy, % (mean and 95 % interval); each panel has its own scale", fontsize=9)
    return _closed(figure)


def forest(changes: pd.DataFrame) -> Figure:
    """Differences of the unseen mean with 95 % intervals, in points; filled where the interval leaves zero out."""
    shown = changes[changes.architecture == UNSEEN]
    minus = shown.minus.map(NAMES).replace("Random real", "random real")
    names = [f"IPC {row[0]}: {row[1]} - {row[2]}" for row in zip(shown.ipc, name_of(shown), minus, strict=True)]
    return _intervals(shown, names, label="difference of the unseen mean, points of accuracy (95 % interval)")


def ablation_forest(changes: pd.DataFrame, ablation: str) -> Figure:
    """Changes of the mean over the unseen architectures, in points, with 95 % intervals."""
    shown = changes[(changes.ablation == ablation) & (changes.architecture == UNSEEN)]
    label = "change of the mean over the unseen architectures, points (95 % interval)"
    return _intervals(shown, list(shown.setting), label=label)


def _intervals(changes: pd.DataFrame, names: Sequence[str], *, label: str) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 0.24 * len(names) + 0.7))
    axis.axvline(0, color="0.4", lw=1)
    for place, row in enumerate(changes.itertuples()):
        color = "#1b9e77" if row.ci_low > 0 else "#d95f02" if row.ci_high < 0 else "0.5"
        axis.plot([100 * row.ci_low, 100 * row.ci_high], [place, place], color=color, lw=2, solid_capstyle="round")
        significant = row.ci_low > 0 or row.ci_high < 0
        axis.plot(100 * row.mean, place, "o", ms=5, color=color, mfc=color if significant else "white")
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlabel=label)
    return _closed(figure)


def learning_curves(history: pd.DataFrame, validation: pd.DataFrame, *, ipc: int) -> Figure:
    """Loss, validation accuracy and the gradient norm of every learnable over iterations; one column an objective."""
    history, validation = history[history.ipc == ipc], validation[validation.ipc == ipc]
    objectives = list(dict.fromkeys(history.objective))
    figure, axes = plt.subplots(3, len(objectives), figsize=(3.3 * len(objectives), 6.2), squeeze=False, sharex="col")
    learnables = [name for name in history.columns if name.startswith("grad_norm_")]
    for column, objective in zip(axes.T, objectives, strict=True):
        for space, run in history[history.objective == objective].groupby("space"):
            color = SPACE_COLORS.get(NAMES[space], "#666666")
            column[0].plot(run.step, run.loss.rolling(5, min_periods=1).mean(), color=color, label=NAMES[space])
            checks = validation[(validation.objective == objective) & (validation.space == space)]
            column[1].plot(checks.iteration, 100 * checks.accuracy, "o", ms=4, color=color)
            column[1].plot(checks.iteration, 100 * checks.accuracy, ":", lw=0.7, alpha=0.6, color=color)
            for name in learnables:
                if run[name].notna().any():
                    label = f"{NAMES[space]} {name.removeprefix('grad_norm_')}"
                    smooth = run[name].rolling(5, min_periods=1).mean()
                    column[2].plot(run.step, smooth, DASHES.get(name, "-"), color=color, label=label)
        column[0].set(title=f"{NAMES[objective]}, IPC {ipc}", yscale="log")
        column[2].set(yscale="log", xlabel="iteration")
        column[2].legend(fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
        for axis, ticks in ((column[0], (1, 2, 3, 5, 7)), (column[2], (1, 3))):
            axis.yaxis.set_major_locator(LogLocator(subs=ticks))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].legend(fontsize=7)
    labels = ["matching loss\n(mean of 5)", "validation, %\n(at the dots alone)", "gradient norm\n(mean of 5)"]
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    return _closed(figure)


def networks(accuracies: dict[int, dict[str, list[float]]]) -> Figure:
    """Test accuracies {run: {architecture: one a network}}: a line a network, and means with 95 % intervals over the
    networks of one run, or over several runs by the first network of each."""
    names = list(next(iter(accuracies.values())))
    rows = [network for run in accuracies.values() for network in zip(*run.values(), strict=True)]
    frame = 100 * pd.DataFrame(rows, columns=names)
    figure, axis = plt.subplots(figsize=(1.2 * len(names) + 1.5, 3))
    axis.plot(range(len(names)), frame.T.to_numpy(), "o-", color="0.7", ms=3, lw=0.6)
    independent = frame if len(accuracies) == 1 else 100 * pd.DataFrame(accuracies.values()).map(lambda of: of[0])
    for place, name in enumerate(names if len(independent) > 1 else ()):
        mean, low, high = interval(independent[name])
        axis.errorbar(place + 0.15, mean, yerr=[[mean - low], [high - mean]], fmt="o", ms=5, capsize=3, color="#1b9e77")
    axis.set(xticks=range(len(names)), xticklabels=[NAMES[name] for name in names], ylabel="test accuracy, %")
    return _closed(figure)


def run_curves(history: pd.DataFrame, checks: pd.DataFrame) -> Figure:
    """Loss, validation accuracy (the chosen iteration is marked) and gradient norms of one run over its iterations."""
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.6))
    axes[0].plot(history.step, history.loss)
    axes[1].plot(checks.iteration, 100 * checks.accuracy, "o-", ms=3)
    axes[1].axvline(checks.iteration[checks.accuracy.idxmax()], color="0.6", ls=":")
    for name in history.columns[history.columns.str.startswith("grad_norm_")]:
        axes[2].plot(history.step, history[name], label=name.removeprefix("grad_norm_"))
    axes[0].set(title="matching loss", yscale="log", xlabel="iteration")
    axes[1].set(title="validation accuracy, %", xlabel="iteration")
    axes[2].set(title="gradient norm", yscale="log", xlabel="iteration")
    axes[2].legend()
    return _closed(figure)


def gradient_norms(norms: pd.DataFrame) -> Figure:
    """Gradient norm of the learned latent against the number of steps, one line for each skip and parametrization:
    the mean over images, with bars from the smallest to the largest where there are several.

    Columns: skip, learned ("z" or "z_T"), steps, image, norm.
    """
    import seaborn as sns  # takes most of a second, for scipy.stats

    frame = norms.assign(skip=norms.skip.map({"x0": "x0 (released code)", "mean": "mean (eq. 7)", "none": "none"}))
    grid = sns.relplot(
        frame, x="steps", y="norm", hue="skip", style="skip", col="learned", kind="line", markers=True, dashes=False,
        errorbar=("pi", 100) if norms.image.nunique() > 1 else None, err_style="bars", height=2.9, aspect=1.15,
    )  # fmt: skip
    grid.set(xscale="log", yscale="log", xlabel="number of steps T", ylabel="gradient norm of what is learned")
    for axis, learned in zip(grid.axes.flat, grid.col_names, strict=True):
        axis.set_title({"z": "learned: $z$", "z_T": "learned: $z_T$"}[learned])
    for axis in grid.axes.flat:
        axis.set_xticks(sorted(norms.steps.unique()), map(str, sorted(norms.steps.unique())))
        axis.minorticks_off()
    return _closed(grid.figure, tight=False)


def training_losses(losses: dict[str, list[float]]) -> Figure:
    """The loss of every training step (mean of 50), one panel a network."""
    figure, axes = plt.subplots(1, len(losses), figsize=(3.5 * len(losses), 2.6))
    for axis, (name, values) in zip(np.atleast_1d(axes), losses.items(), strict=True):
        axis.plot(pd.Series(values).rolling(50, min_periods=1).mean())
        axis.set(title=f"{name} loss (mean of 50)", xlabel="step", yscale="log")
    return _closed(figure)


def accuracy_against_steps(ablations: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """Accuracy with 95 % intervals, and seconds an iteration, against the number of steps T (ablation "steps")."""
    steps = [
        frame[frame.ablation == "steps"].assign(T=lambda f: f.setting.astype(str).str.extract(r"(\d+)")[0].astype(int))
        for frame in (ablations, costs)
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.1), width_ratios=(3, 2))
    for architecture, part in steps[0].sort_values("T").groupby("architecture", sort=False):
        mean, low, high = (100 * part[column] for column in ("mean", "ci_low", "ci_high"))
        thick = {"lw": 2.4, "color": "black"} if architecture == UNSEEN else {"lw": 1}
        axes[0].errorbar(
            part["T"], mean, yerr=(mean - low, high - mean), fmt="o-", ms=3, label=NAMES[architecture], **thick
        )
    axes[1].plot(*steps[1].sort_values("T")[["T", "seconds_per_iteration"]].to_numpy().T, "o-", ms=4, color="black")
    axes[0].set(title="test accuracy, % (mean and 95 % interval)", xlabel="number of steps T")
    axes[0].legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    axes[1].set(title="seconds an iteration", xlabel="number of steps T", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(sorted(steps[0]["T"].unique()))
    return _closed(figure)


def prior_check(
    real: Tensor, reconstructed: Tensor, samples: Tensor, classes: tuple[str, ...], *, rows: int = 4
) -> Figure:
    """Real validation images, their reconstructions, and guided samples, one column a class (pixels)."""
    count = len(classes)
    shown = {"real": real[:count], "reconstructed": reconstructed[:count]}
    shown |= {f"guided sample {k + 1}": samples[k * count : (k + 1) * count] for k in range(rows)}
    return image_rows(shown, columns=list(classes))
