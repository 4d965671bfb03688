"""README.md and docs/: numbers are those of the committed tables, and every command, path and example works."""

import importlib.util
import io
import json
import re
import subprocess
import tarfile
from functools import reduce
from operator import getitem

import pytest
import torch
import yaml

import ld3m
from ld3m.pipeline.profiles import apply_profiles, load_params
from ld3m.reporting.docs import render
from ld3m.runtime.paths import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCUMENTS}
EVERY = "\n".join(TEXT.values())
PROFILES = {path.stem: path.read_text() for path in sorted((ROOT / "profiles").glob("*.yaml"))}
COMMANDS = EVERY + "\n".join(PROFILES.values())


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """Documents, templates and tables of the last commit: a run of the user's may have written other tables since."""
    folder = tmp_path_factory.mktemp("committed")
    command = ["git", "archive", "HEAD", "README.md", "docs", "reports", "benchmarks"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_documents_have_the_numbers_of_the_committed_tables(committed):
    for path, text in render(committed).items():
        assert (committed / path).read_text() == text, f"{path}: run `python -m ld3m.reporting.docs`"


@pytest.mark.parametrize(
    "template, words",
    [
        ('{{ row("reports/toy", space="pixel").mean | percent }}', "2 rows"),
        ('{% do significant("0", "reports/toy", space="ld3m") %}', "no longer support"),
        ('{% do claim(row("reports/toy", space="ld3m").mean > 0.7) %}', "no longer support"),
    ],
)
def test_a_number_without_a_row_and_a_claim_that_does_not_hold_are_refused(tmp_path, template, words):
    for folder in ("docs/templates", "reports"):
        (tmp_path / folder).mkdir(parents=True)
    rows = "space,mean,ci_low,ci_high\npixel,0.5,0.4,0.6\npixel,0.6,0.5,0.7\nld3m,0.625,0.6,0.65\n"
    (tmp_path / "reports/toy.csv").write_text(rows)
    file = tmp_path / "docs/templates/page.md.j2"
    file.write_text('{{ row("reports/toy", space="ld3m") | interval }}')
    assert list(render(tmp_path).values()) == ["+62.5 (+60.0 to +65.0)"]
    file.write_text(template)
    with pytest.raises(ValueError, match=words):
        render(tmp_path)


def test_documents_are_short_and_profiles_have_their_numbers():
    assert len(TEXT["README.md"].encode()) < 12_000
    for name, text in TEXT.items():
        by_hand = [line for line in text.splitlines() if line[:1] not in "|![" and "](" not in line]
        assert len(text.splitlines()) < 200 and max(map(len, by_hand)) <= 140 and "<!--" not in text, name
    headers = [line for text in PROFILES.values() for line in text.splitlines() if line.startswith("#")]
    assert [number for number in re.findall(r"\b\d+\.\d\b", "\n".join(headers)) if number not in EVERY] == []


def test_the_readme_names_the_test_command_of_ci():
    assert f"`{(ROOT / '.ci/run').read_text().splitlines()[-1]}`" in TEXT["README.md"]


def test_every_link_leads_somewhere():
    for name, text in TEXT.items():
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            file = (ROOT / name).parent / target if target else ROOT / name
            assert file.exists(), f"{name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, (name, anchor)


def test_every_command_names_what_exists():
    found = {m for m in re.findall(r"python -m ([\w.]+)", COMMANDS) if m.startswith(("ld3m", "benchmarks"))}
    assert len(found) > 5 and [m for m in found if importlib.util.find_spec(m) is None] == []
    targets = re.findall(r"^(?:`|\$ )?make ([a-z-]+)|`make ([a-z-]+)`", EVERY, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert [t for t in map("".join, targets) if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
    applied = re.findall(r"(?:profiles apply|pipeline\.estimate) (?:profiles/)?([a-z]\w*)", COMMANDS)
    assert applied and set(applied) <= {*PROFILES, "mine"}  # a user's own
    folders = "notebooks|tests|ld3m|benchmarks|profiles"
    files = re.findall(rf"(?<!/)\b((?:{folders})/[\w/.]+\.(?:ipynb|py|yaml|csv))", COMMANDS)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_stage_and_parameter_in_a_command_exists():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    extensions = {"moments-ld3m-1", "class_mean-1"}  # those of docs/extend.md
    for line in re.findall(r"dvc (?:repro|exp run)(.*?)(?:`|$|  #)", COMMANDS, re.MULTILINE):
        for stage, key in re.findall(r"\b(prior|gan|distill|evaluate|control|tables|report)\b@?([\w*-]*)", line):
            keys = {**params["cells"], **params["controls"]} if stage in ("distill", "evaluate", "control") else {}
            assert stage in stages and (not key or "*" in key or key in keys or key in extensions), line
        for key in re.findall(r"-S ([\w.]+)=", line):
            reduce(getitem, key.split("."), params)


@pytest.mark.parametrize("name", ["imagenet", "own-data"])
def test_a_dataset_is_described_with_every_key_it_needs(name, tmp_path):
    for block in re.findall(r"```yaml\n(.*?)```", TEXT[f"docs/{name}.md"], re.DOTALL):
        (tmp_path / "mine.yaml").write_text(block)
        apply_profiles(tmp_path / "mine.yaml", path=tmp_path / "params.yaml")


@pytest.mark.parametrize("name", ["02_distill", "judge"])
def test_papermill_is_given_parameters_of_the_notebook(name):
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]
    (parameters,) = ("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    lines = re.findall(rf"papermill_engine -k python3 notebooks/{name}.ipynb(.*)", EVERY.replace("\\\n", ""))
    given = re.findall(r" -[pr] (\w+)", " ".join(lines))
    assert given and [key for key in given if not re.search(rf"^{key} =", parameters, re.MULTILINE)] == []


def test_the_example_in_the_readme_has_ten_lines_runs_and_uses_the_committed_recipe(monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT["README.md"], re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10
    monkeypatch.setattr(ld3m, "load", lambda path: (torch.randn(10, 3, 32, 32), torch.arange(10)))
    scope = {}
    exec(re.sub(r"range\(\d+\)", "range(2)", block), scope)
    assert scope["network"](scope["images"]).shape == (10, 10)
    rate, epochs = re.search(r"lr=([\d.]+)", block)[1], re.search(r"range\((\d+)\)", block)[1]
    recipe = load_params().evaluate.recipe
    assert (float(rate), int(epochs)) == (recipe.learning_rates["convnet"], recipe.epochs["convnet"])
    assert f"width={load_params().networks['convnet'].width}," in block
