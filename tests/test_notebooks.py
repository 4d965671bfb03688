"""What can be said of the notebooks without running them; test_pipeline.py runs them."""

import ast
import importlib
import re

import nbformat
import pytest
from ruamel.yaml import YAML

from ld3m.runtime.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WITH_OUTPUTS = ("01_method",)  # so that a visitor of the repository sees the pictures
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
COMMANDS = {name: stage.get("do", stage)["cmd"] for name, stage in STAGES.items()}


def run_by(command):
    return re.findall(r"(?<!\S)notebooks/(\S+)\.ipynb", command)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tree(notebook):
    return ast.parse("\n".join(cell.source for cell in code(notebook)))


@pytest.fixture(params=NOTEBOOKS, ids=lambda file: file.stem)
def notebook(request):
    read = nbformat.read(request.param, as_version=nbformat.NO_CONVERT)
    nbformat.validate(read)
    read["name"] = request.param.stem
    return read


def test_a_notebook_is_stripped_or_whole(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code(notebook):
        if notebook.name in WITH_OUTPUTS:
            assert cell.execution_count, f"{notebook.name}: run all cells before it is committed"
            assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.source
        else:
            assert cell.outputs == [] and cell.execution_count is None, f"{notebook.name}: run `make strip`"


def test_a_notebook_begins_with_its_claim(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "**Claim.**" in first.source


def test_a_notebook_uses_only_what_the_library_has(notebook):
    modules = {}
    for node in ast.walk(tree(notebook)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ld3m":
            package = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(package, alias.name):
                    modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
    for node in ast.walk(tree(notebook)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def test_a_stage_depends_on_its_notebook_and_injects_only_what_it_takes(notebook):
    """Papermill warns of another parameter and goes on without it. A value derived from one would not follow it."""
    given = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert given == code(notebook)[:1]
    statements = ast.parse(given[0].source).body
    for statement in statements:
        ast.literal_eval(statement.value)
    takes = {statement.targets[0].id for statement in statements}
    for name, command in COMMANDS.items():
        if notebook.name in run_by(command):
            assert set(re.findall(r"(?<!\S)-[pry] (\w+) ", command)) == takes - {"overrides"}, name
            assert f"notebooks/{notebook.name}.ipynb" in STAGES[name].get("do", STAGES[name])["deps"], name
