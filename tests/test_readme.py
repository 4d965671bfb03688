"""README shows what the tables hold, and names what exists."""

import io
import re
import subprocess
import tarfile

import pandas as pd
import pytest
import torch

import ld3m
from ld3m import paths
from ld3m.config import load_params
from ld3m.paths import ROOT
from ld3m.readme import filled

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """README and reports as they are in the last commit: a user's own run may have written other tables since."""
    folder = tmp_path_factory.mktemp("committed")
    archive = subprocess.run(
        ["git", "archive", "HEAD", "README.md", "reports"], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_every_number_in_the_readme_is_that_of_the_committed_tables(committed):
    readme = (committed / "README.md").read_text()
    assert readme == filled(readme, committed / "reports"), "run `python -m ld3m.readme`"


def test_the_committed_tables_show_what_the_readme_says(committed):
    changes = pd.read_csv(committed / "reports/tables/differences.csv")
    against_real = changes[(changes.minus == "random_real") & (changes.architecture == "convnet")]
    assert len(against_real) == 6 and (against_real.ci_low > 0).all()
    unseen = changes[(changes.minus == "pixel") & (changes.architecture == "unseen")].set_index("objective")
    assert (unseen["mean"] > 0.02).all() and (unseen.ci_low > 0).to_dict() == {"dc": False, "dm": False, "mtt": False}
    scores = pd.read_csv(committed / "reports/tables/scores.csv")
    best = scores[(scores.objective == "dm") & (scores.space == "ld3m") & (scores.architecture == "convnet")]
    assert best["mean"].item() >= 0.88
    norms = pd.read_csv(committed / "reports/tables/gradient_norms.csv").set_index(["learned", "skip", "steps"])["mean"]
    assert norms["z", "x0", 20] > norms["z", "x0", 5]
    assert all(norms["z", skip, 20] < norms["z", skip, 5] / 2 for skip in ("mean", "none"))
    assert all(norms["z_T", skip, 20] > 0.9 * norms["z_T", skip, 5] for skip in ("x0", "mean", "none"))


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
