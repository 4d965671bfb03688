"""The numbers that the paper and earlier work printed (`published.csv`), and the table that puts ours beside them.

`published.csv` has what the LD3M paper (arXiv 2403.03881) prints: Table 4 (128 px, IPC 10, mean over the four unseen
architectures; All is the mean over the subsets A to E of ImageNet), what is learned, gradient norms, steps T and costs
on one A100 of 40 GB; and for all 60,000 MNIST digits (pixels, ConvNet-3 of width 128, tested on the same network) DC
and DSA from the readme of their repository and DM as commonly cited. `spread` is what is printed after ±.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from ld3m.pipeline.cells import NAMES, UNSEEN, Cell
from ld3m.pipeline.params import Params
from ld3m.reporting.tables import wide

NOISE = {"redrawn": "redrawn in every pass", "stored": "drawn once, stored with the set"}


def printed() -> pd.DataFrame:
    """Read the published numbers: source, objective, space, setting, value, spread (empty if none), unit."""
    return pd.read_csv(Path(__file__).with_name("published.csv"), keep_default_na=False, na_values={"spread": ""})


def comparison(summary: pd.DataFrame, changes: pd.DataFrame) -> pd.DataFrame:
    """Put the paper's unseen means beside ours, and how far LD3M is above the other spaces in each, as fractions.

    Columns: objective, space, minus (empty for the means themselves), source ("paper" or "ours"), data, ipc, mean,
    half: what the paper prints after ±, or half of our 95 % interval; empty where the paper prints none.
    """
    table_4 = printed().query("source == 'table 4'")
    values = table_4.set_index(["objective", "space", "setting"]).value
    rows: list[tuple[Any, ...]] = []
    for row in table_4.itertuples():
        rows.append((row.objective, row.space, "", "paper", row.setting, 10, row.value / 100, row.spread / 100))
        for other in ("pixel", "glad") if row.space == "ld3m" else ():
            gap = row.value - values[row.objective, other, row.setting]
            rows.append((row.objective, row.space, other, "paper", row.setting, 10, gap / 100, None))
    (dataset,) = summary.dataset.unique()
    between = changes[changes.minus.isin(["pixel", "glad"])]
    for frame in (summary[summary.objective != "none"].assign(minus=""), between):
        for row in frame[frame.architecture == UNSEEN].itertuples():
            half = row.ci_high - row.mean
            rows.append((row.objective, row.space, row.minus, "ours", dataset, row.ipc, row.mean, half))
    columns = ["objective", "space", "minus", "source", "data", "ipc", "mean", "half"]
    return pd.DataFrame(rows, columns=columns).sort_values(["objective", "minus"], kind="stable", ignore_index=True)


def comparison_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Lay `comparison` out in percent: one row a set or difference, one column a subset or an IPC of ours."""
    rows = []
    for row in frame.itertuples():
        name = f"{NAMES[row.objective]} {NAMES[row.space]}" + (f" - {NAMES[row.minus]}" if row.minus else "")
        column = f"Paper: {row.data}" if row.source == "paper" else f"Ours: {row.data}, IPC {row.ipc}"
        half = "" if pd.isna(row.half) else f" ± {100 * row.half:.1f}"
        rows.append((name, column, f"{100 * row.mean:{'+' if row.minus else ''}.1f}{half}"))
    return wide(pd.DataFrame(rows, columns=["Set", "column", "text"]), index=["Set"], columns="column")


def settings(params: Params, found: list[Cell]) -> pd.DataFrame:
    """List what differs between the paper's Table 4 and our cells: columns setting, paper, ours."""
    distilled = [cell for cell in found if cell.objective != "none"]
    ipcs = sorted({cell.ipc for cell in distilled})
    given, ld3m, recipe = params.data, params.spaces.ld3m, params.evaluate.recipe
    network = params.networks[params.distill.network]
    depth = f", depth {network.depth}" if getattr(network, "depth", None) else ""
    distills = f"{NAMES[params.distill.network]}{depth}, width {getattr(network, 'width', 'its own')}"
    budgets: dict[str, dict[str, dict[int, int]]] = {}
    for cell in distilled:
        iterations = params.budget(*cell.row, iterations=cell.iterations).iterations
        budgets.setdefault(NAMES[cell.objective], {}).setdefault(NAMES[cell.space], {})[cell.ipc] = iterations
    iterations = [
        f"{objective} " + ", ".join(f"{space} {_of_each(by_ipc)}" for space, by_ipc in of.items())
        for objective, of in budgets.items()
    ]
    widths = [f"{NAMES[name]} {getattr(params.networks[name], 'width', 'its own')}" for name in params.architectures]
    epochs = [
        f"{NAMES[name]} {_of_each({ipc: params.recipe(name, ipc)['epochs'] for ipc in ipcs})}"
        for name in params.architectures
    ]
    unet = "-".join(map(str, params.prior.denoiser.widths))
    rows = [
        ("Data", "ImageNet subsets A to E, 10 classes each", params.dataset),
        ("Resolution", "128 px", f"{given.size_px} px"),
        ("Images per class", "10", ", ".join(map(str, ipcs))),
        (
            "Prior of LD3M",
            "cin256-v2, trained on ImageNet at 256 px",
            params.prior.source or f"a U-Net of widths {unet}, trained on the same training split",
        ),
        *(
            [("Prior of GLaD", "StyleGAN-XL, trained on ImageNet", "a small GAN, trained on the same training split")]
            if any(cell.space == "glad" for cell in distilled)
            else []
        ),
        ("Reverse steps T; guidance", "10; 3.0", f"{ld3m.steps}; {ld3m.guidance}"),
        ("Iterations", "10,000 (GLaD 1,000)", "; ".join(iterations)),
        ("Network that distills", "ConvNet, depth 5, width 128", distills),
        ("Width of the evaluation networks", "as published", ", ".join(widths)),
        ("Epochs of the evaluation networks", "1,000", ", ".join(epochs)),
        (
            "Gradients of the evaluation networks",
            "as they are",
            f"of norm {recipe.clip_norm:g} at most" if recipe.clip_norm else "as they are",
        ),
        ("Networks an architecture (n)", "5", str(params.evaluate.seeds)),
        (
            "Iteration reported",
            "best on test data, chosen for every architecture",
            "the start or the end, whichever is better on validation data, the same for all"
            if params.distill.validation_checks == 1
            else f"best of {params.distill.validation_checks + 1} on validation data, the same for all",
        ),
        ("Noise of the reverse process", NOISE["redrawn"], NOISE[ld3m.noise]),
        ("Start of the pixel baseline", "noise", params.spaces.pixel.start),
    ]
    return pd.DataFrame(rows, columns=["setting", "paper", "ours"])


def _of_each(counts: dict[int, int]) -> str:
    """The count of the first IPC, and those of other IPCs that differ."""
    first = next(iter(counts.values()))
    return f"{first}" + "".join(
        f" ({count} for {ipc} images a class)" for ipc, count in counts.items() if count != first
    )
