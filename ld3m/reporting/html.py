"""The report as one file that opens offline: what reports/full holds, and nothing else.

python -m ld3m.reporting.html        # writes reports/index.html again
"""

import base64
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ld3m.reporting.published import comparison_table
from ld3m.reporting.tables import NAMES, UNSEEN, costs_beside, latex, paper_style
from ld3m.runtime import paths
from ld3m.runtime.storage import write_bytes

ABLATIONS = {
    "steps": ("Number of steps T", ""),
    "skip_learn": ("Skip and parametrisation", "Each skip with each latent that can be learned, z or z_T."),
    "learned": ("What is learned", "The conditioning c alone, the latent alone, or both."),
    "guidance": ("Guidance scale", "1 is the conditional model alone."),
    "start": ("Initial images", "Real images, noise, or samples of the prior."),
    "prior": ("Prior", "What LD3M needs of the diffusion model it learns through."),
    "rates": ("Separate learning rates", "One rate for latent and conditioning, as in the released code, or two."),
    "clamp": ("Clamp", "A hard clamp gives saturated pixels no gradient."),
    "defects": (
        "Defects of the released code",
        "Each defect switched back on alone: what it costs (a change below zero) or flatters (above).",
    ),
}
ABLATION_COSTS = {
    "grad_norm_z": "‖∇z‖", "grad_norm_c": "‖∇c‖", "seconds_per_iteration": "s/iteration", "peak_mib": "peak MiB",
}  # fmt: skip
WRITTEN_WITH_NOTES = {"main", "runs", "comparison"}  # as md and tex, by `report.write_tables`
MEASURED = {"Seconds", ABLATION_COSTS["seconds_per_iteration"]}  # columns that never repeat
SHOWN_ELSEWHERE = {"main", "scores", "differences", "comparison", "paper", "settings", "costs", "prior"} | {
    "gan", "gradient_norms", "ablations", "ablation_costs", "runs", "runs_differences", "spread", "metrics",
    "ablation_changes", "validation",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`frame` holds text, its first `headers` columns head the rows; `intervals` (mean, low, high) are drawn beside."""

    name: str
    caption: str
    frame: pd.DataFrame
    headers: int = 1
    prose: bool = False  # cells are words, not numbers
    intervals: tuple[tuple[float, float, float], ...] = ()

    @property
    def extent(self) -> float:
        return max((abs(bound) for interval in self.intervals for bound in interval), default=0.0) or 1.0

    @property
    def stays(self) -> int:
        """The column that stays in view while the others scroll."""
        columns = list(self.frame.columns)
        return columns.index("Set") if "Set" in columns else 0

    @property
    def rules(self) -> list[bool]:
        """Whether a row starts a new group: another IPC, or another objective."""
        if "Set" not in self.frame.columns:
            return [False] * len(self.frame)
        objectives = self.frame["Set"].str.extract(r"^(DC|DM|MTT) ", expand=False).fillna("")
        ipcs = self.frame.get("IPC", objectives)
        groups = list(zip(ipcs, objectives, strict=True))
        return [False, *(before != now for before, now in pairwise(groups))]


@dataclass(frozen=True)
class Picture:
    """`data` is a data URI; `kind` is "chart" (dark pages invert it), "photo", or "sheet" for images alone."""

    caption: str
    alt: str
    data: str
    kind: str


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    text: tuple[str, ...]
    blocks: tuple[Table | Picture, ...]
    findings: tuple[str, ...] = ()  # sentences; what is between ** in one is marked


def write_report(*, tables: Path, figures: Path, file: Path = paths.REPORT) -> Path:
    """Writes the report and returns its file. Every table of it is then also there as md and tex, those with seconds
    at `costs_beside` the tables."""
    sections = _sections(tables, figures)
    write_bytes(file, _page(sections, tables).encode())
    for section in sections:
        for table in section.blocks:
            if isinstance(table, Table) and table.name not in WRITTEN_WITH_NOTES:
                folder = costs_beside(tables) if MEASURED & set(table.frame.columns) else tables
                markdown = table.frame.to_markdown(index=False, disable_numparse=True)
                write_bytes(folder / f"{table.name}.md", f"{markdown}\n\n{table.caption}\n".encode())
                write_bytes(folder / f"{table.name}.tex", latex(table.frame, table.caption).encode())
    return file


def render(tables: Path, figures: Path) -> str:
    """The report as text."""
    return _page(_sections(tables, figures), tables)


def _page(sections: list[Section], tables: Path) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.tests["table"] = lambda block: isinstance(block, Table)
    main = tables / "main.csv"
    dataset = pd.read_csv(main).dataset.iloc[0] if main.exists() else ""
    return environment.get_template("html.j2").render(sections=sections, dataset=dataset, strong=_strong)


def _sections(tables: Path, figures: Path) -> list[Section]:
    """Those whose tables or figures are there."""
    files = sorted([*tables.glob("*.csv"), *costs_beside(tables).glob("*.csv")], key=lambda file: file.name)
    # "none" and its like are words here
    found = {file.stem: pd.read_csv(file, keep_default_na=False, na_values=[""]) for file in files}
    makers = (_results, _runs, _metrics, _paper, _images, _accuracy, _curves, _gradients, _steps, _ablations, _costs)
    makers += (_prior, _others)
    return [section for maker in makers if (section := maker(found, tables, figures)) and section.blocks]


def _results(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    blocks: list[Table | Picture] = []
    if "main" in found:
        caption = "Test accuracy, percent: controls first, then objective by space, the full data last"
        blocks.append(Table("main", caption, paper_style(found["main"]).astype(str), headers=2))
    if "differences" in found:
        blocks.append(_differences("differences", found["differences"], "networks on one set"))
    note, verdicts = _prose(tables / "main.md")
    return Section("results", "Results of one run", note, tuple(blocks), verdicts)


def _runs(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    if "runs" not in found:
        return None
    caption = "Test accuracy, percent: one network an architecture on the set of every run"
    blocks = [Table("runs", caption, paper_style(found["runs"]).astype(str), headers=2)]
    if "runs_differences" in found:
        blocks.append(_differences("runs-differences", found["runs_differences"], "runs"))
    if "spread" in found:
        blocks.append(_spread(found["spread"]))
    note, verdicts = _prose(tables / "runs.md")
    text = "These intervals hold for distilling anew, those above for the one set that was distilled."
    return Section("runs", "Several distillation runs", (*note, text), tuple(blocks), verdicts)


def _spread(spread: pd.DataFrame) -> Table:
    shown = spread[spread.architecture.isin([spread.architecture.iloc[0], UNSEEN])]
    names = shown.objective.map({"all": "All distilled sets"}).fillna(
        (shown.objective.map(NAMES) + " " + shown.space.map(NAMES)).str.removeprefix("- ")
    )
    frame = pd.DataFrame({"Set": names, "Judge": shown.architecture.map(NAMES)})
    labels = {"net_sd": "Networks on one set", "run_sd": "Runs beyond that", "total_sd": "Both together"}
    for column, label in labels.items():
        frame[label] = (100 * shown[column]).map("{:.1f}".format)
    caption = (
        "Where the spread is: standard deviations in points of accuracy, of networks on the set of run 0, and of one "
        "network a run; what the second has beyond the first is that of runs. Each is estimated from few values: 0.0 "
        "says that nothing is told beyond the first"
    )
    return Table("spread", caption, frame.astype(str), headers=2)


def _metrics(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    if "metrics" not in found:
        return None
    metrics = found["metrics"]
    shown = metrics[metrics.architecture.isin([metrics.architecture.iloc[0], "mean"])]
    frame = pd.DataFrame(
        {
            "IPC": shown.ipc.astype(str),
            "Set": (shown.objective.map(NAMES) + " " + shown.space.map(NAMES)).str.removeprefix("- "),
            "Judge": shown.architecture.map(NAMES | {"mean": "mean of all"}),
        }
    )
    for column in ("accuracy", "random_real", "full_data", "IOR", "HLR", "LRS"):
        label = {"accuracy": "Accuracy", "random_real": "Random real", "full_data": "Full data"}.get(column, column)
        frame[label] = ["–" if pd.isna(value) else f"{value:.3f}" for value in shown[column]]
    text = (
        "Fractions, as in DD-Ranking: IOR is what a set gains over as many random real images (higher is better), HLR "
        "what it loses against all real data (lower is better), LRS maps the mean of IOR and -HLR onto [0, 1].",
    )
    caption = "Run 0: the scores beside the accuracies they are made of"
    return Section("metrics", "Beyond accuracy", text, (Table("metrics", caption, frame, headers=3),))


def _differences(name: str, changes: pd.DataFrame, over: str) -> Table:
    shown = changes[changes.architecture == UNSEEN]
    frame = pd.DataFrame(
        {
            "IPC": shown.ipc.astype(str),
            "Set": shown.objective.map(NAMES) + " " + shown.space.map(NAMES),
            "Minus": shown.minus.map(NAMES),
            "Points": [f"{100 * mean:+.1f}" for mean in shown["mean"]],
            "95 % interval": [
                f"{100 * low:+.1f} to {100 * high:+.1f}" for low, high in zip(shown.ci_low, shown.ci_high, strict=True)
            ],
            "p": ["<0.001" if p < 0.001 else f"{p:.3f}" for p in shown.p],
            "n": shown.n.astype(str),
        }
    )
    intervals = tuple(zip(shown["mean"], shown.ci_low, shown.ci_high, strict=True))
    caption = f"Differences of the unseen mean, in points, paired over n {over}; an interval clear of zero decides"
    return Table(name, caption, frame, headers=3, intervals=intervals)


def _paper(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    blocks = []
    if "comparison" in found:
        frame = comparison_table(found["comparison"].fillna({"minus": ""}))
        caption = (
            "Unseen mean, percent, and differences between the spaces. Paper: Table 4, 128 px, IPC 10, ± as printed "
            "there (no MTT). Ours: ± half of the 95 % interval"
        )
        blocks.append(Table("comparison", caption, frame))
    if "settings" in found:
        frame = found["settings"].set_axis(["Setting", "Paper, Table 4", "Here"], axis=1)
        blocks.append(Table("settings", "What differs in the setting", frame, prose=True))
    if "paper" in found:
        mnist = found["paper"].query("source == 'mnist'").pivot(index="objective", columns="setting", values="value")
        frame = mnist.map("{:.1f}".format).rename_axis("Method").reset_index()
        caption = (
            "Nearest published numbers: distilled from all 60,000 MNIST digits in pixel space, ConvNet of depth 3 and "
            "width 128, percent on the ConvNet itself"
        )
        blocks.append(Table("mnist", caption, frame))
    text = (
        "Other data, resolution, prior and budget: the accuracies cannot be compared, the differences between spaces "
        "under one recipe can.",
    )
    return Section("paper", "Beside the paper", text, tuple(blocks))


def _images(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    if "main" not in found:
        return None
    cells = found["main"][["objective", "space", "ipc"]].drop_duplicates()
    sheets = [
        _picture(figures / f"set-{objective}-{space}-{ipc}.png", name, f"Images of {name}: a column a class", "sheet")
        for objective, space, ipc in cells.itertuples(index=False)
        for name in [f"{NAMES[objective]} {NAMES[space]}, IPC {ipc}".removeprefix("- ")]
    ]
    text = ("One column a class. Pixel values are clamped for display; nothing else is changed.",)
    return Section("images", "The sets", text, tuple(filter(None, sheets)))


def _charts(figures: Path, pattern: str, caption: str, alt: str, kind: str = "chart") -> tuple[Picture, ...]:
    """The figures <pattern>, or <pattern>-ipc<k> for every k there is."""
    files = sorted(figures.glob(f"{pattern}-ipc*.png"), key=lambda file: int(file.stem.rpartition("ipc")[2]))
    named = [(file, f"IPC {file.stem.rpartition('ipc')[2]}: {caption}") for file in files]
    named += [(figures / f"{pattern}.png", caption)]
    return tuple(picture for file, words in named if (picture := _picture(file, words, alt, kind)))


def _accuracy(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    alt = "Dot plot, one panel a network, one row a set; the numbers are those of the table of results"
    charts = _charts(figures, "accuracy", "test accuracy with 95 % intervals", alt)
    return Section("accuracy", "Accuracy by architecture", (), charts)


def _curves(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    alt = "Line plots over iterations, a column an objective: matching loss, validation accuracy, gradient norms"
    charts = _charts(figures, "curves", "loss, validation accuracy and gradient norms over iterations", alt)
    starts = (_starts(found["validation"]),) if "validation" in found else ()
    return Section("curves", "Learning curves", (), (*charts, *starts))


def _starts(checks: pd.DataFrame) -> Table:
    groups = checks.groupby(["ipc", "objective", "space"], sort=False)
    ends = groups.accuracy.agg(["first", "last"]).reset_index()
    kept = checks.iteration[groups.accuracy.idxmax()]
    frame = pd.DataFrame(
        {
            "IPC": ends.ipc.astype(str),
            "Set": ends.objective.map(NAMES) + " " + ends.space.map(NAMES),
            "Start": (100 * ends["first"]).map("{:.1f}".format),
            "End": (100 * ends["last"]).map("{:.1f}".format),
            "Kept iteration": kept.astype(str).tolist(),
        }
    )
    caption = (
        "Validation accuracy, percent, mean of few networks of the distilling architecture: of what a space starts "
        "from, and of the last iteration; and the iteration that is kept, the best of those checked: at 0 the start"
    )
    return Table("validation", caption, frame, headers=2)


def _gradients(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    alt = "Line plots of gradient norm against number of steps, one panel for z and one for z_T, a line a skip"
    caption = "gradient norm of what is learned, at iteration 0, against the number of steps"
    blocks: list[Table | Picture] = list(_charts(figures, "gradient-norms", caption, alt))
    if "gradient_norms" in found:
        norms = found["gradient_norms"]
        wide = norms.assign(text=norms["mean"].map("{:.3g}".format), skip="skip " + norms["skip"])
        wide = wide.pivot(index=["learned", "steps"], columns="skip", values="text").reset_index().astype(str)
        frame = wide.rename_axis(columns=None).rename(columns={"learned": "Learned", "steps": "T"})
        blocks.append(Table("gradient-norms", "Mean norm over images", frame, headers=2))
    if "paper" in found and blocks:
        norms = found["paper"].query("source == 'gradient norm'")
        frame = pd.DataFrame([["norm of Z × 10⁴", *norms.value.map("{:.1f}".format)]], columns=["T", *norms.setting])
        blocks.append(Table("paper-gradient-norms", "The paper's, without the skip", frame))
    return Section("gradients", "Gradient norms", (), tuple(blocks))


def _steps(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    if "ablations" not in found or not (found["ablations"].ablation == "steps").any():
        return None
    alt = "Two line plots against the number of steps: test accuracy of every network, and seconds an iteration"
    charts = _charts(figures, "steps", "accuracy and time against the number of steps T", alt)
    text = ()
    if "paper" in found:
        low, high = found["paper"].query("source == 'best steps'").value
        text = (f"The paper finds the best T between about {low:.0f} and {high:.0f}.",)
    return Section("steps", "The trade-off of steps", text, (*charts, _ablation(found, "steps")))


def _ablations(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    if "ablations" not in found:
        return None
    blocks = [_ablation(found, name) for name in found["ablations"].ablation.unique() if name != "steps"]
    if "paper" in found:
        learned = found["paper"].query("source == 'learned'")
        frame = pd.DataFrame({"Learned": learned.setting, "Accuracy": learned.value.map("{:.1f}".format)})
        blocks.append(Table("paper-learned", "The paper's ablation, percent, mean over its cells", frame))
    return Section("ablations", "Ablations and defects", (), tuple(blocks))


def _ablation(found: dict[str, pd.DataFrame], name: str) -> Table:
    """One row a setting, in the order of the csv; columns: every network, the change of the unseen mean against the
    first setting with the same objective, space and IPC, and what the setting costs."""
    part = found["ablations"].query("ablation == @name").astype({"setting": str})
    keys = ["setting", *(key for key in ("objective", "space", "ipc") if part[key].nunique() > 1)]
    costs = found.get("ablation_costs", pd.DataFrame(columns=["ablation", "setting", *ABLATION_COSTS]))
    costs = costs.query("ablation == @name").astype({"setting": str}).drop_duplicates("setting").set_index("setting")
    rows = []
    changes = found.get("ablation_changes", pd.DataFrame(columns=part.columns)).astype({"setting": str})
    changes = changes[(changes.ablation == name) & (changes.architecture == UNSEEN)].set_index("setting")
    for key, group in part.groupby(keys, sort=False):
        row = {"Setting": key[0]}
        row |= {name.capitalize(): NAMES.get(value, value) for name, value in zip(keys[1:], key[1:], strict=True)}
        for score in group.itertuples():
            row[NAMES[score.architecture]] = f"{100 * score.mean:.1f} ± {100 * (score.ci_high - score.mean):.1f}"
        if len(changes):
            row["Change of unseen"] = _change(changes.loc[key[0]]) if key[0] in changes.index else "–"
        for column, label in ABLATION_COSTS.items():
            row[label] = _number(float(costs[column].get(key[0], math.nan)))
        rows.append(row)
    title, meaning = ABLATIONS.get(name, (name, ""))
    shared = [
        f"{label}{NAMES.get(part[key].iloc[0], part[key].iloc[0])}"
        for key, label in (("objective", ""), ("space", ""), ("ipc", "IPC "))
        if key not in keys
    ]
    unseen = [NAMES[judge] for judge in part.architecture.unique() if judge not in (part.architecture.iloc[0], UNSEEN)]
    meaning = f"{meaning} The unseen mean is over {' and '.join(unseen)}.".strip()
    caption = f"{title} ({', '.join([*shared, f'n = {part.n.min()}'])}). {meaning}"
    return Table(f"ablation-{name}", caption, pd.DataFrame(rows).fillna("–").astype(str), len(keys))


def _change(row: pd.Series) -> str:
    return f"{100 * row['mean']:+.1f} ± {100 * (row.ci_high - row['mean']):.1f}"


def _costs(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    if "costs" not in found:
        return None
    costs = found["costs"]
    frame = pd.DataFrame(
        {
            "IPC": costs.ipc.astype(str),
            "Set": costs.objective.map(NAMES) + " " + costs.space.map(NAMES),
            "Iterations": costs.iterations.astype(str),
            "Seconds": costs.seconds.map("{:.1f}".format),
            "Seconds an iteration": (costs.seconds / costs.iterations).map("{:.3f}".format),
            "Peak MiB": costs.peak_mib.map("{:.0f}".format),
        }
    )
    caption = (
        "Distilling each set, without validation: measured on the machine that ran it, so these numbers differ from "
        "run to run. Memory is the largest of the process, libraries and data included"
    )
    blocks = [Table("costs", caption, frame, headers=2)]
    if "paper" in found:
        paper = found["paper"].query("source == 'cost'").pivot(index="space", columns="unit", values="value")
        frame = pd.DataFrame(
            {
                "Space": paper.index.map(NAMES),
                "GB": paper.GB.map("{:.1f}".format),
                "Minutes": paper["min"].map("{:.0f}".format),
            }
        )
        blocks.append(Table("paper-costs", "The paper's: T = 20, one A100 of 40 GB", frame))
    return Section("costs", "Cost", (), tuple(blocks))


def _prior(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    alt = "Rows of images, a column a class: real validation images, their reconstructions, guided samples"
    blocks: list[Table | Picture] = list(
        _charts(figures, "prior", "real images, reconstructions, guided samples", alt, "photo")
    )
    for name, prior in {"prior": "LD3M's diffusion model: guided", "gan": "GLaD's GAN:"}.items():
        if name in found:
            frame = pd.DataFrame(
                [(measure.replace("_", " "), _number(value)) for measure, value in found[name].iloc[0].items()],
                columns=["Measure", "Value"],
            )
            caption = f"{prior} samples; recognised is the share whose class a network trained on real images names"
            blocks.append(Table(name, caption, frame))
    return Section("prior", "The priors behind LD3M and GLaD", (), tuple(blocks))


def _others(found: dict[str, pd.DataFrame], tables: Path, figures: Path) -> Section | None:
    blocks = [
        Table(name, f"{name}.csv", frame.map(_number)) for name, frame in found.items() if name not in SHOWN_ELSEWHERE
    ]
    return Section("more", "More tables", (), tuple(blocks))


def _picture(file: Path, caption: str, alt: str, kind: str) -> Picture | None:
    if not file.is_file():
        return None
    data = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return Picture(caption[:1].upper() + caption[1:], alt, data, kind)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def _prose(file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The note, one paragraph, and the sentences under the table of main.md or runs.md."""
    lines = file.read_text().splitlines() if file.is_file() else []
    note = [line for line in lines if line and line[0] not in "|-"]
    sentences = tuple(line.removeprefix("- ") for line in lines if line.startswith("- "))
    return (" ".join(note),) if note else (), sentences


def _strong(sentence: str) -> list[tuple[bool, str]]:
    """A sentence cut at its **marks**: (is it marked, its text)."""
    return [(place % 2 == 1, part) for place, part in enumerate(re.split(r"\*\*", sentence)) if part]


if __name__ == "__main__":
    print(write_report(tables=paths.FULL / "tables", figures=paths.FULL / "figures"))
