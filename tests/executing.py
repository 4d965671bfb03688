"""Notebooks executed in the process of a test."""

import json
from pathlib import Path
from typing import Any


def run_notebook(file: Path, parameters: dict[str, Any]) -> None:
    """Run the code of a notebook, with `parameters` set after the cell tagged "parameters"."""
    namespace = {"__name__": file.stem}
    for number, cell in enumerate(json.loads(file.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{file.name}, cell {number}", "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace.update(parameters)
