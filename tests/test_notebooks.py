"""What can be said of the notebooks without running them, and the two no stage runs; test_pipeline.py runs the rest."""

import ast
import importlib
import os
import re
import subprocess
import sys

import nbformat
import pytest
from executing import run_notebook
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


def test_every_parameter_of_a_notebook_has_its_type_and_its_range(notebook):
    first, second = code(notebook)[:2]
    given, checks = {}, ast.parse(second.source)
    exec(first.source, given)
    (last,) = [k for k, node in enumerate(checks.body) if "check_parameters(" in ast.unparse(node)]
    checks.body = [node for node in checks.body[: last + 1] if not isinstance(node, ast.Import | ast.ImportFrom)]
    call = compile(checks, notebook.name, "exec")
    exec(call, given | {"check_parameters": check_parameters})
    wrong = {int: (-1, 10**9, 2.5), float: (float("nan"), "3"), str: (1,), dict: ([],), type(None): (1,)}
    for name, value in given.items():
        for other in wrong.get(type(value), ()) if not name.startswith("_") else ():
            with pytest.raises(ValueError, match=f"parameter {name} = "):
                exec(call, given | {"check_parameters": check_parameters, name: other})


def papermill(folder, *arguments):
    command = [sys.executable, "-m", "ld3m.pipeline.papermill_engine", "-k", "python3", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"ipc": "1"}, "ipc = '1': must be a finite number$"),
        ({"ipc": float("nan")}, "ipc = nan: must be a finite number$"),
        ({"name": 1}, "name = 1: must be None or text; papermill .* -r$"),
        ({"digit": 10}, "digit = 10: must be a whole number from 0 to 9$"),
        ({"digit": True}, "digit = True: must be a whole"),
        ({"digit": 1.0}, "digit = 1.0: must be a whole"),
        ({"form": "bits"}, "form = 'bits': must be None or 'uint8' or 'unit'$"),
        ({"mean": [0.5, "a"]}, "mean = .*: must be None or a list of numbers$"),
        ({"mean": "[0.5]"}, "mean = .*: must be None or a list of numbers; .* -y "),
        ({"nam": True}, "nam; this notebook has ipc, name, digit, form, mean, overrides$"),
        ({"overrides": "{seed: 1}"}, "overrides = .*: must be a dict; .* -y 'overrides: {seed: 1}'$"),
    ],
)
def test_a_parameter_with_a_wrong_value_is_named_with_what_is_allowed(given, words):
    right = {"ipc": 1, "name": None, "digit": 9, "form": "unit", "mean": [1, 0.5], "overrides": {}}
    allowed = {"ipc": float, "name": (None, str), "digit": range(10), "form": (None, "uint8", "unit")}
    allowed |= {"mean": (None, list), "overrides": dict}
    check_parameters(right, **allowed)
    with pytest.raises(ValueError, match=f"parameter {words}"):
        check_parameters(right | given, **allowed)


CHECK = "from ld3m.pipeline.notebook_parameters import check_parameters\ncheck_parameters(globals(), ipc=int, name=str)"
KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    "source, words",
    [
        (CHECK, "unknown parameter nam; this notebook has ipc, name"),
        (KILL, r"because memory ran out \(its largest process used 0\.\d GiB\)\. Lower in params\.yaml `processes`"),
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


@pytest.mark.parametrize("name, parameters", [("01_method", {"T": 3}), ("01_objectives", {"real_batch": 4})])
def test_what_a_notebook_writes_out_equals_the_library(name, parameters):
    run_notebook(ROOT / f"notebooks/{name}.ipynb", parameters)  # asserts it
