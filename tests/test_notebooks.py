"""What can be said of the notebooks without running them; test_pipeline.py runs them."""

import ast
import importlib.util
import re

import nbformat
import pytest
from ruamel.yaml import YAML

from ld3m.runtime.paths import ROOT

NUMBERED = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
BY_HAND = [ROOT / "notebooks" / name for name in ("explore.ipynb", "judge.ipynb")]
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
COMMANDS = {name: stage.get("do", stage)["cmd"] for name, stage in STAGES.items()}


def notebooks_of(command):
    return re.findall(r"(?<!\S)(notebooks/\S+\.ipynb)", command)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag="parameters"):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def tree(notebook):
    return ast.parse("\n".join(cell.source for cell in code(notebook)))


@pytest.fixture(params=[*NUMBERED, *BY_HAND], ids=lambda file: file.stem)
def notebook(request):
    read = nbformat.read(request.param, as_version=nbformat.NO_CONVERT)
    read["file"] = f"notebooks/{request.param.name}"
    return read


def test_there_are_numbered_notebooks_and_those_run_by_hand():
    assert sorted({file.name[:2] for file in NUMBERED}) == [f"{number:02d}" for number in range(7)]
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == [*NUMBERED, *BY_HAND]


def test_a_notebook_is_valid_and_stripped(notebook):
    file = notebook.pop("file")
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None, f"{file}: run `make strip`"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"} and cell.source.strip(), cell


def test_a_notebook_has_one_cell_of_parameters_which_is_its_first_code(notebook):
    assert tagged(notebook) == code(notebook)[:1]
    for statement in ast.parse(tagged(notebook)[0].source).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1
        ast.literal_eval(statement.value)  # derived values would not follow an injected one


def test_a_notebook_runs_no_shell_and_names_no_path_outside(notebook):
    for cell in code(notebook):
        assert not re.search(r"(?m)^\s*[%!?]|\?$", cell.source), cell.source
    nodes = list(ast.walk(tree(notebook)))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in strings if text.startswith(("/", "~", ".."))]  # paths come from ld3m.runtime.paths


def test_a_notebook_uses_only_what_the_library_has(notebook):
    modules = {}
    for node in ast.walk(tree(notebook)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ld3m":
            package = importlib.import_module(node.module)
            for alias in node.names:
                if importlib.util.find_spec(f"{node.module}.{alias.name}") if hasattr(package, "__path__") else None:
                    modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                else:
                    assert hasattr(package, alias.name), f"{node.module}.{alias.name}"
    for node in ast.walk(tree(notebook)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def test_a_notebook_is_prose_too(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "**Claim.**" in first.source
    assert notebook.cells[-1].cell_type == "markdown" and "**What to look at.**" in notebook.cells[-1].source


def test_every_numbered_notebook_is_run_by_a_stage_that_depends_on_it():
    run = {file for command in COMMANDS.values() for file in notebooks_of(command)}
    assert run == {f"notebooks/{file.name}" for file in NUMBERED}
    for name, command in COMMANDS.items():
        stage = STAGES[name].get("do", STAGES[name])
        assert set(notebooks_of(command)) <= set(stage["deps"]), name


def test_a_stage_injects_only_what_its_notebook_takes(notebook):
    """Papermill warns of another parameter and goes on without it."""
    targets = {statement.targets[0].id for statement in ast.parse(tagged(notebook)[0].source).body}
    for name, command in COMMANDS.items():
        if notebook["file"] in notebooks_of(command):
            injected = set(re.findall(r"(?<!\S)-[pry] (\w+) ", command))
            assert injected == targets - {"overrides"}, name
