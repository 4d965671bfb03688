"""What the profiles promise: each is valid, and the published ones have the published numbers."""

import pytest
from test_compvis import SMALL

from ld3m.models import compvis, networks
from ld3m.pipeline.profiles import ablation_settings, apply_profile, load_params
from ld3m.runtime import paths


@pytest.fixture
def applied(tmp_path):
    def apply(*profiles):
        file = tmp_path / "params.yaml"
        file.write_bytes(paths.PARAMS.read_bytes())
        for profile in profiles:
            apply_profile(paths.PROFILES / f"{profile}.yaml", path=file)
        return load_params(path=file), file

    return apply


@pytest.mark.parametrize("file", sorted(paths.PROFILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_profile_opens_with_what_it_reproduces_its_source_and_its_cost(file):
    header = file.read_text().split("\n\n")[0]
    comment = [line for line in header.splitlines() if line.startswith("#")]
    assert len(comment) >= 3 and f"python -m ld3m.pipeline.profiles apply profiles/{file.name}" in "\n".join(comment)
    if file.stem != "smoke":
        assert "Cost:" in header and "Hyper-parameters:" in header


@pytest.mark.parametrize("size_px, depth, steps, side", [(128, 5, 10, 32), (256, 6, 20, 64)])
def test_the_imagenet_profiles_have_the_published_sizes(applied, size_px, depth, steps, side):
    params, file = applied(f"imagenet{size_px}")
    assert (params.data.size_px, params.data.channels, params.data.classes) == (size_px, 3, "a")
    assert "flip" in params.data.augmentation and len(params.data.augmentation.split("_")) == 6
    assert params.spaces.ld3m.steps == steps
    assert params.prior.source == "../cin256-v2/model.ckpt" and params.prior_source_arguments()["subset"] == "a"
    assert compvis.build(SMALL, seed=0).latent_shape(size_px) == (3, side, side)
    sizes = {name: params.networks[name].width for name in params.networks}
    assert sizes == {"convnet": 128, "alexnet": 128, "vgg11": 64, "resnet18": 64, "vit": 512}
    assert (params.networks["convnet"].depth, params.networks["vit"].depth) == (depth, 10)
    if size_px == 128:  # the number in the published experts
        convnet = networks.build(classes=10, seed=0, **params.network_arguments("convnet"))
        assert len(networks.flat_parameters(convnet)) == 615_690
    for ablation in params.ablations.settings:
        assert ablation_settings(ablation, path=file)


@pytest.mark.parametrize("size_px", [128, 256])
def test_the_default_is_the_corrected_protocol_and_paper_the_released_one(applied, size_px):
    corrected, file = applied(f"imagenet{size_px}")
    released = load_params({"paper": True}, path=file)

    def switches(params):
        ld3m = params.spaces.ld3m
        return {
            "noise": ld3m.noise,
            "normalization": ld3m.normalization,
            "encoder": ld3m.encoder_input,
            "clamp": ld3m.clamp,
            "start": params.spaces.pixel.start,
            "norms": params.networks["vit"].norms,
            "first order": params.objectives.mtt.first_order,
            "on test": params.ablations.select_on_test,
        }

    assert list(switches(corrected).values()) == ["stored", "real", "pixels", "none", "real", True, False, False]
    assert list(switches(released).values()) == ["redrawn", "shifted", "images", "hard", "noise", False, True, True]
    for params in (corrected, released):
        assert (params.data.size_px, params.networks["convnet"].width) == (size_px, 128)
        assert params.evaluate.seeds == 5 and params.evaluate.recipe.ema_decay == 0.995
        assert {params.recipe(name, ipc)["epochs"] for name in params.networks for ipc in (1, 10)} == {1000}
        assert params.evaluate.recipe.learning_rates["vgg11"] == 1e-4
        for objective, rate in {"dc": 0.1, "dm": 1.0, "mtt": 1000.0}.items():
            budget = params.budget(objective, "ld3m")
            assert budget.iterations == 10000 and budget.learning_rates["z"] == budget.learning_rates["c"] == rate
        assert params.budget("mtt", "ld3m").learning_rates["student_lr"] == 1e-6
        assert params.objectives.dm.real_batch == params.objectives.dc.real_batch == 256
        assert (params.trajectories.experts, params.trajectories.batch, params.objectives.mtt.student_lr) == (
            100,
            256,
            0.01,
        )


@pytest.mark.parametrize("profiles", [(), ("cifar10",), ("imagenet128",), ("imagenet256",)])
def test_the_switch_is_the_profile_applied_by_hand(applied, profiles):
    _, file = applied(*profiles)
    switched = load_params({"paper": True}, path=file)
    by_hand, _ = applied(*profiles, "paper")
    assert switched == by_hand.model_copy(update={"paper": True})


def test_the_switch_in_the_file_is_followed_by_every_reader(applied):
    _, file = applied()
    file.write_text(file.read_text().replace("paper: false", "paper: true"))
    params = load_params(path=file)
    assert params == load_params({"paper": True}) and params.spaces.ld3m.noise == "redrawn"
    assert load_params({"paper": False}, path=file) == load_params()
    settings = ablation_settings("skip_learn", path=file)
    assert {params.spaces.ld3m.noise for params, *_ in settings.values()} == {"redrawn"}
    (changed, *_), kept = settings["mean, Z"], params.spaces.ld3m
    assert changed.spaces.ld3m == kept.model_copy(update={"skip": "mean", "learn": "z"})  # a setting wins over paper


def test_a_folder_takes_flips_and_a_share_of_train_for_validation(applied):
    params, _ = applied("folder")
    assert params.dataset == "folder" and params.data.splits.validation == 0.1 and params.data.classes is None
    assert "flip" in params.data.augmentation and "flip" in params.gan.augmentation
    assert params.networks == load_params().networks and params.distill == load_params().distill


@pytest.mark.parametrize(
    "profiles", [(f.stem,) for f in sorted(paths.PROFILES.glob("*.yaml"))] + [("imagenet128", "paper")]
)
def test_every_ablation_is_valid_under_a_profile(applied, profiles):
    params, file = applied(*profiles)
    for ablation in params.ablations.settings:
        assert ablation_settings(ablation, path=file) is not None


STACKS = [(), ("smoke",), ("cifar10",), ("cifar10", "cifar10_cpu"), ("imagenet128",), ("imagenet256",)]


@pytest.mark.parametrize("profiles", STACKS, ids="-".join)
def test_settings_of_the_ablation_of_steps_are_named_by_their_steps(applied, profiles):
    params, file = applied(*profiles)
    steps = {name: params.spaces.ld3m.steps for name in params.ablations.settings["steps"]}
    changed = ablation_settings("steps", path=file)
    steps |= {name: given.spaces.ld3m.steps for name, (given, _, _) in changed.items()}
    assert steps == {name: int(name.removeprefix("T = ")) for name in steps}
