"""params.yaml and the profiles: every key is read, and a wrong one is an error that names it."""

import copy
import re
import subprocess
import sys
from functools import reduce
from operator import getitem

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from ld3m.pipeline.cells import cell_of, cells
from ld3m.pipeline.profiles import BASE, PROFILES, ablation_settings, apply_profiles, load_params, validate
from ld3m.pipeline.profiles import PARAMS as FILE
from ld3m.runtime.paths import ROOT

COMMITTED = YAML(typ="safe").load(FILE.read_text())
PARAMS = load_params()
CELL, CONTROL = COMMITTED["cells"]["dm-ld3m-1"], COMMITTED["controls"]["herding-1"]
# mappings whose keys the user chooses, and optional keys
FREE = ("cells", "controls", "datasets", "networks", "distill", "epochs", "learning_rates", "recipe_overrides")
OPTIONAL = ("depth", "norms", "iterations")


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_bytes(FILE.read_bytes())
    return file


def mappings(node, at=()):
    yield at, node
    for key, value in node.items():
        if isinstance(value, dict):
            yield from mappings(value, (*at, key))


def test_the_committed_file_holds_exactly_the_values_that_are_read():
    assert PARAMS.model_dump(mode="json", exclude_unset=True) == COMMITTED


@pytest.mark.parametrize("at", [at for at, _ in mappings(COMMITTED) if at[:2] != ("ablations", "settings")], ids=str)
def test_an_unknown_key_and_a_missing_key_are_named_at_every_level(at):
    def changed(change):
        values = copy.deepcopy(COMMITTED)
        change(reduce(getitem, at, values))
        with pytest.raises(ValueError, match=r"params\.yaml") as refused:
            validate(values, origin="params.yaml")
        return str(refused.value)

    assert "typo" in changed(lambda node: node.update(typo=12345))
    if not set(at[-1:]) & set(FREE) and at[-2:-1] != ("recipe_overrides",) and at[:1] != ("distill",):
        for key in reduce(getitem, at, COMMITTED):
            if key not in OPTIONAL or at[0] == "ablations":
                assert ".".join((*at, key)) in changed(lambda node, key=key: node.pop(key))


def entry(**changes):
    return {"cells": {"mine": CELL | changes}}


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"seed": -1, "processes": 0}, "seed: .*got -1.*processes: .*got 0"),  # all at once
        ({"dataset": "mnist6k"}, r"\n  dataset = 'mnist6k': must be a key of datasets: mnist5k$"),
        ({"architectures": ["convnet", "convnet"]}, "architectures: has an entry twice"),
        ({"architectures": ["resnet50"]}, "networks.resnet50 is missing"),
        ({"networks.resnet50": {"width": 8}}, "there is no such key"),
        ({"distill.dm.pixel.learning_rates": {"z": 1.0}}, "distill.dm.pixel.learning_rates has z; needed are images"),
        ({"spaces.ld3m.learn": "z_T", "distill.dc.ld3m.learning_rates": {"z": 1.0, "c": 1.0}}, "needed are c, z_T"),
        ({"trajectories.epochs": 2, "objectives.mtt.expert_epochs": 2}, "trajectories.epochs = 2: must be 3"),
        ({"spaces.glad.layer": 8}, "spaces.glad.layer = 8: must be below 8"),
        ({"gan.widths": [8, 8, 8]}, "gan.widths has 3 entries: must have 4, one more than gan.discriminator_widths"),
        ({"prior.denoiser.widths": [48, 90]}, "prior.denoiser.widths.1: .*multiple of 16 .got 90"),
        (
            {"prior.denoiser.kind": "dit"},
            r"prior.denoiser.widths = \[48, 96\]: .* one, a multiple of 64, for kind: dit",
        ),
        ({"prior.denoiser.widths": [48]}, "must have at least two entries for kind: unet"),
        ({"prior.autoencoder.continuous_steps": 600}, "continuous_steps = 600: must be below 600, which is .*steps"),
        ({"prior.classes": [0, 1]}, "prior.classes lists classes of the prior in prior.source, which is empty"),
        (
            {"prior.source": "org/one", "prior.classes": [1, 1]},
            r"prior.classes: has an entry twice: remove one .got \[1",
        ),
        ({"prior.check.guidance": -1}, "prior.check.guidance: must be greater than or equal to 0 .got -1"),
        ({"datasets.mnist5k.classes": [0, 1.5]}, r"classes.1: must be text or must be a whole number .got 1.5.$"),
        (
            {"datasets.mnist5k.classes": [1, 1, 2]},
            r"datasets.mnist5k.classes: has an entry twice: remove one .got \[1, 1",
        ),
        ({"datasets.mnist5k.classes": [1]}, r"datasets.mnist5k.classes: must have 2 or more entries .got \[1"),
        ({"datasets.mnist5k.source": ""}, "datasets.mnist5k.source: must not be empty .got ''.$"),
        ({"datasets.mnist5k.source": "cache/x"}, "source: DVC empties runs/ and `make clean` removes cache/: copy it"),
        ({"prior.source": 3, "cluster": ""}, "cluster: must not be empty .*source: must be text .got 3"),
        ({"networks.vit": {}, "device": "gpu"}, "device: must be 'auto', 'cpu' or 'cuda' .*vit.width: is missing$"),
        (
            {"prior.autoencoder.widths": 8, "objectives.mtt.first_order": "no!"},
            "must be a list .*must be true or false",
        ),
        ({"evaluate.recipe_overrides": {"ipc_5": {"epochs": {"vit": 3}}}}, "overrides.ipc_5.epochs.* is missing"),
        ({"cells": {"a b": CELL}}, "cells.a b: a name has letters, digits, '_' and '-' only"),
        ({"cells": {"a": 3}}, r"  cells.a: must be a block of keys and values .got 3.$"),
        ({"evaluate.recipe_overrides": {"ipc_0": {}}}, "recipe_overrides.ipc_0: must be full_data, or ipc_10"),
        ({1: 2}, "override 1: there is no such key"),
        (entry(objective="dd"), "cells.mine.objective = 'dd': there are dc, dm, mtt"),
        (entry(space="latent"), "cells.mine.space = 'latent': there are pixel, glad, ld3m"),
        (entry(prior="data"), "cells.mine.prior = 'data': ld3m needs 'prior'"),
        (entry(objective="mtt"), "cells.mine.experts = 'data': mtt needs trajectories"),
        ({"cells": {"one": CELL, "two": CELL | {"table": "report"}}}, "cells.two.runs has run 0, which cells.one has"),
        ({"controls": {"dm-ld3m-1": CONTROL}}, "one key for two entries"),
        ({"controls": {"a": CONTROL | {"control": "noise"}}}, "controls.a.control = 'noise'"),
        ({"controls": {"a": CONTROL | {"control": "full_data"}}}, "controls.a.ipc = 1"),
        ({"distill.typo": 1}, "override 'distill.typo'"),
        ({"objectives.dm.trained_epochs": 4}, "objectives.dm.trained_epochs = 4: must be at most 3"),
    ],
)
def test_a_wrong_value_is_named(overrides, named):
    with pytest.raises(ValueError, match=f"(?s)params.yaml.*{named}|{named}.*params.yaml") as refused:
        load_params(overrides)
    assert not re.search("Input|Field|Tuple|String|instance", str(refused.value))  # pydantic's words


@pytest.mark.parametrize(
    "source", ["notebooks/../runs/mnist5k/prior", "~/runs/mnist5k/prior", "{link}/prior", "cache/x"]
)
def test_a_prior_that_would_be_removed_is_refused(source, monkeypatch, tmp_path):
    """Named by a path, through the home folder or through a link; one beside runs/ is not."""
    monkeypatch.setenv("HOME", str(ROOT))
    (tmp_path / "link").symlink_to(ROOT / "runs/mnist5k")
    with pytest.raises(ValueError, match=r"prior.source: DVC empties runs/ .*copy it to another folder"):
        load_params({"prior.source": source.format(link=tmp_path / "link")})
    assert load_params({"prior.source": "~/prior"}).prior.source == "~/prior"


def test_overrides_replace_values_and_nothing_else():
    changed = load_params({"distill.momentum": 0.25, "seed": 3})
    distill = PARAMS.distill.model_copy(update={"momentum": 0.25})
    assert changed == PARAMS.model_copy(update={"seed": 3, "distill": distill})
    with pytest.raises(ValidationError):
        changed.seed = 1


def test_numbers_as_dvc_writes_them_are_floats(file):
    file.write_text(file.read_text().replace("learning_rate: 0.02", "learning_rate: 3e-05"))
    assert load_params(path=file).trajectories.learning_rate == 3e-5


def test_a_budget_is_that_of_its_cell():
    params = load_params({"distill.dm.ld3m.iterations": 9})
    one = params.budget("dm", "ld3m", 1)
    ten = params.budget("dm", "ld3m", 10, iterations=7)
    assert (one.iterations, ten.iterations) == (9, 7) and set(one.learning_rates) == {"z", "c"}
    assert ten.learning_rates == {name: 10 * rate for name, rate in one.learning_rates.items()}
    assert params.budget("mtt", "pixel", 10).learning_rates["student_lr"] == 1e-4  # of no image


def test_a_recipe_is_that_of_its_images_per_class():
    overrides = {"ipc_10": {"epochs": {name: 7 for name in PARAMS.networks}, "ema_decay": None}}
    params = load_params({"evaluate.recipe_overrides": overrides})
    one, ten = params.recipe("vit", 1), params.recipe("vit", 10)
    assert ten == one | {"epochs": 7, "ema_decay": None} and one["epochs"] != 7 and one["ema_decay"] is not None


def test_cells_are_in_the_order_of_the_tables():
    main = [cell.key for cell in cells(PARAMS, "main")]
    distilled = [f"{objective}-{space}-1" for objective in ("dc", "dm", "mtt") for space in ("pixel", "ld3m")]
    assert main == ["random_real-1", "iteration0-1", "prior_samples-1", *distilled, "full_data"]
    report = [cell.key for cell in cells(PARAMS)]
    assert set(report) == {*COMMITTED["cells"], *COMMITTED["controls"]} and report[-1] == "full_data"
    assert report.index("dc-glad-1") == report.index("dc-pixel-1") + 1 == report.index("dc-ld3m-1") - 1
    further = cell_of(PARAMS, "dm-ld3m-1-runs")
    assert further.name == "dm-ld3m-1" and further.runs == (1, 2) and further.title == "DM LD3M"
    with pytest.raises(ValueError, match="cell = 'typo': must be a key of cells or controls in .*: dc-.*, herding-1"):
        cell_of(PARAMS, "typo")
    with pytest.raises(ValueError, match="cell = 'herding-1': must be a key of cells in params.yaml: dc-pixel-1, "):
        cell_of(PARAMS, "herding-1", controls=False)  # as 02_distill asks


# Profiles


@pytest.mark.parametrize("text", ["seed: [", "seed: 1\nseed: 2\n", "- seed\n", "", "a: &a [1]\nb: *a\n"])
def test_a_file_that_is_not_a_mapping_is_refused(file, text, tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text(text)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="profile.yaml"):
        apply_profiles(profile, path=file)
    assert file.read_bytes() == before
    file.write_text(text)
    with pytest.raises(ValueError, match=r"params\.yaml"):
        load_params(path=file)


def test_the_committed_file_is_the_base_and_dvc_changes_its_value_alone(file):
    from dvc.utils.serialize import modify_yaml  # what `dvc exp run -S seed=1` writes with

    assert FILE.read_bytes() == BASE.read_bytes()
    for profiles in ((), ("imagenet256", "paper")):
        apply_profiles(*profiles, path=file)
        before = file.read_text()
        with modify_yaml(file) as values:
            values["seed"] = 1
        assert file.read_text() == before.replace("\nseed: 0\n", "\nseed: 1\n") != before
    apply_profiles(path=file)
    assert file.read_bytes() == BASE.read_bytes()


def test_profiles_are_laid_over_the_base_and_keep_every_other_line(file, tmp_path):
    (tmp_path / "below.yaml").write_text("seed: 4\nprocesses: 1\n")
    (tmp_path / "profile.yaml").write_text("over: below.yaml\nseed: 5\ndistill: {dm: {pixel: {iterations: 7}}}\n")
    (tmp_path / "last.yaml").write_text("over: protocol\nprocesses: 3\n")  # outside profiles/, over one of it
    assert apply_profiles("smoke", path=file) is None  # leaves nothing
    file.write_text(file.read_text().replace("\nseed: 0\n", "\nseed: 77\n"))
    edited, kept = file.read_bytes(), tmp_path / "params.yaml.before-1"
    assert apply_profiles("folder", path=file) == kept and kept.read_bytes() == edited
    file.write_text(file.read_text() + "# another edit\n")
    assert apply_profiles("folder", path=file) == tmp_path / "params.yaml.before-2" and kept.read_bytes() == edited
    assert apply_profiles(tmp_path / "profile.yaml", path=file) is None
    wanted = load_params({"distill.dm.pixel.iterations": 7, "seed": 5, "processes": 1})
    assert load_params(path=file) == wanted
    both = zip(BASE.read_text().splitlines(), file.read_text().splitlines(), strict=True)
    first, *changed = [(a, b) for a, b in both if a != b]
    assert first[1] == f"# active profiles: {tmp_path / 'profile.yaml'}"
    assert "digits" in changed[0][0] and "digits" not in changed.pop(0)[1]
    (tmp_path / "profile.yaml").write_text("seed: 6\n")  # no change of params.yaml
    assert len(changed) == 3 and all(a.partition("#")[2] == b.partition("#")[2] for a, b in changed)
    assert apply_profiles(tmp_path / "profile.yaml", tmp_path / "last.yaml", path=file) is None
    params = load_params(path=file)
    assert (params.seed, params.processes, params.trajectories.experts) == (6, 3, 100)


@pytest.mark.parametrize(
    "text, named",
    [
        ("typo: 1\n", "profile.yaml.*typo"),
        ("seed: 3\nprocesses: 0\n", "(?s)profile.yaml.*processes.*got 0"),
        ("over: profile.yaml\n", "leads back"),
        ("over: absent.yaml\n", "no profile absent.yaml; profiles/ has .*smoke"),
    ],
)
def test_a_refused_profile_leaves_the_file_as_it_was(file, tmp_path, text, named):
    (tmp_path / "profile.yaml").write_text(text)
    before = file.read_bytes()
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        apply_profiles(tmp_path / "profile.yaml", path=file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", sorted(file.stem for file in PROFILES.glob("*.yaml")))
def test_every_profile_applies_with_its_ablations(file, name):
    apply_profiles(name, path=file)
    for ablation in load_params(path=file).ablations.settings:
        ablation_settings(ablation, path=file)


@pytest.mark.parametrize("size_px, depth, steps", [(128, 5, 10), (256, 6, 20)])
def test_imagenet_has_the_published_numbers_and_paper_the_released_defects(file, size_px, depth, steps):
    apply_profiles(f"imagenet{size_px}", path=file)
    params = load_params(path=file)
    assert (params.data.size_px, params.spaces.ld3m.steps, params.networks["convnet"].depth) == (size_px, steps, depth)
    widths = {name: network.width for name, network in params.networks.items()}
    assert widths == {"convnet": 128, "alexnet": 128, "vgg11": 64, "resnet18": 64, "vit": 512}
    ld3m = params.spaces.ld3m
    assert (ld3m.noise, ld3m.shifted_normalization, ld3m.encoder_input, ld3m.clamp) == ("stored", False, "x", "none")
    apply_profiles(f"imagenet{size_px}", "paper", path=file)
    params = load_params(path=file)
    ld3m = params.spaces.ld3m
    assert (ld3m.noise, ld3m.shifted_normalization, ld3m.encoder_input) == ("redrawn", True, "normalized")
    assert ld3m.clamp == "hard" and params.spaces.glad.shifted_normalization and not params.spaces.glad.mean_w
    assert not params.networks["vit"].norms and params.objectives.mtt.first_order and params.ablations.select_on_test
    assert (params.data.size_px, params.networks["convnet"].width) == (size_px, 128)
    for objective, rate in {"dc": 0.1, "dm": 1.0, "mtt": 1000.0}.items():
        budget = params.budget(objective, "ld3m")
        assert budget.iterations == 10000 and budget.learning_rates["z"] == budget.learning_rates["c"] == rate


# Ablations


def test_the_settings_of_an_ablation():
    settings = ablation_settings("steps", {"seed": 3})
    steps = {name: params.spaces.ld3m.steps for name, (params, *_) in settings.items()}
    assert steps == {"T = 2": 2, "T = 5": 5, "T = 10": 10, "T = 20": 20}
    assert PARAMS.ablations.baseline == ("steps", "T = 5") and "x0, Z" not in ablation_settings("skip_learn")
    assert all(params.seed == 3 and cell == ["dm", "ld3m", 1] for params, *cell in settings.values())
    assert ablation_settings("defects")["first-order MTT"][1] == "mtt"


def test_an_ablation_that_cannot_be_is_named(file):
    with pytest.raises(ValueError, match="no ablation 'typo'.*there are steps, skip_learn"):
        ablation_settings("typo")
    file.write_text(file.read_text().replace("T = 2: {spaces.ld3m.steps: 2}", "T = 2: {spaces.ld3m.step: 2}"))
    with pytest.raises(ValueError, match="ablations.settings.steps.T = 2: override 'spaces.ld3m.step'"):
        ablation_settings("steps", path=file)


def test_the_command_fails_without_a_traceback():
    command = [sys.executable, "-m", "ld3m.pipeline.profiles", "apply", "absent"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("there is no profile absent")
