"""params.yaml as frozen models: an unknown key, a missing key or a value out of range is an error that names it.

    python -m ld3m.pipeline.profiles apply imagenet128 paper    # write params.yaml: the base and these profiles over it

`pipeline` and `reporting` are given a `Params`; the functions of other packages take explicit values.
"""

import copy
import hashlib
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent

from ld3m.pipeline.factories import check_factories
from ld3m.pipeline.params import Params
from ld3m.runtime.paths import ROOT
from ld3m.runtime.storage import write_bytes

PARAMS = ROOT / "params.yaml"
PROFILES = ROOT / "profiles"
ACTIVE = "# active profiles: "  # begins params.yaml
DIGEST = "# digest of what follows, by which `profiles apply` sees changes of yours: "  # the second line, with profiles
BASE = PROFILES / "base.yaml"  # the values of all keys, those of the committed params.yaml
REPLACED = ("learning_rates", "settings", "cells", "controls", "recipe_overrides")  # a profile replaces these whole
EXTENDED = ("datasets", "networks", "objectives", "spaces", "distill")  # a profile may add to these
WORDS = {  # in place of pydantic's, where these speak of Python
    "missing": "is missing",
    "extra_forbidden": "unknown key, see profiles/base.yaml",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "too_short": "must have {min_length} or more entries",
    "tuple_type": "must be a list",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a block of keys and values"),
}


def load_params(overrides: dict[str, Any] | None = None, *, path: Path = PARAMS) -> Params:
    """Read and validate the parameters.

    Parameters
    ----------
    overrides
        Values of dotted keys, such as {"distill.momentum": 0.9}, which replace those of the file.

    Raises
    ------
    ValueError
        With one line for every wrong key.
    """
    return _overridden(read_values(path), overrides or {}, origin=path.name)


def _overridden(values: dict[str, Any], overrides: dict[str, Any], *, origin: str) -> Params:
    values = copy.deepcopy(values)
    for key, value in overrides.items():
        *parents, last = str(key).split(".")
        node = values
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ValueError(f"override {key!r}: there is no such key in {origin}")
        node[last] = value
    return validate(values, origin=origin)


def ablation_settings(
    ablation: str, overrides: dict[str, Any] | None = None, *, path: Path = PARAMS
) -> dict[str, tuple[Params, str, str, int]]:
    """Read the settings that an ablation measures: those that change something, and the baseline if it comes first.

    Parameters
    ----------
    overrides
        Of `load_params`.

    Returns
    -------
    dict
        {setting: (its parameters, objective, space, images a class)}

    Raises
    ------
    ValueError
        Where there is no such ablation, or a setting, which is named, is not valid.
    """
    values, overrides = read_values(path), overrides or {}
    given = _overridden(values, overrides, origin=path.name).ablations
    if ablation not in given.settings:
        raise ValueError(
            f"there is no ablation {ablation!r} in ablations.settings; there are {', '.join(given.settings)}"
        )
    settings = {}
    for name, changes in given.settings[ablation].items():
        if changes or (ablation, name) == given.baseline:
            keys = dict(changes)
            objective, space, ipc = keys.pop("objective", "dm"), keys.pop("space", "ld3m"), keys.pop("ipc", 1)
            shared = {"processes": 1, "cluster": None, "architectures": given.architecture}
            if given.iterations and objective != "none":
                shared |= {f"distill.{objective}.{space}.iterations": given.iterations}
            try:
                changed = _overridden(values, overrides | shared | keys, origin=path.name)
            except ValueError as error:
                raise ValueError(f"ablations.settings.{ablation}.{name}: {error}") from None
            settings[name] = changed, objective, space, ipc
    return settings


def validate(values: Any, *, origin: str) -> Params:
    """Plain values as Params, or a ValueError with one line for every wrong key."""
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        found: dict[str, tuple[str, list[str]]] = {}
        for problem in error.errors(include_url=False):
            if problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]:
                continue  # too short without its wrong entries, which have lines of their own
            wrong = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            if words := WORDS.get(problem["type"]):
                wrong = words.format(**problem.get("ctx", {}))
            got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
            found.setdefault(_key(problem, values), (got, []))[1].append(wrong)
        lines = [f"{key}: {' or '.join(wrong)}{got}".removeprefix(": ") for key, (got, wrong) in found.items()]
        raise ValueError("\n  ".join((f"{origin} is not valid:", *lines))) from None
    check_factories(params)
    return params


def _key(problem: Any, values: Any) -> str:
    """The dotted key of a problem, without the parts by which pydantic tells the kinds of a value apart."""
    parts = []
    for part in problem["loc"]:
        if isinstance(values, list) and isinstance(part, int) or isinstance(values, dict) and part in values:
            values = values[part]
            parts.append(part)
    return ".".join(map(str, [*parts, problem["loc"][-1]] if problem["type"] == "missing" else parts))


def apply_profiles(*profiles: str | Path, path: Path = PARAMS) -> Path | None:
    """Write params.yaml: profiles/base.yaml with some profiles laid over it, one after another.

    The first line names the profiles, the second has the digest that tells whether a user has changed what follows. DVC
    writes in the same style, so that `dvc exp run -S` changes its value alone.

    Parameters
    ----------
    *profiles
        Files, or names of files in profiles/. A profile's key `over` names one to lay below it.

    Returns
    -------
    Path or None
        Where the former params.yaml is kept, if it held changes of the user's own: params.yaml.before-<number>.

    Raises
    ------
    FileNotFoundError, ValueError
        A profile is missing, is not YAML, has an unknown key, or the result is not valid: nothing is written.
    """
    content, kept = _content(profiles, name=path.name), None
    if path.exists() and not _is_written_by_profiles(path):
        names = (path.with_name(f"{path.name}.before-{number}") for number in itertools.count(1))
        kept = next(file for file in names if not file.exists())
        write_bytes(kept, path.read_bytes())
    write_bytes(path, content)
    return kept


def _content(profiles: Sequence[str | Path], *, name: str) -> bytes:
    yaml = YAML()
    yaml.default_flow_style = False
    values = yaml.load(BASE.read_text())
    for profile in profiles:
        for file, overlay in _layers(profile, PROFILES):
            _merge(values, overlay, origin=file.name, under="")
    names = " ".join(map(str, profiles)) or "none"
    validate(values, origin=f"{name} with the profiles {names}")
    written = io.StringIO()
    yaml.dump(values, written)
    _, second, lines = written.getvalue().split("\n", 2)
    return f"{ACTIVE}{names}\n{_digest_line(lines.encode()) if profiles else second}\n{lines}".encode()


def _digest_line(lines: bytes) -> str:
    return f"{DIGEST}{hashlib.sha256(lines).hexdigest()[:16]}"


def _is_written_by_profiles(path: Path) -> bool:
    content = path.read_bytes()
    _, second, lines = (content + b"\n\n").split(b"\n", 2)
    return content == BASE.read_bytes() or second == _digest_line(lines[:-2]).encode()


def _layers(profile: str | Path, folder: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the file and the values of the profiles that a profile is `over`, then its own."""
    places = (Path(profile), folder / profile, PROFILES / profile, PROFILES / f"{profile}.yaml")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = ", ".join(file.stem for file in sorted(PROFILES.glob("*.yaml")) if file != BASE)
        raise FileNotFoundError(f"there is no profile {profile}; profiles/ has {known}")
    if file in above:
        raise ValueError(f"{above[-1].name}: over = {profile} leads back to {file.name}")
    overlay = read_values(file)
    if base := overlay.pop("over", None):
        yield from _layers(str(base), file.parent, (*above, file))
    yield file, overlay


def _merge(values: Any, overlay: dict[str, Any], *, origin: str, under: str) -> None:
    for key, value in overlay.items():
        at, below = f"{under}.{key}".lstrip("."), values.get(key)
        if key not in values and under not in EXTENDED and not under.startswith(("distill.", "evaluate.recipe.")):
            raise ValueError(f"{origin}: unknown key {at}")
        replaces = key in REPLACED and under != "evaluate.recipe"
        if isinstance(below, dict) and isinstance(value, dict) and not replaces:
            _merge(below, value, origin=origin, under=at)
        elif key not in values or below != value:  # what is equal keeps its comments
            values[key] = value


def read_values(path: Path) -> dict[str, Any]:
    """Read params.yaml or a profile as plain values; FileNotFoundError or ValueError says what is wrong with it."""
    try:
        text = Path(path).read_text()
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe").parse(text)):
            raise ValueError("aliases are not allowed: a few lines of them can stand for more values than memory holds")
        values = YAML(typ="safe").load(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; `git checkout {Path(path).name}` restores it") from None
    except OSError:
        raise
    except Exception as error:  # ruamel raises many kinds: for a date that does not exist, for what is nested too deep
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values")
    return values


if __name__ == "__main__":
    if sys.argv[1:2] != ["apply"]:
        sys.exit("usage: python -m ld3m.pipeline.profiles apply [PROFILE ...]")
    try:
        kept = apply_profiles(*sys.argv[2:])
    except (ValueError, FileNotFoundError) as problem:
        sys.exit(str(problem))
    print(f"params.yaml has the values of {' and '.join(['profiles/base.yaml', *sys.argv[2:]])}")
    if kept:
        print(f"it had changes of your own: the former file is {kept.name}")
    print("next: python -m ld3m.pipeline.check")
