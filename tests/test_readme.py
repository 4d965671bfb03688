"""README shows what the tables hold, and names what exists."""

import re

from ld3m.paths import ROOT, TABLES
from ld3m.report import with_table

README = (ROOT / "README.md").read_text()


def test_the_table_in_the_readme_is_the_committed_one():
    assert README == with_table(README, (TABLES / "main.md").read_text()), "run `python -m ld3m.report`"


def test_every_file_that_the_readme_links_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_recipe_for_a_distilled_set_has_ten_lines_and_runs(monkeypatch, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    import torch
    from safetensors.torch import save_file

    file = tmp_path / re.search(r'load_file\("([^"]+)"\)', block)[1]
    file.parent.mkdir(parents=True)
    save_file({"images": torch.randn(10, 3, 32, 32), "labels": torch.arange(10)}, file)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block.replace("range(300)", "range(2)"), scope)
    assert scope["network"](scope["images"]).shape == (10, 10)
