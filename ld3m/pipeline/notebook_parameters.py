"""The parameters of a notebook, checked in the first cell after them."""

import math
from typing import Any

PLAIN = (str, bool, int, float, list, dict, type(None))
HINTS = {  # papermill makes values of another type of what it is given
    str: "; papermill turns what looks like a number into one, but not with -r",
    dict: "; papermill takes it as -y 'overrides: {seed: 1}'",
    list: "; papermill takes it as -y 'mean: [0.5, 0.5, 0.5]'",
}


def check_parameters(scope: dict[str, Any], **allowed: Any) -> None:
    """Check what papermill, or a user, has set in the first cell of a notebook.

    Parameters
    ----------
    scope
        The notebook's `globals()`.
    **allowed
        What each parameter may be: a type, a `range`, a value, or a tuple of these. `float` stands for every finite
        number, `list` for a list of these.

    Raises
    ------
    ValueError
        A parameter has another value, or there is one that the notebook has not. In a kernel that has run further cells
        names cannot be checked.
    """
    for name, kinds in allowed.items():
        value, kinds = scope[name], kinds if isinstance(kinds, tuple) else (kinds,)
        if not any(_is(value, kind) for kind in kinds):
            hint = "".join(text for kind, text in HINTS.items() if kind in kinds and type(value) is not kind)
            raise ValueError(f"parameter {name} = {value!r}: must be {' or '.join(map(_in_words, kinds))}{hint}")
    if len(scope.get("In", ())) <= 4:  # IPython's: an empty one, the parameters, those of papermill, this cell
        given = {name for name, value in scope.items() if type(value) in PLAIN and not name.startswith("_")}
        if unknown := sorted(given - {"In", "Out", *allowed}):
            raise ValueError(f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(allowed)}")


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is list:
        return type(value) is list and all(_is(entry, float) for entry in value)
    if isinstance(kind, range):
        return type(value) is int and value in kind
    return type(value) is kind if isinstance(kind, type) else type(value) is type(kind) and value == kind


def _in_words(kind: Any) -> str:
    if isinstance(kind, range):
        return f"a whole number from {kind.start} to {kind.stop - 1}"
    words = {float: "a finite number", list: "a list of numbers", str: "text", dict: "a dict"}
    return words.get(kind, repr(kind)) if isinstance(kind, type) else repr(kind)
