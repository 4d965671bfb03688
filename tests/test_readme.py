"""README shows what the tables hold, and names what exists."""

import io
import re
import subprocess
import tarfile

import pandas as pd
import pytest
import torch

import ld3m
from ld3m.pipeline.profiles import load_params
from ld3m.reporting.readme import filled
from ld3m.runtime import paths
from ld3m.runtime.paths import ROOT

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """README and what it reads, as they are in the last commit: a run of the user's may have written others since."""
    folder = tmp_path_factory.mktemp("committed")
    archive = subprocess.run(
        ["git", "archive", "HEAD", "README.md", "reports", "benchmarks"], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_every_number_in_the_readme_is_that_of_the_committed_tables(committed):
    readme = (committed / "README.md").read_text()
    assert readme == filled(readme, committed / "reports"), "run `python -m ld3m.reporting.readme`"


def test_the_committed_tables_show_what_the_readme_says(committed):
    changes = pd.read_csv(committed / "reports/tables/differences.csv")
    against_real = changes[(changes.minus == "random_real") & (changes.architecture == "convnet")]
    assert len(against_real) == 6 and (against_real.ci_low > 0).all()
    unseen = changes[(changes.minus == "pixel") & (changes.architecture == "unseen")].set_index("objective")
    assert len(unseen) == 3 and (unseen["mean"] > 0.02).all()
    assert (unseen.ci_low > 0).to_dict() == {"dc": False, "dm": True, "mtt": True}
    scores = pd.read_csv(committed / "reports/tables/scores.csv")
    best = scores[(scores.objective == "dm") & (scores.space == "ld3m") & (scores.architecture == "convnet")]
    assert best["mean"].item() >= 0.88
    norms = pd.read_csv(committed / "reports/tables/gradient_norms.csv").set_index(["learned", "skip", "steps"])["mean"]
    assert norms["z", "x0", 20] > norms["z", "x0", 5]
    assert all(norms["z", skip, 20] < norms["z", skip, 5] / 2 for skip in ("mean", "none"))
    assert all(norms["z_T", skip, 20] > 0.9 * norms["z_T", skip, 5] for skip in ("x0", "mean", "none"))


@pytest.mark.parametrize("name", ["tables/main", "tables/cifar10", "full/tables/main", "full/tables/runs"])
def test_a_table_to_read_has_the_numbers_of_its_csv(committed, name):
    frame = pd.read_csv(committed / f"reports/{name}.csv", keep_default_na=False)
    lines = (committed / f"reports/{name}.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[3:-1]] for line in lines if line.startswith("| ")][1:]
    groups = frame.groupby(["ipc", "objective", "space"], sort=False)
    expected = [
        [f"{100 * row.mean:.1f} ± {100 * (row.ci_high - row.mean):.1f}" for row in group.itertuples()]
        for _, group in groups
    ]
    assert sorted(cells) == sorted(expected)
    assert all(cell in (committed / f"reports/{name}.tex").read_text().replace(r"$\pm$", "±") for cell in cells[0])


def test_the_report_shows_what_the_readme_says(committed):
    tables = committed / "reports/full/tables"
    changes = pd.read_csv(tables / "differences.csv").query("architecture == 'unseen' and space == 'ld3m'")
    against = changes.set_index(["minus", "ipc", "objective"]).sort_index()
    glad, pixel = against.loc["glad", 1], against.loc["pixel"]
    assert (glad.ci_low < 0).all() and (glad.ci_high > 0).to_dict() == {"dc": False, "dm": True, "mtt": False}
    iterations = [load_params().budget("dm", "ld3m", ipc).iterations for ipc in (10, 1)]
    said = f"LD3M has {iterations[0]} iterations, a quarter"
    assert said in " ".join(README.split()) and iterations[1] == 4 * iterations[0]
    assert (pixel["mean"] > 0).all() and pixel.ci_low[10, "dm"] < 0 < pixel.ci_high[10, "dm"]
    assert against.ci_low["glad", 10, "dm"] < 0 < against.ci_high["glad", 10, "dm"]
    assert (against.ci_low["herding"] > 0).to_dict() == {(1, "dc"): True, (1, "dm"): False, (1, "mtt"): False} | {
        (10, "dm"): False
    }
    assert 0 < against["mean"]["iteration0", 10, "dm"] < 0.02
    alexnet = pd.read_csv(tables / "differences.csv").query("architecture == 'alexnet' and minus == 'pixel'")
    alexnet = alexnet[alexnet.space == "ld3m"].set_index(["ipc", "objective"])
    assert (alexnet["mean"][[(1, "dc"), (1, "mtt")]] < 0).all() and (alexnet.ci_high > 0).all()
    trials = pd.read_csv(committed / "reports/trials.csv").set_index(["objective", "learning_rate", "checked_at"])
    accuracy = trials.validation_accuracy
    assert accuracy["dc", 0.03, 60] < accuracy["dc", 0.03, 0] < accuracy["dc", 0.003, 60]
    assert accuracy["dm"].idxmax()[1] == 20 == iterations[0]
    runs = pd.read_csv(tables / "runs_differences.csv").query("architecture == 'unseen' and minus == 'pixel'")
    assert runs.ci_low.item() < 0 < runs["mean"].item() < pixel["mean"][1, "dm"]
    ten = pd.read_csv(tables / "differences.csv").query("ipc == 10 and minus == 'random_real'")
    assert (ten[(ten.architecture == "convnet") & (ten.space != "ld3m")].ci_low < 0).all()
    found = pd.read_csv(tables / "ablation_changes.csv").set_index(["setting", "architecture"])

    def is_told(setting, *architectures):
        return [not found.ci_low[setting, name] <= 0 <= found.ci_high[setting, name] for name in architectures]

    both = ("convnet", "vgg11")
    assert is_told("none, Z", *both) == is_told("none, z_T", *both) == [False, False]
    assert (found["mean"][[("mean, Z", "convnet"), ("mean, Z at rate 3", "convnet")]] < -0.2).all()
    assert is_told("noise", *both) == is_told("c", *both) == is_told("encoder range", *both) == [True, True]
    assert is_told("mean, z_T", *both) == [True, True] and found["mean"]["mean, z_T", "vgg11"] < 0
    assert is_told("random U-Net", *both) == is_told("prior samples", *both) == [False, False]
    assert all(-0.04 < found["mean"]["random U-Net", name] < -0.02 for name in both)  # two to four points
    assert is_told("T = 5", *both) == [False, True] and found["mean"]["T = 5", "vgg11"] > 0
    assert (found["mean"]["T = 20"] < found["mean"]["T = 5"]).all()
    assert is_told("redrawn noise", *both) == [True, False] and found["mean"]["redrawn noise", "convnet"] < 0
    for setting in ("mismatched normalisation", "selection on test", "first-order MTT"):
        assert is_told(setting, "unseen") == is_told(setting, *both)[:1] == is_told(setting, *both)[1:] == [False]
    assert is_told("ViT without norms", "vit") == [True] and found["mean"]["ViT without norms", "vit"] > 0


def test_natural_images_show_what_the_readme_and_the_profile_say(committed):
    changes = pd.read_csv(committed / "reports/cifar10/differences.csv").query("space == 'ld3m' and minus == 'pixel'")
    found = changes.set_index(["objective", "architecture"]).sort_index()
    low, high = found.ci_low.xs("unseen", level=1), found.ci_high.xs("unseen", level=1)
    assert high["dc"] < 0 and low["dm"] < 0 < high["dm"] and low["mtt"] < 0 < high["mtt"]
    mtt = found["mean"]["mtt"]
    assert mtt["alexnet"] > 0 and mtt["vgg11"] > 0 > mtt["convnet"] and found.ci_high["mtt", "convnet"] > 0
    trials = pd.read_csv(committed / "reports/cifar10/trials.csv").query("space == 'ld3m'")
    dc = trials[trials.objective == "dc"]
    assert dc.learning_rate.max() == 10 * dc.learning_rate.min() and dc.checked_at.max() == 3 * dc.checked_at.min()
    assert dc.validation_accuracy.max() - dc.validation_accuracy.min() < 0.005
    dm = trials[(trials.objective == "dm") & (trials.iterations > 100)].pivot_table(
        index="learning_rate", columns="checked_at", values="validation_accuracy"
    )
    assert len(dm) == 3 and (dm[200] < dm[100]).all()
    costs = pd.read_csv(committed / "reports/cifar10/costs.csv").pivot(
        index="objective", columns="space", values="seconds"
    )
    assert (costs.ld3m < costs.pixel).all()
    means = pd.read_csv(committed / "reports/tables/cifar10.csv").set_index(["objective", "space", "architecture"])[
        "mean"
    ]
    header = re.sub(r"\s*\n#\s*", " ", (ROOT / "profiles/cifar10_cpu.yaml").read_text())
    for objective in ("dc", "dm", "mtt"):
        for space, name in (("pixel", "pixel"), ("ld3m", "LD3M")):
            seen, unseen = (f"{100 * means[objective, space, judge]:.1f}" for judge in ("convnet", "unseen"))
            assert f"{name} {seen} and {unseen}" in header, (objective, space)


def test_runs_and_ablations_on_natural_images_show_what_the_readme_says(committed):
    runs = pd.read_csv(committed / "reports/cifar10/runs_differences.csv").query("space == 'ld3m' and minus == 'pixel'")
    runs = runs.set_index(["objective", "architecture"]).sort_index()
    assert set(runs.n) == {3}
    low, high = runs.ci_low.xs("unseen", level=1), runs.ci_high.xs("unseen", level=1)
    assert -0.001 < high["dc"] < 0 and low["dm"] < 0 < high["dm"] and low["mtt"] > 0
    assert (runs.ci_low.xs("convnet", level=1) < 0).all()
    header = re.sub(r"\s*\n#\s*", " ", (ROOT / "profiles/cifar10_cpu.yaml").read_text())
    for objective, row in runs.xs("unseen", level=1).iterrows():
        mean, *limits = (f"{100 * row[column]:+.1f}" for column in ("mean", "ci_low", "ci_high"))
        assert f"{objective.upper()} {mean} ({' to '.join(limits)})" in header
    changes = pd.read_csv(committed / "reports/cifar10/ablation_changes.csv").set_index(["setting", "architecture"])
    assert changes.loc[("T = 5", "convnet")].ci_low > 0  # T = 2 is the first
    steps = changes.loc[[(f"T = {steps}", "unseen") for steps in (5, 10, 20)]]
    assert (steps.ci_low < 0).all() and (steps.ci_high > 0).all()
    both = ["convnet", "unseen"]
    assert changes["mean"][[("none, Z", name) for name in both]].between(-0.04, -0.02).all()
    assert (changes.ci_high[[("none, Z", name) for name in both]] < 0).all()
    pair = changes.loc["mean, z_T"]
    assert 0.015 < pair["mean"]["unseen"] < 0.025 and pair.ci_low["unseen"] > 0 > pair["mean"]["vgg11"]
    ablations = pd.read_csv(committed / "reports/cifar10/ablations.csv").set_index(["setting", "architecture"])["mean"]
    main = pd.read_csv(committed / "reports/tables/cifar10.csv").query("space == 'random_real'")
    assert (ablations["none, z_T"] > ablations["x0, z_T"]).all()
    assert (ablations["mean, Z"].sub(main.set_index("architecture")["mean"]) < 0).all()
    norms = pd.read_csv(committed / "reports/cifar10/ablation_costs.csv").set_index(["ablation", "setting"]).grad_norm_z
    assert norms["skip_learn", "none, Z"] == pytest.approx(norms["skip_learn", "mean, Z"], rel=0.1)
    norms = pd.read_csv(committed / "reports/cifar10/gradient_norms.csv").set_index(["learned", "skip", "steps"])[
        "mean"
    ]
    assert norms["z", "x0", 5] == pytest.approx(norms["z", "x0", 20], rel=0.1)
    assert all(norms["z", skip, 20] < norms["z", skip, 5] < 0.11 * norms["z", "x0", 5] for skip in ("mean", "none"))
    assert 0.4 < norms["z_T", "x0", 20] / norms["z_T", "x0", 5] < 0.5
    one_set = pd.read_csv(committed / "reports/cifar10/differences.csv").query("space == 'ld3m'")
    one_set = one_set.set_index(["minus", "objective", "architecture"]).sort_index()
    samples = one_set.loc[("prior_samples", "dm", "unseen")]
    assert samples.ci_low < 0 < samples.ci_high
    for found in (runs, one_set.loc["pixel"]):
        assert found.ci_high["dc", "convnet"] < 0
        assert all(found.ci_low[name, "convnet"] < 0 < found.ci_high[name, "convnet"] for name in ("dm", "mtt"))
    first = pd.read_csv(committed / "reports/cifar10/first_run.csv")
    first = first[first.architecture == "unseen"].set_index(["objective", "space"])["mean"]
    assert first["mtt", "ld3m"] < first["mtt", "pixel"]
    drawn = pd.read_csv(committed / "reports/cifar10/representable.csv")
    drawn = drawn.set_index(["objective", "images", "architecture"]).sort_index()
    table = pd.read_csv(committed / "reports/tables/cifar10.csv").set_index(["objective", "space", "architecture"])
    for objective in ("dc", "mtt"):
        for name in ("convnet", "unseen"):
            as_distilled = drawn["mean"][objective, "as distilled", name]
            assert as_distilled == pytest.approx(table["mean"][objective, "pixel", name], abs=1e-6)
            ahead = table["mean"][objective, "ld3m", name] - drawn["mean"][objective, "nearest of LD3M", name]
            assert abs(ahead) < 0.0025 if objective == "dc" else ahead > 0.025
        assert 0.38 < drawn.missed[objective, "nearest of LD3M", "convnet"] < 0.43
    trials = pd.read_csv(committed / "reports/cifar10/trials.csv")
    counts = trials.drop_duplicates(["objective", "space", "learning_rate", "iterations"])
    assert counts.groupby(["objective", "space"]).size().tolist() == [4, 1, 7, 3, 4, 3]


def test_a_gpu_shows_what_the_readme_says(committed):
    scores = pd.read_csv(committed / "reports/cifar10/gpu_scores.csv").query("architecture == 'convnet'")
    found = scores.set_index(["objective", "space", "ipc"])["mean"]
    published = {("dc", 10): 0.521, ("dm", 1): 0.26, ("dm", 10): 0.489, ("mtt", 1): 0.463, ("mtt", 10): 0.653}
    below = {cell: value - found[cell[0], "pixel", cell[1]] for cell, value in published.items()}
    assert all(abs(below[cell]) < 0.04 if cell[0] == "dm" else below[cell] > 0.04 for cell in published)
    assert below["dc", 10] == pytest.approx(0.113, abs=0.005)  # eleven
    assert 0.025 < found["none", "random_real", 1] - 0.144 < found["none", "random_real", 10] - 0.26 < 0.055
    assert "ld3m" not in set(scores.space)
    every = pd.read_csv(committed / "reports/cifar10/gpu_scores.csv")
    means = every.set_index(["ipc", "objective", "space", "architecture"])["mean"]
    header = re.sub(r"\s*\n#\s*", " ", (ROOT / "profiles/cifar10.yaml").read_text())
    for ipc, objective, space, name in (
        *((1, "none", "random_real", "random real"), (1, "dm", "pixel", "DM pixel"), (1, "mtt", "pixel", "MTT pixel")),
        *((1, "dc", "glad", "DC GLaD"), (10, "none", "random_real", "random real"), (10, "dc", "pixel", "DC pixel")),
        *((10, "dm", "pixel", "DM pixel"), (10, "mtt", "pixel", "MTT pixel")),
    ):
        seen, unseen = (f"{100 * means[ipc, objective, space, judge]:.1f}" for judge in ("convnet", "unseen"))
        assert f"{name} {seen} and {unseen}" in header, (ipc, name)
    lines = {line.split(" |")[0]: line for line in README.splitlines() if "cifar10/gpu_scores mean" in line}
    for (objective, ipc), value in published.items():
        assert f"| {100 * value:.1f} |" in lines[f"| {objective.upper()} pixel"], (objective, ipc)
    costs = pd.read_csv(committed / "benchmarks/full_size_cuda.csv").query("size_px == 128 and launch == 'replayed'")
    dm = costs[costs.objective == "dm"].set_index("steps")
    assert f"{100 * dm.tflop_per_s[20] / dm.matmul_tflop_per_s[20]:.0f} % of the rate of a large bf16 product" in README
    assert f"takes {(2 * dm.ms_per_iteration[10] - dm.ms_per_iteration[20]) / 1000:.1f} s of it" in README
    assert dm.hours_for_10000_iterations[20] * 60 == pytest.approx(574 / 3, rel=0.05)
    assert set(costs.precision) == {"bf16"} and set(costs.ipc) == {1}


def test_memory_at_full_size_is_what_the_readme_says(committed):
    found = pd.read_csv(committed / "benchmarks/full_size_cpu.csv")
    assert found.finite_and_non_zero.all() and found.objective.unique().tolist() == ["dm", "dc", "mtt"]
    assert f"most {found.peak_gib.max():.1f} GiB" in README and found.peak_gib.max() < 14
    mtt = found[found.objective == "mtt"].set_index("steps").peak_gib
    assert f"takes {100 * (mtt[20] / mtt[5] - 1):.0f} % more memory than with 5" in README


def test_the_lines_written_by_hand_are_short():
    before, _, rest = README.partition("<!-- table -->")
    by_hand = [line for line in (before + rest.partition("<!-- /table -->")[2]).splitlines() if line[:1] != "|"]
    assert [line for line in by_hand if len(line) > 120] == []


def test_every_file_that_the_readme_links_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_recipe_for_a_distilled_set_has_ten_lines_runs_and_is_that_of_the_parameters(monkeypatch):
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ld3m.load" in text)
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    monkeypatch.setattr(ld3m, "load", lambda path: (torch.randn(10, 3, 32, 32), torch.arange(10)))
    scope = {}
    exec(re.sub(r"range\(\d+\)", "range(2)", block), scope)
    assert scope["network"](scope["images"]).shape == (10, 10)
    rate, epochs = re.search(r"lr=([\d.]+)", block)[1], re.search(r"range\((\d+)\)", block)[1]
    recipe, convnet = load_params().evaluate.recipe, load_params().networks["convnet"]
    assert (float(rate), int(epochs)) == (recipe.learning_rates["convnet"], recipe.epochs["convnet"])
    assert f"width={convnet.width}" in block
    cell = paths.distilled_folder(load_params().place("dm", "ld3m", 1, 0), "dm-ld3m-1", 0)
    assert f'ld3m.load("{cell.relative_to(ROOT)}")' in block
