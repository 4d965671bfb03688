import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from ld3m.pipeline.profiles import ablation_settings, apply_profile, load_params, validate
from ld3m.runtime import paths

COMMITTED = YAML(typ="safe").load(paths.PARAMS.read_text())
PARAMS = load_params()
# mappings whose keys the user names
FREE = ("datasets", "networks", "epochs", "learning_rates", "cells", "controls", "changes", "ipc_10", "full_data")


def mappings(node, at=""):
    """The dotted keys of every mapping, "" for the file itself."""
    yield at
    for key, value in node.items():
        if isinstance(value, dict):
            yield from mappings(value, f"{at}.{key}".lstrip("."))


def at(values, key):
    for part in filter(None, key.split(".")):
        values = values[part]
    return values


def is_free(key):
    return key.split(".")[-1] in FREE or key.startswith("ablations.settings")


def load(values):
    return validate(values, origin="params.yaml")


@pytest.fixture
def values():
    return copy.deepcopy(COMMITTED)


@pytest.fixture
def params_file(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_bytes(paths.PARAMS.read_bytes())
    return file


@pytest.fixture
def profile(tmp_path):
    def write(text):
        file = tmp_path / "profile.yaml"
        file.write_text(text)
        return file

    return write


OPTIONAL = {"networks": {"depth", "norms"}, "more.cells": {"iterations"}}  # what their entries may leave out


def test_the_params_file_holds_exactly_the_values_that_are_read():
    assert PARAMS.model_dump(mode="json", exclude_unset=True) == COMMITTED


@pytest.mark.parametrize("key", [key for key in mappings(COMMITTED) if not key.startswith("ablations.settings.")])
def test_an_unknown_key_is_refused_at_every_level(values, key):
    at(values, key)["typo"] = 12345
    with pytest.raises(ValueError) as refused:
        load(values)
    message = str(refused.value)
    assert message.startswith("params.yaml is not valid") and key in message and "typo" in message
    assert is_free(key) or f"{key}.typo".lstrip(".") in message and "12345" in message


def test_a_wrong_entry_is_not_called_a_missing_one_too():
    with pytest.raises(ValueError) as refused:
        load_params({"grid.ipc": [0]})
    assert str(refused.value).splitlines()[1:] == ["  grid.ipc.0: Input should be greater than or equal to 1 (got 0)"]


@pytest.mark.parametrize("key", [key for key in mappings(COMMITTED) if not is_free(key)])
def test_a_missing_key_is_refused_at_every_level(values, key):
    for name in at(values, key):
        if name in OPTIONAL.get(key.rpartition(".")[0], ()):
            continue
        lacking = copy.deepcopy(values)
        del at(lacking, key)[name]
        with pytest.raises(ValueError) as refused:
            load(lacking)
        message = str(refused.value)
        assert "params.yaml" in message and f"{key}.{name}".lstrip(".") + ": Field required" in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", -1),
        ("seed", 0.5),
        ("seed", "zero"),
        ("paper", 1),
        ("processes", 0),
        ("cluster", ""),
        ("dataset", 3),
        ("grid.objective", []),
        ("grid.objective", ["dd"]),
        ("grid.space", ["latent"]),
        ("grid.ipc", [0]),
        ("grid.ipc", 1),
        ("grid.control", ["noise"]),
        ("grid.architecture", ["resnet50"]),
        (f"datasets.{PARAMS.dataset}.channels", 2),
        (f"datasets.{PARAMS.dataset}.size_px", 0),
        (f"datasets.{PARAMS.dataset}.splits.validation", 1.5),
        (f"datasets.{PARAMS.dataset}.augmentation", "crop_shear"),
        (f"datasets.{PARAMS.dataset}.normalization", 0.5),
        ("prior.autoencoder.widths", [8]),
        ("prior.denoiser.null_share", 1.0),
        ("prior.check.learning_rate", 0),
        ("gan.widths", [8]),
        ("gan.batch", 6),
        ("gan.ema_decay", 1.0),
        ("gan.augmentation", "crop_shear"),
        ("gan.check.width", 0),
        ("networks.convnet.width", 0),
        ("trajectories.learning_rate", -0.01),
        ("objectives.dc.real_batch", None),
        ("objectives.mtt.first_order", "maybe"),
        ("spaces.pixel.start", "zero"),
        ("spaces.glad.layer", -1),
        ("spaces.glad.mean_w", 3),
        ("spaces.ld3m.learn", "c"),
        ("spaces.ld3m.skip", "eq7"),
        ("spaces.ld3m.steps", 1001),
        ("distill.network", "lenet"),
        ("distill.momentum", 1.0),
        ("checkpoint_minutes", -1),
        ("distill.dm.pixel.iterations", "many"),
        ("distill.dm.pixel.learning_rates.images", float("nan")),
        ("evaluate.seeds", 1),
        ("evaluate.recipe.weight_decay", -1e-4),
        ("evaluate.recipe.ema_decay", 1),
        ("evaluate.recipe.clip_norm", 0),
        ("gradient_norms.steps", []),
    ],
)
def test_a_wrong_type_or_value_is_refused(key, value):
    with pytest.raises(ValueError) as refused:
        load_params({key: value})
    message = str(refused.value)
    wrong = value[0] if isinstance(value, list) and value else value
    assert "params.yaml" in message and key in message and repr(wrong) in message


def test_a_standard_deviation_is_positive():
    key = f"datasets.{PARAMS.dataset}.normalization"
    assert load_params({key: {"mean": [0.5], "std": [0.25]}}).data.normalization.std == (0.25,)
    with pytest.raises(ValueError, match=rf"{key}\.std\.0: .*got 0\.0"):
        load_params({key: {"mean": [0.5], "std": [0.0]}})


def test_every_wrong_key_is_named_at_once(values):
    values["seed"], values["grid"]["typo"] = -1, 0
    with pytest.raises(ValueError, match=r"(?s)seed: .*got -1.*grid\.typo: unknown key"):
        load(values)


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"dataset": "mnist6k"}, ["dataset", "'mnist6k'", PARAMS.dataset]),
        ({"trajectories.epochs": 1, "objectives.mtt.expert_epochs": 2}, ["trajectories.epochs = 1", "epoch"]),
        ({"distill.dm.pixel.learning_rates": {"z": 1.0}}, ["distill.dm.pixel.learning_rates has z;", "images"]),
        ({"distill.mtt.pixel.learning_rates": {"images": 1.0}}, ["distill.mtt.pixel.learning_rates", "student_lr"]),
        ({"distill.dm.glad.learning_rates": {"w": 1.0}}, ["distill.dm.glad.learning_rates has w;", "f, w"]),
        ({"spaces.glad.layer": 8}, ["spaces.glad.layer = 8: must be below 8", "gan.widths"]),
        ({"gan.widths": [8, 8, 8]}, ["gan.widths has 3 entries", "16 px", "size_px = 32"]),
        ({"gan.discriminator_widths": [8, 8]}, ["gan.discriminator_widths has 2 entries; needed are 3"]),
        ({"grid.space": ["pixel", "glad"]}, ["grid.space has glad: put its cells in more.cells"]),
        (
            {"more.cells": {"dm-ld3m-1": {"objective": "dm", "space": "ld3m", "ipc": 2, "runs": 1}}},
            ["more.cells.dm-ld3m-1 is the entry of dm-ld3m-2: name it so"],
        ),
        (
            {"more.controls": {"herding": {"control": "herding", "ipc": 1, "runs": 1}}},
            ["more.controls.herding is the entry of none-herding-1"],
        ),
        ({"evaluate.changes": {"ipc_5": {"epochs": {"vit": 3}}}}, ["evaluate.changes.ipc_5.epochs.", "is missing"]),
        ({"distill.dc.ld3m.learning_rates": {"c": 1.0}}, ["distill.dc.ld3m.learning_rates has c;"]),
        (
            {"spaces.ld3m.learn": "z_T", "distill.dc.ld3m.learning_rates": {"z": 1.0, "c": 1.0}},
            ["distill.dc.ld3m.learning_rates has c, z;", "c, z_T"],
        ),
        (
            {
                "spaces.ld3m.learn": "auto",
                "spaces.ld3m.skip": "mean",
                "distill.dc.ld3m.learning_rates": {"z": 1.0, "c": 1.0},
            },
            ["distill.dc.ld3m.learning_rates has c, z;", "c, z_T"],
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(overrides, named):
    with pytest.raises(ValueError) as refused:
        load_params(overrides)
    assert all(part in str(refused.value) for part in ["params.yaml", *named])


@pytest.mark.parametrize("changes", [{"gan.widths": [8, 8, 8]}, {"gan.discriminator_widths": [8, 8]}])
def test_without_glad_the_gan_need_not_fit(changes):
    assert load_params({"more.cells": {}} | changes).more.cells == {}


def test_runs_of_a_cell_are_the_grids_first_and_those_of_more():
    params = load_params({"grid.ipc": [1], "grid.space": ["pixel", "ld3m"], "grid.objective": ["dm", "mtt"]})
    assert params.runs("dm", "ld3m", 1, more=False) == range(1)
    added = params.more.cells["dm-ld3m-1"].runs
    assert params.runs("dm", "ld3m", 1, more=True) == range(1, added)
    assert params.runs("dm", "glad", 1, more=True) == range(added)
    assert params.runs("dc", "glad", 1, more=True) == range(params.more.cells["dc-glad-1"].runs)  # this grid has no dc
    assert len(params.runs("dm", "ld3m", 3, more=True)) == 0
    wider = load_params({"grid.ipc": [1, 10]})
    assert wider.runs("dm", "ld3m", 10, more=True) == range(1, 2)  # one more at least
    assert params.place("dm", "ld3m", 1, 0) == params.dataset != params.place("dm", "ld3m", 1, 1)
    assert params.place("dm", "glad", 1, 0) == f"{params.dataset}/more"
    assert params.place("none", "full_data", 0, 0) == params.dataset


def test_a_recipe_is_that_of_its_images_per_class():
    changes = {"ipc_10": {"epochs": {name: 7 for name in PARAMS.networks}, "ema_decay": None}}
    params = load_params({"evaluate.changes": changes})
    one, ten = params.recipe("vit", 1), params.recipe("vit", 10)
    assert ten == one | {"epochs": 7, "ema_decay": None} and one["epochs"] != 7 and one["ema_decay"] is not None
    assert params.recipe("vit", 0) == one and one["strategy"] == params.data.augmentation


def test_the_epochs_are_those_that_matching_reads():
    needed = PARAMS.objectives.mtt.max_start_epoch - 1 + PARAMS.objectives.mtt.expert_epochs
    assert load_params({"trajectories.epochs": needed}).trajectories.epochs == needed
    for other in (needed - 1, needed + 1):  # a snapshot too few, or one that nothing reads
        with pytest.raises(ValueError, match=f"trajectories.epochs = {other}: must be {needed}"):
            load_params({"trajectories.epochs": other})


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"grid.objective": ["dc", "dc"]}, "grid.objective: has an entry twice"),
        ({"grid.ipc": [1, 1]}, "grid.ipc: has an entry twice"),
        ({"datasets.mnist5k.size_px": 36}, "datasets.mnist5k.size_px = 36: must be a multiple of 8"),
        ({"prior.check.steps": 1000}, "prior.check.steps"),
        ({"gradient_norms.steps": [5, 1000]}, "gradient_norms.steps"),
        ({"prior.denoiser.widths": [48, 90]}, "multiples of 16"),
        ({"prior.autoencoder.widths": [24, 50, 64]}, "multiples of 8"),
        ({"prior.autoencoder.continuous_steps": 600}, "continuous_steps must be below"),
        ({"prior.classes": [0, 1]}, "prior.classes are those of prior.source"),
    ],
)
def test_what_would_fail_after_long_work_is_refused_before_it(overrides, words):
    with pytest.raises(ValueError, match=words):
        load_params(overrides)


@pytest.mark.parametrize("where", ["networks", "evaluate.recipe.learning_rates"])
def test_an_architecture_needs_its_size_and_its_rate(values, where):
    del at(values, where)[PARAMS.distill.network]
    with pytest.raises(ValueError, match=f"{where}.{PARAMS.distill.network} is missing"):
        load(values)


def test_numbers_as_dvc_writes_them_are_floats(params_file):
    yaml = YAML()  # what `dvc exp run -S` reads and writes with
    values = yaml.load(params_file)
    values["trajectories"]["learning_rate"] = 3e-05
    yaml.dump(values, params_file)
    assert "learning_rate: 3e-05\n" in params_file.read_text()
    assert load_params(path=params_file).trajectories.learning_rate == 3e-5
    params_file.write_text(params_file.read_text().replace("3e-05", "3e-5"))
    assert load_params(path=params_file).trajectories.learning_rate == 3e-5


def test_overrides_replace_values_and_nothing_else():
    changed = load_params({"distill.momentum": 0.25, "grid.ipc": [1, 7]})
    assert changed.distill.momentum == 0.25 and changed.grid.ipc == (1, 7)
    grid = PARAMS.grid.model_copy(update={"ipc": (1, 7)})
    distill = PARAMS.distill.model_copy(update={"momentum": 0.25})
    assert changed == PARAMS.model_copy(update={"grid": grid, "distill": distill})


@pytest.mark.parametrize("key", ["", "typo", "distill.typo", "typo.momentum", "distill.momentum.typo", "grid.ipc.0"])
def test_an_unknown_override_is_refused(key):
    with pytest.raises(ValueError, match=rf"override '{key}'.*params\.yaml"):
        load_params({key: 1})


def test_parameters_are_frozen():
    with pytest.raises(ValidationError):
        PARAMS.seed = 1
    with pytest.raises(ValidationError):
        PARAMS.distill.dm.pixel.iterations = 1


@pytest.mark.parametrize("text", ["seed: [", "seed: 1\nseed: 2\n", "- seed\n", "42\n", ""])
@pytest.mark.parametrize("content", ["params", "profile"])
def test_a_file_that_is_not_a_yaml_mapping_is_refused(params_file, profile, text, content):
    if content == "params":
        params_file.write_text(text)
        with pytest.raises(ValueError, match=r"params\.yaml"):
            load_params(path=params_file)
        overlay, wrong = profile("seed: 1\n"), "params.yaml"
    else:
        overlay, wrong = profile(text), "profile.yaml"
    before = params_file.read_bytes()
    with pytest.raises(ValueError, match=wrong):
        apply_profile(overlay, path=params_file)
    assert params_file.read_bytes() == before


def test_a_missing_file_is_named(tmp_path, params_file, profile):
    with pytest.raises(FileNotFoundError, match="absent.yaml is missing"):
        load_params(path=tmp_path / "absent.yaml")
    with pytest.raises(FileNotFoundError, match="absent.yaml is missing"):
        apply_profile(tmp_path / "absent.yaml", path=params_file)
    with pytest.raises(FileNotFoundError, match="absent.yaml is missing"):
        apply_profile(profile("seed: 1\n"), path=tmp_path / "absent.yaml")


def test_a_profile_changes_its_values_and_keeps_every_other_line(params_file, profile):
    before = params_file.read_text()
    apply_profile(profile("distill: {dm: {pixel: {iterations: 7}}}\nseed: 5\n"), path=params_file)
    after = params_file.read_text()
    expected = load_params({"distill.dm.pixel.iterations": 7, "seed": 5})
    assert load_params(path=params_file) == expected
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert len(changed) == 2, changed
    comments = [[line.partition("#")[2] for line in text.splitlines() if "#" in line] for text in (before, after)]
    assert comments[0] == comments[1]
    assert sorted(file.name for file in params_file.parent.iterdir()) == ["params.yaml", "profile.yaml"]


def test_a_profile_lies_over_the_one_it_names(params_file, profile):
    base = profile("seed: 5\nprocesses: 1\n")
    base.rename(base.with_name("base.yaml"))
    apply_profile(profile("over: base.yaml\nseed: 6\n"), path=params_file)
    assert load_params(path=params_file) == load_params({"seed": 6, "processes": 1})
    before = params_file.read_bytes()
    with pytest.raises(FileNotFoundError, match="absent.yaml is missing"):
        apply_profile(profile("over: absent.yaml\nseed: 7\n"), path=params_file)
    with pytest.raises(ValueError, match="profile.yaml: over = 'profile.yaml' leads back"):
        apply_profile(profile("over: profile.yaml\nseed: 7\n"), path=params_file)
    assert params_file.read_bytes() == before


def test_a_profile_of_the_repository_is_applied_by_its_name(params_file):
    apply_profile(Path("smoke"), path=params_file)
    assert load_params(path=params_file).processes == 1


def test_a_profile_adds_a_data_set(params_file, profile):
    changes = {"datasets": {"other": COMMITTED["datasets"][PARAMS.dataset]}, "dataset": "other"}
    apply_profile(profile(json.dumps(changes)), path=params_file)
    params = load_params(path=params_file)
    assert params.dataset == "other" and params.data == PARAMS.data
    assert set(params.datasets) == {*PARAMS.datasets, "other"}


def test_a_profile_can_change_what_is_learned(params_file, profile):
    skip, latent = ("mean", "z_T") if PARAMS.spaces.ld3m.skip == "x0" else ("x0", "z")
    rates = {latent: 2.0, "c": 3.0}
    distill = {name: {"ld3m": {"learning_rates": rates}} for name in ("dc", "dm")}
    distill["mtt"] = {"ld3m": {"learning_rates": rates | {"student_lr": 0.5}}}
    changes = {"spaces": {"ld3m": {"learn": "auto", "skip": skip}}, "distill": distill}
    apply_profile(profile(json.dumps(changes)), path=params_file)  # JSON is YAML
    assert load_params(path=params_file).distill.dm.ld3m.learning_rates == rates


@pytest.mark.parametrize(
    "text, named",
    [
        ("typo: 1\n", "profile.yaml.*typo"),
        ("distill: {dm: {pixel: {typo: 1}}}\n", "profile.yaml.*distill.dm.pixel.typo"),
        ("seed: 3\ngrid: {typo: 1}\n", "grid.typo"),
        ("seed: 3\nprocesses: 0\n", "(?s)profile.yaml.*processes.*got 0"),
        ("seed: 3\ndataset: absent\n", "(?s)profile.yaml.*'absent'"),
        ("distill: 3\n", "(?s)profile.yaml.*distill.*got 3"),
    ],
)
def test_a_refused_profile_leaves_the_file_as_it_was(params_file, profile, text, named):
    before = params_file.read_bytes()
    with pytest.raises(ValueError, match=named):
        apply_profile(profile(text), path=params_file)
    assert params_file.read_bytes() == before
    assert sorted(file.name for file in params_file.parent.iterdir()) == ["params.yaml", "profile.yaml"]


@pytest.mark.parametrize("file", sorted(paths.PROFILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_profile_applies_and_applying_it_again_changes_nothing(params_file, file):
    apply_profile(file, path=params_file)
    load_params(path=params_file)
    once = params_file.read_bytes()
    apply_profile(file, path=params_file)
    assert params_file.read_bytes() == once


def command(monkeypatch, params_file, *arguments):
    monkeypatch.setattr(paths, "PARAMS", params_file)
    monkeypatch.setattr(sys, "argv", ["ld3m.pipeline.profiles", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "ld3m.pipeline.profiles", raising=False)  # else runpy warns
    runpy.run_module("ld3m.pipeline.profiles", run_name="__main__")


def test_the_command_checks_and_applies(monkeypatch, params_file, profile, capsys):
    command(monkeypatch, params_file, "apply", profile("seed: 5\n"))
    command(monkeypatch, params_file, "check")
    assert "params.yaml is valid" in capsys.readouterr().out
    assert load_params(path=params_file).seed == 5


@pytest.mark.parametrize("arguments, message", [((), "apply profiles/"), (("check",), "seed")])
def test_the_command_fails_with_a_message_and_no_traceback(monkeypatch, params_file, arguments, message):
    params_file.write_text(params_file.read_text().replace("seed: ", "seed: -1", 1))
    with pytest.raises(SystemExit, match=message):
        command(monkeypatch, params_file, *arguments)


def test_a_cell_that_the_grid_lacks_may_have_iterations_of_its_own():
    entry = {"objective": "dm", "space": "ld3m", "ipc": 10, "runs": 1, "iterations": 7}
    params = load_params({"more.cells": {"dm-ld3m-10": entry}, "distill.dm.ld3m.iterations": 9})
    assert [params.budget("dm", space, ipc).iterations for space, ipc in (("ld3m", 10), ("ld3m", 1))] == [7, 9]
    for others in ({"more.cells": {"dm-ld3m-10": entry | {"iterations": None}}}, {"grid.ipc": [1, 10]}):
        params = load_params({"more.cells": {"dm-ld3m-10": entry}, "distill.dm.ld3m.iterations": 9} | others)
        assert params.budget("dm", "ld3m", 10).iterations == 9


@pytest.mark.parametrize("ablation", PARAMS.ablations.settings)
def test_every_committed_ablation_is_valid_and_has_a_setting_that_changes_something(ablation):
    settings = ablation_settings(ablation)
    assert settings and set(settings) <= set(PARAMS.ablations.settings[ablation])
    for name, (params, objective, space) in settings.items():
        assert params.evaluate.seeds == PARAMS.ablations.seeds and params.processes == 1
        assert params.budget(objective, space).iterations in (PARAMS.ablations.iterations, 150)
        first, baseline = PARAMS.ablations.baseline
        is_baseline = (params, objective, space) == ablation_settings(first)[baseline]
        assert is_baseline == ((ablation, name) == (first, baseline)), name


def test_the_settings_of_an_ablation():
    settings = ablation_settings("steps", {"seed": 3})
    assert {name: params.spaces.ld3m.steps for name, (params, _, _) in settings.items()} == {
        "T = 2": 2, "T = 5": 5, "T = 10": 10, "T = 20": 20,
    }  # fmt: skip
    assert PARAMS.ablations.baseline == ("steps", "T = 5") and "x0, Z" not in ablation_settings("skip_learn")
    assert all(
        params.seed == 3 and cell == ("dm", "ld3m") for params, *cell in settings.values() for cell in [tuple(cell)]
    )
    assert ablation_settings("defects")["first-order MTT"][1] == "mtt"


def test_an_ablation_that_cannot_be_is_refused_by_name(params_file):
    with pytest.raises(ValueError, match="no ablation 'typo'.*there are steps, skip_learn"):
        ablation_settings("typo")
    params_file.write_text(
        params_file.read_text().replace("T = 2: {spaces.ld3m.steps: 2}", "T = 2: {spaces.ld3m.step: 2}")
    )
    with pytest.raises(ValueError, match="ablations.settings.steps.T = 2: override 'spaces.ld3m.step'"):
        ablation_settings("steps", path=params_file)
