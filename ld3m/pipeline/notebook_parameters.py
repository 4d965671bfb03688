"""The parameters of a notebook, checked in the first line after them."""

from typing import Any

PLAIN = (str, int, float, list, dict, type(None))


def check_parameters(scope: dict[str, Any], **types: type | tuple[type, ...]) -> None:
    """Check what papermill, or a user, has set in the first cell of a notebook.

    Parameters
    ----------
    scope : the notebook's `globals()`
    types : the parameters by name, and what each may be

    Raises
    ------
    ValueError
        A parameter has another type, or there is one that the notebook has not. In a kernel that has run further cells
        names cannot be checked.
    """
    for name, allowed in types.items():
        value, kinds = scope[name], allowed if isinstance(allowed, tuple) else (allowed,)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            text = ": papermill turns what looks like a number into one, but not with -r" if str in kinds else ""
            raise ValueError(f"parameter {name} = {value!r} is {type(value).__name__}, must be {wanted}{text}")
    if len(scope.get("In", ())) <= 4:  # IPython's: an empty one, the parameters, those of papermill, this cell
        given = {name for name, value in scope.items() if type(value) in PLAIN and not name.startswith("_")}
        if unknown := sorted(given - {"In", "Out", *types}):
            raise ValueError(f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(types)}")
