"""The figures of the report; each function returns a matplotlib Figure, `save` writes it with bytes that repeat."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from torch import Tensor

from ld3m.reporting.tables import NAMES, UNSEEN
from ld3m.runtime import paths

sns.set_theme(style="whitegrid", context="paper")
SHEET_ROWS, SHEET_PX = 10, 64  # a sheet shows no more images a class, and none larger
DASHES = {"grad_norm_w": "--", "grad_norm_c": "--", "grad_norm_student_lr": ":"}  # what is learned beside the images
SPACE_COLOURS = {"Pixel": "#d95f02", "GLaD": "#7570b3", "LD3M": "#1b9e77"}


def save(figure: Figure, name: str, folder: Path = paths.FIGURES) -> Path:
    """Writes <folder>/<name>.png and returns that file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    figure.savefig(file, dpi=150, bbox_inches="tight", metadata={"Software": None})
    return file


def save_sheet(pixels: Tensor, name: str, *, columns: int, folder: Path = paths.FIGURES) -> Path:
    """Writes pixels (N, C, H, W), sorted by class, as one image without axes, a column a class; returns the file."""
    rows = pixels.unflatten(0, (columns, -1)).transpose(0, 1)[:SHEET_ROWS]  # (rows, columns, C, H, W)
    size_px = min(SHEET_PX, pixels.shape[-1])
    small = torch.nn.functional.interpolate(rows.flatten(0, 1).clamp(-1, 1), size=size_px, mode="area")
    framed = torch.nn.functional.pad(small, (0, 1, 0, 1), value=1.0).unflatten(0, rows.shape[:2])
    sheet = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows h, columns w, C)
    uint8 = ((sheet + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    Image.fromarray(uint8.squeeze(-1) if uint8.shape[-1] == 1 else uint8).save(file, optimize=True)
    return file


def _closed(figure: Figure) -> Figure:
    """The figure, forgotten by pyplot, so that a notebook shows it once."""
    plt.close(figure)
    return figure


def image_rows(rows: dict[str, Tensor], *, columns: list[str] | None = None, size_inch: float = 0.62) -> Figure:
    """One labelled row of images per entry; every value is pixels (n, C, H, W), shown clamped to [-1, 1]."""
    count = max(len(pixels) for pixels in rows.values())
    figure, axes = plt.subplots(
        len(rows), count, figsize=(size_inch * count + 1.2, size_inch * len(rows) + 0.3), squeeze=False
    )
    for line, (name, pixels) in zip(axes, rows.items(), strict=True):
        for column, axis in enumerate(line):
            axis.axis("off")
            if column < len(pixels):
                image = ((pixels[column].clamp(-1, 1) + 1) / 2).movedim(0, -1).cpu().numpy()
                axis.imshow(image.repeat(3, axis=-1) if image.shape[-1] == 1 else image, interpolation="nearest")
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
    for axis, title in zip(axes[0], columns or [], strict=False):
        axis.set_title(title, fontsize=8, pad=3)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    return _closed(figure)


def accuracy_by_architecture(summary: pd.DataFrame, *, ipc: int) -> Figure:
    """Test accuracy of every distilled set and control of one IPC, with 95 % intervals; one panel an architecture."""
    frame = summary[summary.ipc.isin([ipc, 0])].assign(
        Set=lambda f: (f.objective.map(NAMES) + " " + f.space.map(NAMES)).str.removeprefix("- "),
        Judge=lambda f: f.architecture.map(NAMES),
    )
    judges, sets = list(dict.fromkeys(frame.Judge)), list(dict.fromkeys(frame.Set))
    figure, axes = plt.subplots(1, len(judges), figsize=(1.75 * len(judges) + 1, 0.28 * len(sets) + 0.8), sharey=True)
    for axis, judge in zip(np.atleast_1d(axes), judges, strict=True):
        part = frame[frame.Judge == judge].set_index("Set").loc[sets]
        colours = [SPACE_COLOURS.get(name.split()[-1], "#666666") for name in sets]
        for place, (mean, low, high, colour) in enumerate(
            zip(part["mean"], part.ci_low, part.ci_high, colours, strict=True)
        ):
            axis.errorbar(
                100 * mean,
                place,
                xerr=[[100 * (mean - low)], [100 * (high - mean)]],
                fmt="o",
                ms=3,
                capsize=2,
                color=colour,
            )
        axis.set(
            title=judge,
            yticks=range(len(sets)),
            yticklabels=sets,
            ylim=(len(sets) - 0.5, -0.5),
        )
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("test accuracy, % (mean and 95 % interval); each panel has a scale of its own", fontsize=9)
    figure.tight_layout()
    return _closed(figure)


def learning_curves(history: pd.DataFrame, validation: pd.DataFrame, *, ipc: int) -> Figure:
    """Loss, validation accuracy and the gradient norm of every learnable over iterations; one column an objective."""
    history, validation = history[history.ipc == ipc], validation[validation.ipc == ipc]
    objectives = list(dict.fromkeys(history.objective))
    figure, axes = plt.subplots(3, len(objectives), figsize=(3.3 * len(objectives), 6.2), squeeze=False, sharex="col")
    learnables = [name for name in history.columns if name.startswith("grad_norm_")]
    for column, objective in zip(axes.T, objectives, strict=True):
        for space, run in history[history.objective == objective].groupby("space"):
            colour = SPACE_COLOURS[NAMES[space]]
            column[0].plot(run.step, run.loss.rolling(5, min_periods=1).mean(), color=colour, label=NAMES[space])
            checks = validation[(validation.objective == objective) & (validation.space == space)]
            column[1].plot(checks.iteration, 100 * checks.accuracy, "o", ms=4, color=colour)
            column[1].plot(checks.iteration, 100 * checks.accuracy, ":", lw=0.7, alpha=0.6, color=colour)
            for name in learnables:
                if run[name].notna().any():
                    label = f"{NAMES[space]} {name.removeprefix('grad_norm_')}"
                    smooth = run[name].rolling(5, min_periods=1).mean()
                    column[2].plot(run.step, smooth, DASHES.get(name, "-"), color=colour, label=label)
        column[0].set(title=NAMES[objective], yscale="log")
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
    figure.tight_layout()
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
    figure.tight_layout()
    return _closed(figure)


def gradient_norms(norms: pd.DataFrame) -> Figure:
    """Gradient norm of the learned latent against the number of steps, one line for each skip and parametrisation:
    the mean over images, with bars from the smallest to the largest where there are several.

    Columns: skip, learned ("z" or "z_T"), steps, image, norm.
    """
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
    return _closed(grid.figure)


def training_losses(losses: dict[str, list[float]]) -> Figure:
    """The loss of every training step (mean of 50), one panel a network."""
    figure, axes = plt.subplots(1, len(losses), figsize=(3.5 * len(losses), 2.6))
    for axis, (name, values) in zip(np.atleast_1d(axes), losses.items(), strict=True):
        axis.plot(pd.Series(values).rolling(50, min_periods=1).mean())
        axis.set(title=f"{name} loss (mean of 50)", xlabel="step", yscale="log")
    figure.tight_layout()
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
    axes[0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[1].set(title="seconds an iteration", xlabel="number of steps T", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(sorted(steps[0]["T"].unique()))
    figure.tight_layout()
    return _closed(figure)


def confusion(counts: Tensor, classes: list[str]) -> Figure:
    """Counts (K, K) with the true class a row: percent of each row, and beside the class its accuracy."""
    percent = 100 * counts / counts.sum(1, keepdim=True)
    figure, axis = plt.subplots(figsize=(0.42 * len(classes) + 2, 0.42 * len(classes) + 1))
    names = [f"{name} ({share:.0f} %)" for name, share in zip(classes, percent.diagonal(), strict=True)]
    sns.heatmap(
        percent.numpy(), annot=len(classes) <= 20, fmt=".0f", cmap="Blues", vmin=0, vmax=100, cbar=False,
        linewidths=0.5, square=True, xticklabels=classes, yticklabels=names, ax=axis,
    )  # fmt: skip
    overall = 100 * counts.diagonal().sum() / counts.sum()
    axis.set(xlabel="called", ylabel="true class", title=f"validation images, % of each class; {overall:.1f} % right")
    axis.tick_params(axis="y", rotation=0)
    return _closed(figure)


def words(sentence: str) -> Figure:
    """A sentence where a figure would stand."""
    figure, axis = plt.subplots(figsize=(6, 0.4))  # Jupyter shows no figure without axes
    axis.axis("off")
    axis.text(0, 0.5, sentence, va="center")
    return _closed(figure)


def prior_check(
    real: Tensor, reconstructed: Tensor, samples: Tensor, classes: tuple[str, ...], *, rows: int = 4
) -> Figure:
    """Real validation images, their reconstructions, and guided samples, one column a class (pixels)."""
    count = len(classes)
    shown = {"real": real[:count], "reconstructed": reconstructed[:count]}
    shown |= {f"guided sample {k + 1}": samples[k * count : (k + 1) * count] for k in range(rows)}
    return image_rows(shown, columns=list(classes))
