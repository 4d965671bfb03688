"""README shows what the tables hold, and names what exists."""

import io
import re
import subprocess

import pandas as pd
import torch

import ld3m
from ld3m.config import load_params
from ld3m.paths import ROOT
from ld3m.report import with_table

README = (ROOT / "README.md").read_text()


def committed(path: str) -> str:
    """A file as it is in the last commit: a user's own run may have written other tables since."""
    return subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_table_in_the_readme_is_the_committed_one():
    readme = committed("README.md")
    assert readme == with_table(readme, committed("reports/tables/main.md")), "run `python -m ld3m.report`"


def test_the_committed_tables_show_what_the_readme_says():
    changes = pd.read_csv(io.StringIO(committed("reports/tables/differences.csv")))
    against_real = changes[(changes.minus == "random_real") & (changes.architecture == "convnet")]
    assert len(against_real) == 6 and (against_real.ci_low > 0).all()
    unseen = changes[(changes.minus == "pixel") & (changes.architecture == "unseen")].set_index("objective")
    assert (unseen["mean"] > 0.02).all() and (unseen.ci_low > 0).to_dict() == {"dc": False, "dm": False, "mtt": True}


def test_the_lines_written_by_hand_are_short():
    by_hand = [line for line in with_table(README, "").splitlines() if not line.startswith("|")]
    assert [line for line in by_hand if len(line) > 120] == []


def test_every_file_that_the_readme_links_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_recipe_for_a_distilled_set_has_ten_lines_runs_and_is_that_of_the_parameters(monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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


def test_what_the_readme_says_of_the_ablations_is_in_the_tables():
    ablations = pd.read_csv(ROOT / "reports/full/tables/ablations.csv").set_index(
        ["ablation", "setting", "architecture"]
    )
    scores = pd.read_csv(ROOT / "reports/full/tables/main.csv").set_index(["objective", "space", "architecture"])
    told = README[README.index("### With GLaD") : README.index("### What the numbers do not show")]

    def percent(*key, table=ablations):
        return 100 * table.loc[key, "mean"]

    def loss(setting, architecture):
        return percent("defects", "none", architecture) - percent("defects", setting, architecture)

    numbers = [percent("none", "herding", "convnet", table=scores), percent("none", "herding", "unseen", table=scores)]
    numbers += [percent("dm", "ld3m", "convnet", table=scores), percent("dm", "ld3m", "unseen", table=scores)]
    numbers += [percent("skip_learn", name, "convnet") for name in ("none, z_T", "x0, Z", "mean, z_T", "mean, Z")]
    numbers += [percent("prior", "random U-Net", "convnet")]
    numbers += [percent("steps", name, "convnet") for name in ("T = 2", "T = 20")]
    numbers += [loss("redrawn noise", "convnet"), loss("redrawn noise", "unseen")]
    numbers += [-loss("selection on test", "convnet"), -loss("selection on test", "unseen")]
    numbers += [percent("defects", name, "convnet") for name in ("first-order MTT", "exact MTT")]
    assert [f"{number:.1f}" for number in numbers if f"{number:.1f}" not in told] == []
