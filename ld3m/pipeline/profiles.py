"""params.yaml as frozen models: an unknown key, a missing key or a value out of range is an error that names it.

    python -m ld3m.pipeline.profiles apply profiles/smoke.yaml    # merge a profile into params.yaml, comments kept
    python -m ld3m.pipeline.profiles check                        # read params.yaml and say whether it is valid

`pipeline` and `reporting` are given a `Params`; the functions of every other package take explicit values.
"""

import copy
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent

from ld3m.pipeline.factories import check_factories
from ld3m.pipeline.params import Params
from ld3m.runtime.paths import ROOT

PARAMS = ROOT / "params.yaml"
PROFILES = ROOT / "profiles"
REPLACED = ("learning_rates", "settings", "cells", "controls", "recipe_overrides")  # a profile replaces these whole
EXTENDED = ("datasets", "networks", "objectives", "spaces", "distill")  # a profile may add to these


def load_params(overrides: dict[str, Any] | None = None, *, path: Path = PARAMS) -> Params:
    """Read and validate the parameters.

    Parameters
    ----------
    overrides : values of dotted keys, e.g. {"distill.momentum": 0.9}, which replace those of the file

    Raises
    ------
    ValueError
        with one line for every wrong key.
    """
    return _overridden(_read(path), overrides or {}, origin=path.name)


def _overridden(values: dict[str, Any], overrides: dict[str, Any], *, origin: str) -> Params:
    values = copy.deepcopy(values)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ValueError(f"override {key!r}: there is no such key in {origin}")
        node[last] = value
    return validate(values, origin=origin)


def ablation_settings(
    ablation: str, overrides: dict[str, Any] | None = None, *, path: Path = PARAMS
) -> dict[str, tuple[Params, str, str]]:
    """Return {setting: (its parameters, objective, space)} of the settings that an ablation measures: those that
    change something, and the baseline if it is the first of all."""
    values = _read(path)
    params = _overridden(values, overrides or {}, origin=path.name)
    given = params.ablations
    if ablation not in given.settings:
        raise ValueError(
            f"there is no ablation {ablation!r} in ablations.settings; there are {', '.join(given.settings)}"
        )
    settings = {}
    for name, changes in given.settings[ablation].items():
        if changes or (ablation, name) == given.baseline:
            keys = dict(changes)
            objective, space = keys.pop("objective", "dm"), keys.pop("space", "ld3m")
            shared = {
                "processes": 1,
                "cluster": None,
                "architectures": given.architecture,
                "evaluate.seeds": given.seeds,
                f"distill.{objective}.{space}.iterations": given.iterations,
            }
            try:
                changed = _overridden(values, (overrides or {}) | shared | keys, origin=path.name)
            except ValueError as error:
                raise ValueError(f"ablations.settings.{ablation}.{name}: {error}") from None
            settings[name] = changed, objective, space
    return settings


def validate(values: Any, *, origin: str) -> Params:
    """Plain values as Params, or a ValueError with one line for every wrong key."""
    try:
        params = Params.model_validate(values)
        check_factories(params)
        return params
    except ValidationError as error:
        lines = [f"{origin} is not valid:"]
        for problem in error.errors(include_url=False):
            if problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]:
                continue  # too short without its wrong entries, which have lines of their own
            key = ".".join(str(part) for part in problem["loc"] if part not in ("[key]", "own", "built-in"))
            message = problem["msg"].removeprefix("Value error, ")
            wrong = "unknown key, see the committed params.yaml" if problem["type"] == "extra_forbidden" else message
            got = (
                ""
                if problem["type"] == "missing" or isinstance(problem["input"], dict)
                else f" (got {problem['input']!r})"
            )
            lines.append(f"  {key or '(whole)'}: {wrong}{got}")
        raise ValueError("\n".join(lines)) from None


def apply_profile(profile: Path, *, path: Path = PARAMS) -> None:
    """Merges a profile, a file or the name of one in profiles/, into params.yaml, which keeps its comments.

    Refused whole where the result is not valid.
    """
    _read(path)  # refuses what is missing or not YAML
    named = PROFILES / f"{profile}.yaml"
    if not profile.is_file() and not named.is_file():
        known = ", ".join(f"profiles/{file.name}" for file in sorted(PROFILES.glob("*.yaml")))
        raise FileNotFoundError(f"{profile} is missing; the repository has {known}")
    profile = profile if profile.is_file() else named
    yaml = YAML()
    yaml.width = 4096  # or it would break long lines
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    values = yaml.load(path.read_text())
    _merge(values, _overlay(profile), origin=profile.name, under="")
    validate(values, origin=f"{path.name} with {profile.name}")
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        yaml.dump(values, file)
    partial.replace(path)


def _overlay(profile: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a profile, merged into those of the profile that its key `over` names."""
    overlay = _read(profile)
    if not (base := overlay.pop("over", None)):
        return overlay
    below = profile.parent / str(base)
    if below in (profile, *above):
        raise ValueError(f"{profile.name}: over = {base!r} leads back to the profile itself")
    return _combined(_overlay(below, (*above, profile)), overlay)


def _combined(below: dict[str, Any], above: dict[str, Any], under: str = "") -> dict[str, Any]:
    merged = {
        key: _combined(below[key], value, f"{under}.{key}".lstrip("."))
        for key, value in above.items()
        if _merges(below.get(key), value, key, under)
    }
    return below | above | merged


def _merges(below: Any, above: Any, key: str, under: str) -> bool:
    """Whether a profile's value is merged into the one below, and does not replace it whole."""
    return isinstance(below, dict) and isinstance(above, dict) and (key not in REPLACED or under == "evaluate.recipe")


def _merge(values: Any, overlay: dict[str, Any], *, origin: str, under: str) -> None:
    for key, value in overlay.items():
        if key not in values and under not in EXTENDED and not under.startswith(("distill.", "evaluate.recipe.")):
            raise ValueError(f"{origin}: unknown key {f'{under}.{key}'.lstrip('.')}")
        if _merges(values.get(key), value, key, under):
            _merge(values[key], value, origin=origin, under=f"{under}.{key}".lstrip("."))
        elif key not in values or values[key] != value:  # what is equal keeps its comments
            values[key] = value


def _read(path: Path) -> Any:
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
    try:
        match sys.argv[1:]:
            case ["apply", profile]:
                apply_profile(Path(profile))
                print(f"params.yaml now has the values of {profile}; next: python -m ld3m.pipeline.check")
            case ["check"]:
                load_params()
                print("params.yaml is valid")
            case _:
                sys.exit(__doc__)
    except (ValueError, FileNotFoundError) as problem:
        sys.exit(str(problem))
