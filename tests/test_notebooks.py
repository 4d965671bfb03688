"""What can be said of the notebooks without running them; test_pipeline.py runs them."""

import ast
import importlib
import os
import re
import subprocess
import sys

import nbformat
import pytest
from ruamel.yaml import YAML

from ld3m.pipeline.notebook_parameters import check_parameters
from ld3m.runtime.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WITH_OUTPUTS = ("01_method",)  # so that a visitor of the repository sees the pictures
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
COMMANDS = {name: stage.get("do", stage)["cmd"] for name, stage in STAGES.items()}


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda file: file.stem)
def notebook(request):
    read = nbformat.read(request.param, as_version=nbformat.NO_CONVERT)
    nbformat.validate(read)
    read["name"] = request.param.stem
    return read


def test_a_notebook_begins_with_its_claim_and_is_stripped_or_whole(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "**Claim.**" in first.source
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code(notebook):
        if notebook.name in WITH_OUTPUTS:
            assert cell.execution_count, f"{notebook.name}: run all cells before it is committed"
            assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.source
        else:
            assert cell.outputs == [] and cell.execution_count is None, f"{notebook.name}: run `make strip`"


def test_a_notebook_uses_only_what_the_library_has(notebook):
    modules, nodes = {}, [*ast.walk(ast.parse("\n".join(cell.source for cell in code(notebook))))]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ld3m":
            package = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(package, alias.name):
                    modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
    for node in nodes:
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
    (checks,) = re.findall(r"^check_parameters\(\s*globals\(\), (.*?)\n?\)$", code(notebook)[1].source, re.M | re.S)
    assert set(re.findall(r"(\w+)=", checks)) == takes
    for name, command in COMMANDS.items():
        if f"notebooks/{notebook.name}.ipynb" in command.split():
            assert set(re.findall(r"(?<!\S)-[pry] (\w+) ", command)) == takes - {"overrides"}, name
            assert f"notebooks/{notebook.name}.ipynb" in STAGES[name].get("do", STAGES[name])["deps"], name


def papermill(folder, *arguments):
    command = [sys.executable, "-m", "ld3m.pipeline.papermill_engine", "-k", "python3", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_parameter_of_another_type_is_named():
    check_parameters({"ipc": 1, "name": "001"}, ipc=float, name=(str, type(None)))
    for given, words in (
        ({"ipc": "1", "name": "a"}, "parameter ipc = '1' is str, must be int$"),
        ({"ipc": 1, "name": 1}, "parameter name = 1 is int, must be str.* -r"),
    ):
        with pytest.raises(ValueError, match=words):
            check_parameters(given, ipc=int, name=str)


CHECK = "from ld3m.pipeline.notebook_parameters import check_parameters\ncheck_parameters(globals(), ipc=int, name=str)"
KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    "source, words",
    [
        (CHECK, "unknown parameter nam; this notebook has ipc, name"),
        (KILL, r"probably since memory ran out \(it used 0\.\d GiB\)"),
    ],
)
def test_an_unknown_parameter_and_a_kernel_that_was_killed_are_named(tmp_path, source, words):
    parameters = nbformat.v4.new_code_cell("ipc = 1\nname = 'a'", metadata={"tags": ["parameters"]})
    given = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)])
    given.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(given, tmp_path / "given.ipynb")
    done = papermill(tmp_path, "given.ipynb", "executed.ipynb", "-p", "nam", "b")
    assert done.returncode and re.search(words, done.stderr), done.stderr


def test_the_demo_runs(tmp_path):
    table = ROOT / "reports/mnist5k/notebooks/demo.md"
    former = table.read_bytes() if table.exists() else None
    options = ("-p", "iterations", "4", "-p", "networks", "2", "--no-progress-bar")
    try:
        done = papermill(ROOT, ROOT / "notebooks/00_demo.ipynb", tmp_path / "demo.ipynb", *options)
        assert done.returncode == 0, done.stderr
        assert "LD3M" in table.read_text()
    finally:
        table.unlink(missing_ok=True)
        if former:
            table.write_bytes(former)
    outputs = [output for cell in nbformat.read(tmp_path / "demo.ipynb", 4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
