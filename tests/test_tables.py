import json
import statistics
from pathlib import Path

import pandas as pd
import pytest

from ld3m.evaluation.scores import Scores, write_scores
from ld3m.pipeline import cells as layout
from ld3m.pipeline.ablations import write_records
from ld3m.pipeline.cells import UNSEEN, cells, first_runs
from ld3m.pipeline.profiles import load_params
from ld3m.reporting import published, report, tables
from ld3m.runtime import paths
from ld3m.runtime.storage import write_json

TABLES = {"scores.csv", "differences.csv", "prior.csv", "gradient_norms.csv", "paper.csv", "settings.csv"}
TABLES |= {f"{name}.{kind}" for name in ("main", "comparison") for kind in ("csv", "md", "tex")}
MAIN_ALONE = {"history.csv", "metrics.json"}
T_975_DF_2 = 4.302653  # from a printed table of Student's t
SPACES = ("pixel", "glad", "ld3m")
EXPERTS, PRIORS = {"mtt": "trajectories"}, {"pixel": "data", "glad": "gan", "ld3m": "prior"}


def entries(*rows, table="main", runs=(0,)):
    """`cells` or `controls` of params.yaml for rows (objective, space, ipc)."""
    found = {}
    for objective, space, ipc in rows:
        entry = {"ipc": ipc, "prior": PRIORS.get(space, "data"), "table": table, "runs": runs}
        if objective == "none":
            entry |= {"control": space}
        else:
            entry |= {"objective": objective, "space": space, "experts": EXPERTS.get(objective, "data")}
        found[f"{objective}-{space}-{ipc}{'' if 0 in runs else '-runs'}"] = entry
    return found


SETS = [("none", "random_real"), ("dm", "pixel"), ("dm", "ld3m"), ("mtt", "pixel"), ("mtt", "ld3m")]
ROWS = [*((*row, ipc) for ipc in (1, 10) for row in SETS), ("none", "full_data", 0)]
GRID = {
    "cells": entries(*(row for row in ROWS if row[0] != "none")),
    "controls": entries(*(row for row in ROWS if row[0] == "none")),
    "architectures": ["vit", "convnet", "alexnet"],
    "distill.network": "convnet",
    "evaluate.seeds": 3,
}
VALIDATION = [{"iteration": 0, "accuracy": 0.5}, {"iteration": 9, "accuracy": 0.6}]
HISTORY = [{"step": step, "loss": 1.0 - step, "grad_norm_z": 2.0} for step in range(2)]
DATASET = load_params(GRID).dataset
CELLS = cells(load_params(GRID))


GAPS = {("dm", "ld3m", 1): 0.2, ("dm", "ld3m", 10): 0.1, ("mtt", "ld3m", 1): -0.1}


def accuracies(objective, space, ipc, architecture):
    """Three seeds; LD3M is above pixel with dm, below with mtt and IPC 1, not significantly with mtt and IPC 10."""
    row = (objective, space, ipc)
    base = 0.3 + 0.1 * GRID["architectures"].index(architecture) + ipc / 100 + GAPS.get(row, 0.0)
    return [base + step for step in ([0.00, 0.02, -0.05] if row == ("mtt", "ld3m", 10) else [0.00, 0.01, 0.02])]


def file_of(cell):
    return cell.scores / "scores.json"


def write(file, runs):
    """The scores of a cell: {run: {architecture: accuracies}}."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_scores(file, Scores("cell", runs, dict.fromkeys(runs[min(runs)], {})))


@pytest.fixture
def params(tmp_path, monkeypatch):
    """Parameters of a small grid, and its scores under `tmp_path`."""
    params = load_params(GRID)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(report, "read_artefact", lambda folder: ({}, {"validation": VALIDATION, "history": HISTORY}))
    for cell in CELLS:
        write(file_of(cell), {0: {name: accuracies(*cell.row, name) for name in params.architectures}})
        write_json(cell.cost_file(0), {"iterations": 20, "seconds": 5.0 + cell.ipc, "peak_mib": 700.0})
    write(CELLS[0].scores.with_name("dc-pixel-1") / "scores.json", {0: {"vit": [0.99] * 3}})  # never read
    write_json(layout.runs_path(DATASET, "prior-check", "check.json"), {"sample_class_accuracy": 0.95})
    norms = [{"skip": "x0", "learned": "z", "steps": 5, "image": k, "norm": 2.0 + k} for k in range(2)]
    write_json(layout.runs_path(DATASET, "gradient_norms.json"), norms)
    return params


def written(table):
    return layout.reports_path(DATASET, "tables", table)


def p_of(t):
    """Two-sided p of Student's t with two degrees of freedom, in closed form."""
    return 1 - abs(t) / (2 + t * t) ** 0.5


@pytest.fixture
def scores(params):
    return tables.with_unseen_mean(tables.scores_of(params, CELLS), "convnet")


def test_the_summary_has_a_row_a_cell_and_architecture_and_the_mean_over_the_unseen_ones(scores):
    summary = tables.summarize(scores)
    assert list(summary.columns) == tables.COLUMNS and len(summary) == 4 * len(CELLS)
    by_key = {row[:5]: row[5:] for row in summary.itertuples(index=False)}
    for objective, space, ipc in ROWS:
        of_each = {name: accuracies(objective, space, ipc, name) for name in ("vit", "convnet", "alexnet")}
        of_each[UNSEEN] = [statistics.mean(pair) for pair in zip(of_each["vit"], of_each["alexnet"], strict=True)]
        for architecture, values in of_each.items():
            mean, half = statistics.mean(values), T_975_DF_2 * statistics.stdev(values) / 3**0.5
            found = by_key[(DATASET, ipc, objective, space, architecture)]
            assert found == pytest.approx((3, mean, mean - half, mean + half), rel=1e-6)


def test_differences_are_paired_by_network(scores):
    changes = tables.differences(scores.sample(frac=1, random_state=0))  # the order of rows says nothing
    assert list(changes.columns) == tables.CHANGES
    assert len(changes) == 2 * 2 * 4 * (2 + 1)  # ipc, objectives, architectures; two spaces minus real, one minus pixel
    by_key = {row[:5]: row[5:] for row in changes.itertuples(index=False)}
    # constant over seeds: no width, however much the seeds differ
    assert by_key[(1, "dm", "ld3m", "pixel", "vit")] == pytest.approx((3, 0.2, 0.2, 0.2, 0.0), abs=1e-12)
    assert by_key[(1, "mtt", "ld3m", "pixel", UNSEEN)] == pytest.approx((3, -0.1, -0.1, -0.1, 0.0), abs=1e-12)
    gaps = [0.00, 0.01, -0.07]
    error = statistics.stdev(gaps) / 3**0.5
    half = T_975_DF_2 * error
    wanted = (3, -0.02, -0.02 - half, -0.02 + half, p_of(-0.02 / error))
    assert by_key[(10, "mtt", "ld3m", "pixel", "convnet")] == pytest.approx(wanted, rel=1e-6)
    means = scores.groupby(["ipc", "objective", "space", "architecture"]).accuracy.mean()
    wanted = means[1, "dm", "pixel", "convnet"] - means[1, "none", "random_real", "convnet"]
    assert by_key[(1, "dm", "pixel", "random_real", "convnet")][1] == pytest.approx(wanted)


@pytest.mark.parametrize(
    "file, change, words",
    [
        (file_of, Path.unlink, "{file} is missing"),
        (file_of, lambda file: file.write_text("{}"), "{file} is no file of scores"),
        (
            file_of,
            lambda file: write(file, {0: {"vit": [0.5] * 2}}),
            "{file} has 2 networks of vit for run 0, .* 3",
        ),
        (lambda cell: cell.cost_file(0), Path.unlink, "{file} is missing: `dvc repro`"),
    ],
)
def test_scores_and_costs_that_are_missing_broken_or_too_few_are_named(params, file, change, words):
    change(found := file(CELLS[3]))
    with pytest.raises((FileNotFoundError, ValueError), match=words.format(file=found)):
        report.write_tables(params, table="main")


@pytest.mark.parametrize("control", ["iteration0", "prior_samples", "herding", "k_center"])
def test_ld3m_alone_is_compared_with_what_it_starts_from_and_with_coresets(scores, control):
    changes = tables.differences(pd.concat([scores, scores[scores.space == "random_real"].assign(space=control)]))
    found, real = (changes[(changes.minus == other) & (changes.space == "ld3m")] for other in (control, "random_real"))
    assert len(found) == 2 * 2 * 4 and set(changes.space[changes.minus == control]) == {"ld3m"}
    values = tables.CHANGES[tables.CHANGES.index("n") :]
    assert found[values].to_numpy().tolist() == real[values].to_numpy().tolist()


def test_the_table_has_the_layout_of_the_paper(scores):
    table = tables.paper_style(tables.summarize(scores))
    assert list(table.columns) == ["IPC", "Set", "ViT", "ConvNet", "AlexNet", "Unseen mean"]
    rows = [(ipc, name) for ipc in (1, 10) for name in ("Random real", "DM Pixel", "DM LD3M", "MTT Pixel", "MTT LD3M")]
    assert list(zip(table.IPC, table.Set, strict=True)) == [*rows, ("all", "Full data")]
    # convnet, dm, ld3m, IPC 1: 0.61, 0.62, 0.63
    assert table.ConvNet[table.Set == "DM LD3M"].iloc[0] == f"62.0 ± {T_975_DF_2 / 3**0.5:.1f}"
    assert table["Unseen mean"].iloc[0] == f"42.0 ± {T_975_DF_2 / 3**0.5:.1f}"


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.001, 0.2, "LD3M is significantly better than pixel"),
        (-0.2, -0.001, "**LD3M is significantly worse than pixel**"),
        (-0.001, 0.2, "**no significant difference between LD3M and pixel**"),
        (0.0, 0.0, "**no significant difference between LD3M and pixel**"),
    ],
)
def test_the_verdict_follows_the_interval(low, high, verdict):
    mean = (low + high) / 2
    change = {"ipc": 1, "objective": "dm", "space": "ld3m", "n": 3, "mean": mean, "ci_low": low, "ci_high": high}
    others = ("pixel", "herding", "prior_samples", "random_real")  # that with samples is in the table alone
    rows = [change | {"minus": other, "architecture": UNSEEN} for other in others]
    rows.append(change | {"minus": "pixel", "architecture": "convnet", "ci_low": 0.3, "ci_high": 0.4})
    rows.append(change | {"minus": "random_real", "architecture": "convnet"})
    points = f"{100 * mean:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    rest = f"on the unseen architectures: {points}, paired over 3 runs."
    against = "significantly better" if low > 0 else "**not significantly better**"
    assert tables.verdicts(pd.DataFrame(rows), "convnet", paired_by="runs") == [
        f"- DM, IPC 1: {verdict} {rest}",
        f"- DM, IPC 1: {verdict.replace('pixel', 'herding')} {rest}",
        f"- DM LD3M, IPC 1: {against} than random real images on ConvNet: {points}.",
    ]


# What the report adds: further runs of a cell and of a control, and a cell that the main table lacks.
FURTHER = entries(("dm", "pixel", 1), ("dm", "ld3m", 1), table="report", runs=(1, 2))
MORE = GRID | {
    "ablations.settings": {"steps": {"T = 2": {"spaces.ld3m.steps": 2}, "T = 5": {}}},
    "cells": GRID["cells"] | FURTHER | entries(("dm", "glad", 1), table="report", runs=(0, 1, 2)),
    "controls": GRID["controls"] | entries(("none", "random_real", 1), table="report", runs=(1, 2)),
}
OF_RUNS = {"pixel": (0.5, 0.53, 0.56), "ld3m": (0.7, 0.74, 0.75), "glad": (0.65, 0.68, 0.71)}
OF_RUNS["random_real"] = (0.2, 0.23, 0.26)  # of one network, whatever its architecture


@pytest.fixture
def with_more(params, monkeypatch):
    """Parameters with `MORE`, and the scores of what it adds."""
    more = load_params(MORE)
    for cell in cells(more):
        if cell.table == "report":
            values = {run: [OF_RUNS[cell.space][run]] + [0.1, 0.9] * (run == 0) for run in cell.runs}
            write(file_of(cell), {run: dict.fromkeys(more.architectures, given) for run, given in values.items()})
            write_json(cell.cost_file(0), {"iterations": 9, "seconds": 5.0, "peak_mib": 700.0})
    record = {"objective": "dm", "space": "ld3m", "accuracy": {"convnet": [0.8, 0.9], "vit": [0.2, 0.3]}}
    record |= {"grad_norm_z": 1.0, "grad_norm_c": 1.0, "seconds_per_iteration": 1.0, "seconds": 9.0, "peak_mib": None}
    write_records(DATASET, "steps", [record | {"setting": name} for name in more.ablations.settings["steps"]])
    return more


def test_the_report_adds_a_row_and_further_runs_whose_differences_are_paired_by_run(with_more):
    assert [cell.row for cell in cells(with_more, "main")] == ROWS
    at = ROWS.index(("dm", "ld3m", 1))
    assert [cell.row for cell in first_runs(with_more)] == [*ROWS[:at], ("dm", "glad", 1), *ROWS[at:]]
    runs = tables.of_several_runs(tables.scores_of(with_more, cells(with_more)))
    found = set(zip(runs.objective, runs.space, runs.ipc, strict=True))
    assert found == {*(("dm", space, 1) for space in SPACES), ("none", "random_real", 1)}
    ld3m = runs[(runs.space == "ld3m") & (runs.architecture == "vit")]
    assert ld3m[ld3m.run == 0].accuracy.tolist() == accuracies("dm", "ld3m", 1, "vit")  # those of the main table
    assert ld3m[ld3m.run > 0].accuracy.tolist() == [0.74, 0.75]
    changes = tables.differences(runs[(runs.seed == 0) & (runs.architecture == "vit")]).set_index(["space", "minus"])
    assert set(changes.index) == {*((space, "random_real") for space in SPACES), ("ld3m", "pixel"), ("ld3m", "glad")}
    gaps = [accuracies("dm", "ld3m", 1, "vit")[0] - accuracies("dm", "pixel", 1, "vit")[0], 0.21, 0.19]
    row, half = changes.loc[("ld3m", "pixel")], T_975_DF_2 * statistics.stdev(gaps) / 3**0.5
    assert [row.n, row["mean"], row.ci_high - row["mean"]] == pytest.approx([3, statistics.mean(gaps), half], rel=1e-6)


def test_the_spread_of_networks_is_kept_from_that_of_runs(with_more):
    table = tables.spread(tables.of_several_runs(tables.scores_of(with_more, cells(with_more))))
    table = table.set_index(["objective", "space", "architecture"])
    row = table.loc[("dm", "ld3m", "vit")]
    of_networks = accuracies("dm", "ld3m", 1, "vit")
    sds = [statistics.stdev(of_networks), statistics.stdev([of_networks[0], 0.74, 0.75])]
    assert [row.networks, row.runs, row.net_sd, row.total_sd] == pytest.approx([3, 3, *sds])
    assert row.run_sd == pytest.approx((row.total_sd**2 - row.net_sd**2) ** 0.5)
    glad = table.loc[("dm", "glad", "vit")]  # its networks differ by more than its runs do
    assert glad.net_sd > glad.total_sd > 0 and glad.run_sd == 0
    cells_alone = table[(table.index.get_level_values(0) == "dm") & (table.index.get_level_values(2) == "vit")]
    pooled = table.loc[("all", "all", "vit")]
    assert pooled.net_sd == pytest.approx((cells_alone.net_sd**2).mean() ** 0.5)


def test_the_report_has_tables_of_its_own(with_more):
    with pytest.raises(FileNotFoundError, match="gan-check"):
        report.write_tables(with_more, table="report")
    write_json(layout.runs_path(DATASET, "gan-check") / "check.json", {"sample_class_accuracy": 0.966, "samples": 500})
    report.write_tables(with_more, table="report")
    added = {*(f"runs.{kind}" for kind in ("csv", "md", "tex")), "runs_differences.csv", "spread.csv", "metrics.csv"}
    added |= {"validation.csv", "ablations.csv", "ablation_changes.csv"}
    assert {file.name for file in written("report").iterdir()} == TABLES | added | {"gan.csv"}
    assert pd.read_csv(written("report") / "gan.csv").sample_class_accuracy.tolist() == [0.966]
    words = (written("report") / "runs.md").read_text()
    assert "over n = 3 distillation runs" in words and "paired over 3 runs" in words
    metrics = pd.read_csv(written("report") / "metrics.csv").set_index(["ipc", "objective", "space", "architecture"])
    row = metrics.loc[(1, "dm", "ld3m", "convnet")]
    assert row.accuracy == pytest.approx(0.62) and row.IOR == pytest.approx(0.62 - row.random_real)
    assert row.HLR == pytest.approx(row.full_data - 0.62) and 0 < row.LRS < 1


def test_the_tables_hold_the_numbers_and_repeat_byte_for_byte(params):
    report.write_tables(params, table="main")
    first = {file.name: file.read_bytes() for file in written("main").iterdir()}
    assert set(first) == TABLES | MAIN_ALONE
    assert [file.name for file in layout.reports_path(DATASET, "costs", "main").iterdir()] == ["costs.csv"]
    report.write_tables(params, table="main")
    assert {file.name: file.read_bytes() for file in written("main").iterdir()} == first
    markdown = (written("main") / "main.md").read_text()
    scores = pd.read_csv(written("main") / "scores.csv")
    assert list(scores.columns) == tables.COLUMNS and len(scores) == 3 * len(CELLS)
    metrics = json.loads((written("main") / "metrics.json").read_text())
    assert metrics["none-random_real-1"]["alexnet"] == pytest.approx(0.52) and len(metrics) == len(CELLS)
    history = pd.read_csv(written("main") / "history.csv")
    assert len(history) == 2 * 8 and history[history.cell == "mtt-ld3m-10"].loss.tolist() == [1.0, 0.0]
    assert pd.read_csv(written("main") / "prior.csv").sample_class_accuracy.tolist() == [0.95]
    for part in (
        "| DM LD3M ", "62.0 ± 2.5", "n = 3 networks", "ConvNet is the architecture used to distill",
        "- DM, IPC 10: LD3M is significantly better", "- MTT, IPC 10: **no significant difference",
    ):  # fmt: skip
        assert part in markdown
    latex = (written("main") / "main.tex").read_text()
    assert r"62.0 $\pm$ 2.5" in latex and "±" not in latex and r"95 \% t interval" in latex


def test_costs_are_read_for_every_cell_that_is_distilled(params):
    costs = tables.read_costs(params, CELLS)
    assert list(costs.itertuples(index=False, name=None)) == [
        (DATASET, ipc, objective, space, 20, 5.0 + ipc, 700.0) for objective, space, ipc in ROWS if objective != "none"
    ]


def test_ours_stand_beside_the_papers(params):
    report.write_tables(params, table="main")
    frame = pd.read_csv(written("main") / "comparison.csv", keep_default_na=False, na_values={"half": [""]})
    rows = {tuple(row[:6]): tuple(row[6:]) for row in frame.itertuples(index=False)}
    assert rows["dc", "glad", "", "paper", "All", 10] == (0.459, 0.01)
    assert rows["dm", "ld3m", "pixel", "paper", "E", 10] == pytest.approx((0.034, float("nan")), nan_ok=True)
    # dm, ld3m, IPC 1: ViT 0.51 .. 0.53 and AlexNet 0.71 .. 0.73; 20 points above pixel with every seed
    assert rows["dm", "ld3m", "", "ours", DATASET, 1] == pytest.approx((0.62, T_975_DF_2 / 3**0.5 / 100), abs=1e-5)
    assert rows["dm", "ld3m", "pixel", "ours", DATASET, 1] == pytest.approx((0.2, 0.0), abs=1e-5)
    markdown, latex = ((written("main") / f"comparison.{kind}").read_text() for kind in ("md", "tex"))
    for line in ("| DC GLaD ", "| 45.9 ± 1.0 ", "| DM LD3M - Pixel ", "| +20.0 ± 0.0 ", f"Ours: {DATASET}, IPC 10"):
        assert line in markdown
    assert r"45.9 $\pm$ 1.0" in latex
    settings = pd.read_csv(written("main") / "settings.csv", index_col="setting").ours
    assert settings["Iteration reported"].startswith("the start or the end, whichever is better on validation data")
    assert settings["Noise of the reverse process"] == "drawn once, stored with the set"
    changed = load_params({"distill.validation_checks": 5, "spaces.ld3m.noise": "redrawn"})
    other = published.settings(changed, CELLS).set_index("setting")
    assert other.ours["Iteration reported"].startswith("best of 6 on validation data")
    assert list(other.loc["Noise of the reverse process"]) == ["redrawn in every pass"] * 2
    assert settings["Images per class"] == "1, 10" and settings["Networks an architecture (n)"] == "3"


def test_the_papers_means_over_subsets_are_those_of_its_subsets():
    table_4 = published.printed().query("source == 'table 4'")
    assert set(zip(table_4.objective, table_4.space, strict=True)) == {(o, s) for o in ("dc", "dm") for s in SPACES}
    for _, cell in table_4.groupby(["objective", "space"]):
        means = cell.set_index("setting").value
        assert means["All"] == pytest.approx(means.drop("All").mean(), abs=0.06) and len(means) == 6


def test_a_grid_of_the_distilling_architecture_alone_has_tables(params):
    alone = load_params(GRID | {"architectures": ["convnet"]})
    report.write_tables(alone, table="main")
    markdown = (written("main") / "main.md").read_text()
    assert "ConvNet" in markdown and "62.0 ± 2.5" in markdown and "no significant" not in markdown


def test_ablations_change_against_the_baseline_or_the_first_of_their_objective_paired_by_network(params):
    settings = {
        "steps": {"T = 2": {"spaces.ld3m.steps": 2}, "T = 5": {}},
        "defects": {"none": {}, "noise": {"spaces.ld3m.noise": "redrawn"}, "exact": {"objective": "mtt"}},
    }
    settings["defects"]["first"] = {"objective": "mtt", "objectives.mtt.first_order": True}
    changes = {"ablations.settings": settings, "ablations.architecture": ["convnet", "vit", "alexnet"]}
    given = load_params(GRID | changes)

    def record(setting, objective, shift, norm):
        accuracy = {"convnet": [0.8, 0.9], "vit": [0.2 + shift, 0.3 + shift], "alexnet": [0.5, 0.6 + shift]}
        measured = {
            "grad_norm_z": norm,
            "grad_norm_c": 1.0,
            "seconds_per_iteration": norm / 4,
            "seconds": 1.0,
            "peak_mib": None,
        }
        return {"setting": setting, "objective": objective, "space": "ld3m", "accuracy": accuracy} | measured

    write_records(DATASET, "steps", [record("T = 2", "dm", 0.05, 1.0), record("T = 5", "dm", 0.0, 2.0)])
    found = [record("noise", "dm", -0.1, 3.0), record("exact", "mtt", 0.1, 4.0), record("first", "mtt", 0.2, 5.0)]
    write_records(DATASET, "defects", found)
    assert "seconds" not in layout.runs_path(DATASET, "ablations", "defects.json").read_text()
    scores, changes, costs = tables.read_ablations(given)
    by_key = scores.set_index(["setting", "architecture"])["mean"]
    assert by_key["none", UNSEEN] == pytest.approx((0.25 + 0.55) / 2)
    assert by_key["noise", UNSEEN] == pytest.approx((0.15 + 0.5) / 2)
    rows = changes.set_index(["setting", "architecture"])
    assert set(rows.index.get_level_values(0)) == {"T = 2", "noise", "first"}
    assert rows.loc[("T = 2", "vit"), "mean"] == pytest.approx(0.05)  # T = 5 is the baseline
    unseen = rows.loc[("noise", UNSEEN)]  # -0.05 and -0.10: half of a t interval of two values 0.05 apart
    assert [unseen["mean"], unseen.ci_high - unseen["mean"]] == pytest.approx([-0.075, 12.7062047 * 0.025])
    assert rows.loc[("first", "vit"), "mean"] == pytest.approx(0.1)
    assert costs.grad_norm_z.tolist() == [1.0, 2.0, 2.0, 3.0, 4.0, 5.0]
    assert costs.seconds_per_iteration.tolist() == [0.25, 0.5, 0.5, 0.75, 1.0, 1.25]
    for place in (layout.costs_path, layout.runs_path):
        file = place(DATASET, "ablations", "defects.json")
        file.unlink()
        with pytest.raises(FileNotFoundError, match=f"{file} is missing: `dvc repro`"):
            tables.read_ablations(given)
