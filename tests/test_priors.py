"""Priors on disk: what is written is read, what is no prior is refused, a link stands for its source."""

import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial

import diffusers
import huggingface_hub
import pytest
import torch
from conftest import make_prior, relative_difference
from diffusers import DDIMScheduler, UNet2DModel
from executing import run_notebook
from safetensors.torch import load_file, save_file
from test_compvis import SMALL, original
from tiny_priors import SIZE_PX, embeddings, make_autoencoder, make_dit, make_unet, write

from ld3m.data.subsets import IMAGENET, imagenet_classes
from ld3m.evaluation.artefact import read_artefact
from ld3m.models import compvis
from ld3m.models.diffusers_folder import EMBEDDER
from ld3m.models.diffusion_prior import COMPVIS, Spacing
from ld3m.models.prior_io import fitted, link_prior, linked_source, load_prior, save_prior
from ld3m.models.prior_variants import with_classes
from ld3m.pipeline.cells import cell_of, runs_path
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import PROFILES, load_params
from ld3m.runtime import paths

FITTING = dict(size_px=SIZE_PX, channels=3, names=tuple("abcdefghij"), classes=None, subset=None)
TO_WOOF = FITTING | {"subset": "woof"}
SORTED_WOOF = [imagenet_classes()[index]["wnid"] for index in sorted(IMAGENET["woof"])]  # as folders are


def as_stored(prior):
    return prior.to(torch.float16).to(torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a prior. Do not change it."""
    folder = tmp_path_factory.mktemp("priors") / "tiny"
    save_prior(make_prior(), folder)
    return folder


def test_save_and_load(saved):
    loaded, prior = load_prior(saved), as_stored(make_prior())
    assert loaded.fingerprint() == prior.fingerprint() and loaded.spacing == Spacing("leading", 1, False) == COMPVIS
    assert load_prior(runs_path("mnist5k", "prior")).spacing == COMPVIS
    assert loaded.autoencoder.config.scaling_factor == 0.7
    for module in (loaded.unet, loaded.autoencoder, loaded.embedding):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_a_missing_folder_part_or_file_is_named(saved, tmp_path):
    for source in ("runs/nowhere", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no prior in .*nowhere: there is no such folder"):
            load_prior(source)
    folder = shutil.copytree(saved, tmp_path / "broken")
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        moved = file.rename(tmp_path / "moved")
        with pytest.raises(ValueError, match=f"^{file} cannot be used.*a diffusers folder has unet/"):
            load_prior(folder)
        moved.rename(file)
        whole = file.read_bytes()
        file.write_bytes(b"{}")
        with pytest.raises(ValueError, match=f"^{file} cannot be used: .*; replace the file, or name another prior$"):
            load_prior(folder)
        file.write_bytes(whole)
    (folder / "vqvae").rename(tmp_path / "vqvae")
    with pytest.raises(FileNotFoundError, match=f"no prior in .*broken: vqvae or vae missing; .*{EMBEDDER}"):
        load_prior(folder)


def test_tensors_that_are_missing_unknown_or_not_finite_are_named(dit_copy):
    file = dit_copy / "transformer/diffusion_pytorch_model.safetensors"
    state, bias = load_file(file), "pos_embed.proj.bias"
    for changes, message in (
        ({"blocks.0.weight": torch.ones(1)}, r"missing \[\], unknown \['blocks.0.weight'\]"),
        ({bias: None}, rf"missing \['{bias}'\], unknown \[\]"),
        ({bias: torch.full_like(state[bias], torch.nan)}, rf"tensors are not finite \({bias}\): the file is damaged"),
    ):
        save_file({key: tensor for key, tensor in (state | changes).items() if tensor is not None}, file)
        with pytest.raises(ValueError, match=f"^{file} cannot be used: .*{message}"):
            load_prior(dit_copy)


def test_a_prior_and_a_link_replace_each_other(dit_folder, tmp_path):
    folder = tmp_path / "deeper" / "prior"
    folder.mkdir(parents=True)  # an empty folder may be there
    for seed in (0, 1):
        save_prior(make_prior(seed=seed), folder)
        assert load_prior(folder).fingerprint() == as_stored(make_prior(seed=seed)).fingerprint()
    link_prior(folder, source=str(dit_folder), **TO_WOOF)
    assert linked_source(folder) == str(dit_folder) and not (folder / "unet").exists()
    save_prior(make_prior(), folder)
    assert linked_source(folder) is None and [path.name for path in folder.parent.iterdir()] == ["prior"]


@pytest.mark.parametrize("other", ["model.ckpt", "text_encoder/model.bin"])
def test_files_of_others_are_not_replaced(tmp_path, dit_folder, other):
    folder = tmp_path / "cin256-v2"
    save_prior(make_prior(), folder)
    (folder / other).parent.mkdir(exist_ok=True)
    (folder / other).write_bytes(b"the only copy")
    for write_to in (partial(save_prior, make_prior(seed=1)), partial(link_prior, source=str(dit_folder), **TO_WOOF)):
        with pytest.raises(FileExistsError, match=f"cin256-v2 has {other.split('/')[0]}, .*lost: name a new"):
            write_to(folder=folder)
    assert (folder / other).exists() and load_prior(folder).fingerprint() == as_stored(make_prior()).fingerprint()


def test_only_what_can_be_read_again_is_written(dit_folder, tmp_path):
    others = replace(make_prior(), prediction="sample"), replace(make_prior(), spacing=Spacing("trailing"))
    for prior in (load_prior(dit_folder), *others):
        with pytest.raises(ValueError, match="only priors with the noise schedule of cin256-v2 are written"):
            save_prior(prior, tmp_path / "prior")


def test_pickled_weights_are_read_without_executing_them(dit_folder, tmp_path):
    folder = write(tmp_path / "pickled", safe_serialization=False)
    assert load_prior(folder).fingerprint() == load_prior(dit_folder).fingerprint()

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"encoder.conv_in.weight": Runs()}, folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled/vae/diffusion_pytorch_model.bin cannot be used"):
        load_prior(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(unet=make_unet(), embedding=embeddings()[:, :7].clone()), rf"{EMBEDDER} cannot .*\(11, 7\).*, 8\)"),
        (dict(unet=make_unet(), embedding=torch.full((11, 8), torch.nan)), f"{EMBEDDER} cannot .*not finite .weight"),
        (dict(unet=make_unet(class_embed_type="identity")), "unet/config.json cannot .*class_embed_type is not supp"),
        (dict(unet=make_unet(in_channels=9), embedding=embeddings()), "unet takes 9 channels and gives 4, .* have 4"),
        (dict(unet=make_dit(classes=3, share_tables=False)), "transformer cannot .*tables of the DiT's blocks differ"),
        (dict(autoencoder=make_autoencoder(latents_mean=(0.1,) * 4)), "vae/config.json cannot .*latents_mean"),
        (dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatchEuler.*must be a schedule of betas"),
        (dict(scheduler=DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")), "no signal is left"),
        (dict(scheduler=DDIMScheduler(timestep_spacing="karras")), "'leading', 'trailing' or 'linspace'.*'karras'"),
        (dict(scheduler=DDIMScheduler(beta_end=3.0)), "scheduler_config.json cannot .*betas must be in 0 .. 1"),
        (dict(scheduler=DDIMScheduler(beta_start=math.nan)), "scheduler_config.json cannot .*betas must be in 0 .. 1"),
        (
            dict(autoencoder=make_autoencoder(scaling_factor=0.0)),
            "vae/config.json cannot .*scaling_factor=0.0 .*above 0",
        ),
        (dict(autoencoder=make_autoencoder(shift_factor=math.inf)), "vae/config.json cannot .*shift_factor=inf"),
        (dict(scheduler=DDIMScheduler(steps_offset=-1)), "scheduler_config.json cannot .*greater than or equal to 0"),
        (dict(scheduler=DDIMScheduler(prediction_type="flow")), "'epsilon', 'v_prediction' or 'sample'.*flow"),
    ],
)
def test_what_no_prior_can_be_made_of(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{message}"):
        load_prior(write(tmp_path / "other", **changes))


def test_a_hub_id_without_a_network(dit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="did not give it .*Correct the name.*transformer/.*vae/.*scheduler_c"):
        load_prior("facebook/DiT-XL-2-256")
    kept = tmp_path / "models--facebook--DiT-XL-2-256"  # as the hub's own library keeps what it has fetched
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("f" * 40)
    shutil.copytree(dit_folder, kept / "snapshots" / ("f" * 40))
    assert load_prior("facebook/DiT-XL-2-256").fingerprint() == load_prior(dit_folder).fingerprint()


def test_only_the_parts_of_a_hub_repository_are_fetched(dit_copy, monkeypatch):
    asked = []
    fetch = lambda hub_id, allow_patterns: asked.extend(allow_patterns) or dit_copy  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load_prior("someone/dit")
    assert "vae/diffusion_pytorch_model.safetensors*" in asked and not [name for name in asked if ".bin" in name]
    file = dit_copy / "transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    load_prior("someone/dit")
    assert [name for name in asked if ".bin" in name] == ["transformer/diffusion_pytorch_model.bin"]


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        (dict(subset="woof"), IMAGENET["woof"]),
        (dict(names=("n03888257", "tench")), (701, 0)),
        (dict(names=("n03888257", "tench"), classes=[701, 0]), (701, 0)),
        (dict(classes=range(20, 10, -1)), tuple(range(20, 10, -1))),
    ],
)
def test_the_classes_of_a_prior_that_a_data_set_has(dit_folder, changes, classes):
    whole = load_prior(dit_folder)
    prior, found = fitted(whole, source="dit", **FITTING | changes)
    assert found == classes and prior.classes == len(classes)
    assert torch.equal(prior.embed(torch.arange(2)), whole.embed(torch.tensor(classes[:2])))
    assert torch.equal(prior.null(1), whole.null(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(), "dit has 1000 classes, the data set 10: .*: list in prior.classes, for each "),
        (dict(names=(*SORTED_WOOF[:9], "n00000001")), r"data set 10: 'n00000001' are neither wnid nor word of Image"),
        (
            dict(names=SORTED_WOOF, classes=IMAGENET["woof"]),
            r"not the order .* n02086240, .*\[155, 159, .*empty",
        ),
        (dict(names=("tench", "parachute"), classes=[701, 0]), r"not the order .* tench, parachute .* \[0, 701\]"),
        (dict(subset="woof", classes=range(10)), r"not the order .*\[193, 182, "),
        (dict(classes=[1, 2]), "prior.classes has 2 entries: must have one for each of 10"),
        (dict(names=("a", "b"), classes=[1, 1000]), r"prior.classes has \[1000\]: .* 0 to 999"),
        (dict(names=("a", "b"), classes=[1, 1]), r"classes=\[1, 1\] repeats a class"),
        (dict(subset="woof", size_px=64), "size_px=64: this prior takes 32"),
    ],
)
def test_a_prior_that_does_not_fit_the_data_set(dit_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        fitted(load_prior(dit_folder), source="dit", **FITTING | changes)


def test_a_prior_without_classes_fits_any(tmp_path):
    prior = load_prior(write(tmp_path / "unet", unet=make_unet(kind=UNet2DModel)))
    assert fitted(prior, source="unet", **FITTING) == (prior, ())
    with pytest.raises(ValueError, match=r"classes=\[1\], but unet has no classes: leave it empty"):
        fitted(prior, source="unet", **FITTING | {"classes": [1]})


def test_a_link_stands_for_its_source_until_that_changes(dit_copy, tmp_path):
    folder = tmp_path / "runs/prior"
    link_prior(folder, source=str(dit_copy), **TO_WOOF)
    assert [file.name for file in folder.iterdir()] == ["source.json"]
    assert linked_source(folder) == str(dit_copy) and linked_source(dit_copy) is None
    expected = with_classes(load_prior(dit_copy), IMAGENET["woof"])
    assert load_prior(folder).fingerprint() == expected.fingerprint()
    DDIMScheduler(timestep_spacing="trailing").save_pretrained(dit_copy / "scheduler")
    with pytest.raises(ValueError, match="copied has changed since .*dvc repro -f prior"):
        load_prior(folder)
    shutil.rmtree(dit_copy)
    with pytest.raises(FileNotFoundError, match="no prior in .*copied"):
        load_prior(folder)
    (folder / "source.json").write_text("{}")
    with pytest.raises(ValueError, match="source.json is broken"):
        load_prior(folder)


def test_a_link_to_a_compvis_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(compvis.load_checkpoint.__kwdefaults__, "kind", SMALL)
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": original(SMALL).state}, file)
    link_prior(tmp_path / "prior", source=str(file), **FITTING | {"classes": range(10)})
    assert load_prior(tmp_path / "prior").fingerprint() == load_prior(file).fingerprint()


def test_a_set_is_distilled_through_a_prior_from_elsewhere(dit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    overrides = {
        "prior.source": str(dit_folder),
        "prior.classes": [7, 2],
        "prior.check": dict(samples_per_class=1, steps=1, guidance=2.0, width=8, epochs=1, learning_rate=0.02),
        "datasets.mnist5k.classes": ["3", "8"],
        "networks.convnet": {"width": 8, "depth": 3},
        "evaluate.recipe.epochs": dict.fromkeys(load_params().networks, 1),
        "objectives.dm.real_batch": 8,
        "distill.validation_seeds": 1,
        "distill.dm.ld3m": {"iterations": 2, "learning_rates": {"z": 1e-3, "c": 1e-3}},
        "spaces.ld3m.steps": 2,
        "processes": 1,
    }
    with pytest.raises(ValueError, match=f"prior.source is {dit_folder}, but .*holds no such prior: `dvc repro"):
        _ = Experiment(load_params(overrides)).prior
    for name in ("00_prior", "02_distill"):
        run_notebook(PROFILES.parent / f"notebooks/{name}.ipynb", {"overrides": overrides})
    tensors, record = read_artefact(cell_of(load_params(), "dm-ld3m-1").artefact(0))
    restricted = with_classes(load_prior(dit_folder), [7, 2])
    assert record["configuration"]["prior_sha256"] == restricted.fingerprint()
    started = restricted.embed(torch.arange(2))
    assert relative_difference(tensors["c"], started) < 0.1
    assert all(step[f"grad_norm_{name}"] > 0 for step in record["history"] for name in ("z", "c"))
    assert json.loads((runs_path("mnist5k", "prior-check") / "check.json").read_text())["samples"] == 2
    for kept, is_replayed in ((0, True), (1, False)):
        used = Experiment(load_params(overrides | {"spaces.ld3m.uncheckpointed_steps": kept})).prior
        assert bool(used.recordings) == is_replayed
    with pytest.raises(ValueError, match=f"prior.source is None, but .* holds {dit_folder}: `dvc repro prior` first"):
        _ = Experiment(load_params(overrides | {"prior.source": None, "prior.classes": None})).prior
