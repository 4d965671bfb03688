"""What the result of every notebook depends on of this package, in one file a notebook, for the stages of dvc.yaml.

    python -m ld3m.code      writes runs/code/<notebook>.txt: the sha256 of every module that the notebook uses

An edit of a table changes the files of the notebooks that write tables, and distils nothing again.
"""

import ast
import hashlib
import json
from pathlib import Path

from ld3m import paths

PACKAGE = Path(__file__).parent
# cost and progress only print, memory names what to lower, and paths are those of dvc.yaml.
UNTRACKED = {"cost", "progress", "memory", "paths"}
# They turn params.yaml into arguments, and what else they import they only check. The priors get plain values: a new
# parameter shall not train them again.
PARAMETERS = {"config", "schema"}
PRIORS = {"00_prior", "00_gan"}
# Executed notebooks show figures and tables, but only these two write them.
PRESENTATION = {"figures", "tables"}
WRITERS = {"05_tables", "06_report"}


def used(notebook: str) -> list[Path]:
    """The files of this package that the result of a notebook depends on: modules, and templates of the same names."""
    cells = json.loads((paths.ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    ignored = UNTRACKED.copy()
    if notebook not in WRITERS:
        ignored |= PRESENTATION
    if notebook in PRIORS:
        ignored |= PARAMETERS
    found, waiting = set(), _imported(source) - ignored
    while waiting:
        found.add(module := waiting.pop())
        imports = _imported((PACKAGE / f"{module}.py").read_text()) - ignored - found
        waiting |= imports & PARAMETERS if module in PARAMETERS else imports
    return sorted(file for module in found for file in PACKAGE.glob(f"{module}.*"))


def write() -> None:
    """Writes the file of every numbered notebook."""
    for notebook in sorted(paths.ROOT.glob("notebooks/0*.ipynb")):
        lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in used(notebook.stem)]
        target = paths.code_file(notebook.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(lines))


def _imported(source: str) -> set[str]:
    """The modules of this package that some source imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "ld3m":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ld3m."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ld3m.")}
    return names


if __name__ == "__main__":
    write()
