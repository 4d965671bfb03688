"""Numbers that the paper and earlier work printed, and the table that puts ours beside them."""

from typing import Any

import pandas as pd

from ld3m.pipeline.params import Params
from ld3m.reporting.tables import NAMES, UNSEEN

SUBSETS = ("All", "A", "B", "C", "D", "E")  # of ImageNet, ten classes each; All is the mean over the five

# LD3M (arXiv 2403.03881), Table 4: 128 px, IPC 10, percent; mean over the four unseen architectures and what follows ±
TABLE_4 = {
    ("dc", "pixel"): ((42.3, 3.5), (52.3, 0.7), (45.1, 8.3), (40.1, 7.6), (36.1, 0.4), (38.1, 0.4)),
    ("dc", "glad"): ((45.9, 1.0), (53.1, 1.4), (50.1, 0.6), (48.9, 1.1), (38.9, 1.0), (38.4, 0.7)),
    ("dc", "ld3m"): ((47.1, 1.2), (55.2, 1.0), (51.8, 1.4), (49.9, 1.3), (39.5, 1.0), (39.0, 1.3)),
    ("dm", "pixel"): ((44.4, 0.5), (52.6, 0.4), (50.6, 0.5), (47.5, 0.7), (35.4, 0.4), (36.0, 0.5)),
    ("dm", "glad"): ((45.8, 0.6), (52.8, 1.0), (51.3, 0.6), (49.7, 0.4), (36.4, 0.4), (38.6, 0.7)),
    ("dm", "ld3m"): ((47.3, 2.1), (57.0, 1.3), (52.3, 1.1), (48.2, 4.9), (39.5, 1.5), (39.4, 1.8)),
}
LEARNED = {"c": 15.8, "c and Z": 22.3, "c and Z with the skip": 28.1, "GLaD": 26.6}  # percent, mean over cells
GRADIENT_NORMS = dict(zip(range(10, 100, 10), (58.1, 33.5, 19.8, 15.4, 13.9, 12.1, 10.4, 8.7, 6.5), strict=True))
BEST_STEPS = {"from": 10, "to": 40}  # T, about
COSTS = {"ld3m": (29.4, 574), "glad": (31.2, 693)}  # GB and minutes, T = 20, one A100 of 40 GB
# All 60,000 MNIST digits, pixels, ConvNet-3 of width 128, judged by the same network, percent at IPC 1 and 10: DC and
# DSA from the readme of their repository, DM as commonly cited
MNIST = {"DC": (91.7, 97.4), "DSA": (88.7, 97.8), "DM": (89.7, 97.5)}
NOISE = {"redrawn": "redrawn in every pass", "stored": "drawn once, stored with the set"}


def printed() -> pd.DataFrame:
    """All of the above: source, objective, space, setting, value, spread (as printed after ±, else empty), unit."""
    rows: list[tuple[Any, ...]] = [
        ("table 4", objective, space, subset, mean, spread, "%")
        for (objective, space), values in TABLE_4.items()
        for subset, (mean, spread) in zip(SUBSETS, values, strict=True)
    ]
    rows += [("learned", "", "", setting, value, None, "%") for setting, value in LEARNED.items()]
    rows += [("gradient norm", "", "ld3m", f"{T}", norm, None, "1e-4") for T, norm in GRADIENT_NORMS.items()]
    rows += [("best steps", "", "ld3m", end, T, None, "steps") for end, T in BEST_STEPS.items()]
    for space, values in COSTS.items():
        rows += [
            ("cost", "", space, "T = 20", value, None, unit) for value, unit in zip(values, ("GB", "min"), strict=True)
        ]
    for method, values in MNIST.items():
        rows += [
            ("mnist", method, "pixel", f"IPC {ipc}", value, None, "%")
            for ipc, value in zip((1, 10), values, strict=True)
        ]
    return pd.DataFrame(rows, columns=["source", "objective", "space", "setting", "value", "spread", "unit"])


def comparison(summary: pd.DataFrame, changes: pd.DataFrame) -> pd.DataFrame:
    """The paper's unseen means and ours, and how far LD3M is above the other spaces in each, as fractions.

    Columns: objective, space, minus (empty for the means themselves), source ("paper" or "ours"), data, ipc, mean,
    half: what the paper prints after ±, or half of our 95 % interval; empty where the paper prints none.
    """
    rows: list[tuple[Any, ...]] = []
    for (objective, space), values in TABLE_4.items():
        for subset, (mean, spread) in zip(SUBSETS, values, strict=True):
            rows.append((objective, space, "", "paper", subset, 10, mean / 100, spread / 100))
            if space == "ld3m":
                for other in ("pixel", "glad"):
                    gap = mean - TABLE_4[objective, other][SUBSETS.index(subset)][0]
                    rows.append((objective, space, other, "paper", subset, 10, gap / 100, None))
    (dataset,) = summary.dataset.unique()
    between = changes[changes.minus.isin(["pixel", "glad"])]
    for frame in (summary[summary.objective != "none"].assign(minus=""), between):
        for row in frame[frame.architecture == UNSEEN].itertuples():
            half = row.ci_high - row.mean
            rows.append((row.objective, row.space, row.minus, "ours", dataset, row.ipc, row.mean, half))
    return pd.DataFrame(
        rows, columns=["objective", "space", "minus", "source", "data", "ipc", "mean", "half"]
    ).sort_values(["objective", "minus"], kind="stable", ignore_index=True)


def comparison_table(frame: pd.DataFrame) -> pd.DataFrame:
    """`comparison` as it is read, in percent: one row a set or difference, one column a data set of the paper or an IPC
    of ours."""
    sign = ["+" if minus else "" for minus in frame.minus]
    halves = ["" if pd.isna(half) else f" ± {100 * half:.1f}" for half in frame.half]
    wide = frame.assign(
        text=[f"{100 * mean:{plus}.1f}{half}" for mean, plus, half in zip(frame["mean"], sign, halves, strict=True)],
        Set=[
            f"{NAMES[row.objective]} {NAMES[row.space]}" + (f" - {NAMES[row.minus]}" if row.minus else "")
            for row in frame.itertuples()
        ],
        column=[
            f"Paper: {row.data}" if row.source == "paper" else f"Ours: {row.data}, IPC {row.ipc}"
            for row in frame.itertuples()
        ],
    )
    columns = sorted(dict.fromkeys(wide.column), key=lambda column: column.startswith("Ours"))
    pivot = wide.pivot(index="Set", columns="column", values="text")
    return pivot.loc[list(dict.fromkeys(wide.Set)), columns].fillna("–").reset_index().rename_axis(columns=None)


def settings(params: Params, *, spaces: list[str], ipcs: list[int]) -> pd.DataFrame:
    """What differs between the paper's Table 4 and ours, of these spaces and images per class: columns setting, paper,
    ours."""
    given, ld3m, grid, recipe = params.data, params.spaces.ld3m, params.grid, params.evaluate.recipe
    network = params.networks[params.distill.network]
    depth = f", depth {network.depth}" if network.depth else ""
    distils = f"{NAMES[params.distill.network]}{depth}, width {network.width}"
    iterations = [
        f"{NAMES[objective]} "
        + ", ".join(
            f"{NAMES[space]} {_of_each({ipc: params.budget(objective, space, ipc).iterations for ipc in ipcs})}"
            for space in spaces
        )
        for objective in grid.objective
    ]
    widths = [f"{NAMES[name]} {params.networks[name].width}" for name in grid.architecture]
    epochs = [
        f"{NAMES[name]} {_of_each({ipc: params.recipe(name, ipc)['epochs'] for ipc in ipcs})}"
        for name in grid.architecture
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
            if "glad" in spaces
            else []
        ),
        ("Reverse steps T; guidance", "10; 3.0", f"{ld3m.steps}; {ld3m.guidance}"),
        ("Iterations", "10,000 (GLaD 1,000)", "; ".join(iterations)),
        ("Network that distils", "ConvNet, depth 5, width 128", distils),
        ("Judges' width", "as published", ", ".join(widths)),
        ("Judges' epochs", "1,000", ", ".join(epochs)),
        (
            "Judges' gradients",
            "as they are",
            f"of norm {recipe.clip_norm:g} at most" if recipe.clip_norm else "as they are",
        ),
        ("Networks a judge (n)", "5", str(params.evaluate.seeds)),
        (
            "Iteration reported",
            "best on test data, for every judge anew",
            "the start or the end, whichever is better on validation data, one for all judges"
            if params.distill.validation_checks == 1
            else f"best of {params.distill.validation_checks + 1} on validation data, one for all judges",
        ),
        ("Noise of the reverse process", NOISE["redrawn"], NOISE[ld3m.noise]),
        ("Start of the pixel baseline", "noise", params.spaces.pixel.start),
    ]
    return pd.DataFrame(rows, columns=["setting", "paper", "ours"])


def _of_each(counts: dict[int, int]) -> str:
    """The count of the first number of images per class, and of others where theirs are others."""
    first = next(iter(counts.values()))
    return f"{first}" + "".join(
        f" ({count} for {ipc} images a class)" for ipc, count in counts.items() if count != first
    )
