"""README shows what the tables hold, and names what exists."""

import io
import re
import subprocess
import tarfile

import pytest
import torch

import ld3m
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
