"""One list of dependencies, exact pins, a store that a clone can carry, and docstrings that fit their functions."""

import ast
import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from ld3m.runtime.paths import ROOT

LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
PINS = dict(line.split("==") for line in LINES)


def test_every_dependency_is_pinned_to_a_version_it_admits():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = (
        project["dependencies"] + project["optional-dependencies"]["test"] + project["optional-dependencies"]["data"]
    )
    versions = {canonicalize_name(name): version for name, version in PINS.items()}
    for requirement in map(Requirement, asked):
        if requirement.name != "ld3m":
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), str(requirement)


def test_torch_has_its_pin_and_nothing_needs_torchvision():
    assert PINS["torch"] == "2.13.0" and "torchvision" not in PINS
    sources = [file for place in ("ld3m", "benchmarks", "notebooks") for file in (ROOT / place).iterdir()]
    assert not [file for file in sources if file.is_file() and re.search(r"import torchvision", file.read_text())]


def test_conda_takes_the_same_lock():
    (pip,) = [part for part in YAML().load((ROOT / "environment.yml").read_text())["dependencies"] if "pip" in part][1:]
    assert pip["pip"] == ["-r requirements.lock", "-e ."]


def test_the_store_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "store").rglob("*") if file.is_file()) <= 15e6


def test_every_parameter_that_a_docstring_explains_is_in_the_signature():
    explained = 0
    for file in (ROOT / "ld3m").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                _, *parts = re.split(r"^(\w+)\n-+\n", ast.get_docstring(node) or "", flags=re.M)
                text = dict(zip(parts[::2], parts[1::2], strict=True)).get("Parameters", "")
                names = {name.lstrip("*") for line in re.findall(r"^\S.*", text, re.M) for name in line.split(", ")}
                function = node
                if names and isinstance(node, ast.ClassDef):
                    (function,) = [part for part in node.body if getattr(part, "name", "") == "__init__"]
                given = {part.arg for part in ast.walk(function) if isinstance(part, ast.arg)}
                assert names <= given, f"{file.name}, {node.name}: no parameter {', '.join(names - given)}"
                explained += len(names)
    assert explained
