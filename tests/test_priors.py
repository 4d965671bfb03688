"""Priors on disk: what is written is read, diffusers' own models compute what diffusers does, the rest is refused."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import diffusers
import huggingface_hub
import pytest
import torch
from conftest import directional_derivative, make_prior, relative_difference
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from executing import run_notebook
from safetensors.torch import load_file, save_file
from test_compvis import SMALL, original

from ld3m.data.subsets import IMAGENET
from ld3m.evaluation.artefact import read_artefact
from ld3m.method.sampler import reverse, timesteps
from ld3m.models import compvis
from ld3m.models import prior_io as priors
from ld3m.models.diffusion_prior import COMPVIS, Spacing
from ld3m.models.prior_io import EMBEDDER, fitted, link_prior, linked_source, load_prior, save_prior
from ld3m.models.prior_variants import with_classes, with_random_unet, with_random_weights
from ld3m.pipeline.cells import cell_of, runs_path
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import PROFILES, load_params
from ld3m.runtime import paths

SCALE = 0.7  # of make_prior
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vqvae/diffusion_pytorch_model.safetensors",
    "class_embedder/model.safetensors",
)
SIZE_PX, SIDE = 32, 8  # of the images and latents of the models below
SPACINGS = [  # as DiT-XL/2 has it, as CompVis, as Stable Diffusion's successors, and what is left
    dict(),
    dict(steps_offset=1, set_alpha_to_one=False),
    dict(timestep_spacing="trailing"),
    dict(timestep_spacing="trailing", set_alpha_to_one=False),
    dict(timestep_spacing="linspace", steps_offset=1),
    dict(steps_offset=3),
]


def as_stored(prior):
    return prior.to(torch.float16).to(torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a prior, and the prior that was saved there. Do not change it."""
    folder, prior = tmp_path_factory.mktemp("priors") / "tiny", make_prior().freeze_()
    save_prior(prior, folder)
    return folder, as_stored(prior)


def test_save_and_load(saved, randn):
    folder, prior = saved
    pixels = randn(3, 1, 16, 16).clamp(-1, 1)
    loaded = load_prior(folder)
    assert loaded.fingerprint() == prior.fingerprint()
    assert torch.equal(loaded.alpha_bar, prior.alpha_bar)
    assert loaded.autoencoder.config.scaling_factor == SCALE
    for module in (loaded.unet, loaded.autoencoder, loaded.embedding):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    z, c = prior.encode(pixels.float()), prior.embed(torch.tensor([0, 1, 2]))
    assert torch.equal(loaded.encode(pixels.float()), z)
    assert torch.equal(loaded.embed(torch.tensor([0, 1, 2])), c)
    assert torch.equal(loaded.null(3), prior.null(3))
    assert torch.equal(loaded.denoise(z, 401, c), prior.denoise(z, 401, c))
    assert torch.equal(loaded.decode(z), prior.decode(z))


def test_a_missing_folder_or_part_is_named(saved, tmp_path):
    for source in ("runs/nowhere", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no prior in .*nowhere: there is no such folder"):
            load_prior(source)
    folder = shutil.copytree(saved[0], tmp_path / "broken")
    (folder / "vqvae").rename(tmp_path / "vqvae")
    with pytest.raises(FileNotFoundError, match=f"no prior in .*broken: vqvae or vae missing; .*{EMBEDDER}$"):
        load_prior(folder)
    (folder / "model.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=rf"name the file: {folder}/model\.ckpt"):
        load_prior(folder)


@pytest.mark.parametrize(("file", "kept"), [*zip(WEIGHTS, (None, 0.0, 0.5), strict=True), (WEIGHTS[2], None)])
def test_a_missing_or_truncated_file_is_an_error(saved, tmp_path, file, kept):
    folder = shutil.copytree(saved[0], tmp_path / "broken")
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if kept is not None:
        (folder / file).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="broken cannot be used"):
        load_prior(folder)


def test_save_replaces_the_whole_folder(tmp_path):
    folder = tmp_path / "deeper" / "prior"
    save_prior(make_prior(), folder)
    (folder / "source.json").write_text("of a link that was here before")
    new = make_prior(seed=1)
    save_prior(new, folder)
    assert load_prior(folder).fingerprint() == as_stored(new).fingerprint()
    assert not (folder / "source.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["prior"]


@pytest.mark.parametrize(("other", "has_prior"), [("model.ckpt", False), ("unet/diffusion_pytorch_model.bin", True)])
def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path, dit_folder, other, has_prior):
    folder = tmp_path / "cin256-v2"
    if has_prior:
        save_prior(make_prior(), folder)
    (folder / other).parent.mkdir(parents=True, exist_ok=True)
    (folder / other).write_bytes(b"the only copy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    fitting = FITTING | {"subset": "woof"}
    for write in (partial(save_prior, make_prior(seed=1)), partial(link_prior, source=str(dit_folder), **fitting)):
        with pytest.raises(FileExistsError, match=f"cin256-v2 holds files that are no part .*{other}.*empty folder"):
            write(folder=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["cin256-v2"]


def test_a_file_or_a_linked_folder_is_not_replaced(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"the only copy")
    with pytest.raises(FileExistsError, match="model.ckpt is a file: name a new folder"):
        save_prior(make_prior(), tmp_path / "model.ckpt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/unet").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(FileExistsError, match="folder holds files that are no part of a prior"):
        save_prior(make_prior(), tmp_path / "folder")
    assert (tmp_path / "model.ckpt").read_bytes() == b"the only copy"


def test_a_prior_may_be_written_into_an_empty_folder_and_over_a_link(tmp_path, dit_folder):
    folder = tmp_path / "prior"
    folder.mkdir()
    save_prior(make_prior(), folder)
    link_prior(folder, source=str(dit_folder), **FITTING | {"subset": "woof"})
    assert linked_source(folder) == str(dit_folder) and not (folder / "unet").exists()
    save_prior(make_prior(), folder)
    assert linked_source(folder) is None


def test_a_save_that_fails_leaves_the_former_prior(tmp_path, monkeypatch):
    folder, former = tmp_path / "prior", make_prior()
    save_prior(former, folder)

    def full(*args, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(priors, "save_file", full)  # the last file of the folder
        save_prior(make_prior(seed=1), folder)
    assert load_prior(folder).fingerprint() == as_stored(former).fingerprint()
    save_prior(make_prior(seed=1), folder)  # what the failure left behind is in nobody's way
    assert load_prior(folder).fingerprint() == as_stored(make_prior(seed=1)).fingerprint()


# models of diffusers, none of whose weights is at a value where a confusion would not show


def make(kind, **given):
    """A model in evaluation mode, every weight away from where it is initialised; the same weights every time."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = kind(**given)
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def make_dit(*, classes=1000, share_tables=True, out_channels=8):
    dit = make(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=2,
        sample_size=SIDE,
        num_embeds_ada_norm=classes,
    )
    if share_tables:
        table, *others = [block.norm1.emb.class_embedder for block in dit.transformer_blocks]
        for other in others:
            other.load_state_dict(table.state_dict())
    return dit


def make_unet(*, kind=UNet2DConditionModel, **changes):
    conditional = dict(cross_attention_dim=8, attention_head_dim=2) if kind is UNet2DConditionModel else {}
    attending = "CrossAttn{}Block2D" if conditional else "Attn{}Block2D"
    given = dict(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", attending.format("Down")),
        up_block_types=(attending.format("Up"), "UpBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
    )
    return make(kind, **given | conditional | changes)


def make_autoencoder(kind=AutoencoderKL, **changes):
    given = dict(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    return make(kind, **given | changes)


def write(folder, *, unet=None, autoencoder=None, scheduler=None, embedding=None, **options):
    """A diffusers folder of parts, each in its usual place."""
    unet = unet or make_dit()
    autoencoder = autoencoder or make_autoencoder()
    unet.save_pretrained(folder / ("transformer" if isinstance(unet, DiTTransformer2DModel) else "unet"), **options)
    autoencoder.save_pretrained(folder / ("vqvae" if isinstance(autoencoder, VQModel) else "vae"), **options)
    (scheduler or DDPMScheduler()).save_pretrained(folder / "scheduler")
    if embedding is not None:
        (folder / "class_embedder").mkdir()
        save_file({"weight": embedding}, folder / "class_embedder/model.safetensors")
    return folder


def embeddings(classes=10):
    return torch.randn(classes + 1, 8, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    """A DiT and an AutoencoderKL, laid out as the released DiT-XL/2. Do not change it."""
    return write(tmp_path_factory.mktemp("priors") / "dit")


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    """A U-Net that attends to one of ten class embeddings, and an AutoencoderKL. Do not change it."""
    return write(tmp_path_factory.mktemp("priors") / "unet", unet=make_unet(), embedding=embeddings())


@pytest.fixture
def copied(dit_folder, tmp_path):
    return shutil.copytree(dit_folder, tmp_path / "copied")


def test_a_dit_asked_with_rows_of_its_table_is_the_dit_asked_with_labels(dit_folder, randn):
    prior = load_prior(dit_folder).to(torch.float64)
    theirs = DiTTransformer2DModel.from_pretrained(dit_folder / "transformer").double()
    labels, z_t = torch.tensor([0, 7, 999, 1000]), randn(4, 4, SIDE, SIDE)
    c = torch.cat([prior.embed(labels[:3]), prior.null(1)])
    assert (prior.classes, prior.latent_shape(SIZE_PX), c.shape) == (1000, (4, SIDE, SIDE), (4, 1, 16))
    for t in (401, torch.tensor([1, 401, 901, 999])):
        expected = theirs(z_t, torch.as_tensor(t).expand(4), labels).sample[:, :4]  # the other four are sigma
        assert torch.equal(prior.denoise(z_t, t, c), expected)
    halved = replace(prior.to(torch.float32), precision=torch.bfloat16).denoise(z_t.float(), t, c.float())
    assert halved.dtype == torch.float32 and relative_difference(halved, expected) < 0.05


def test_blocks_with_tables_of_their_own_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label tables of the DiT's blocks differ"):
        load_prior(write(tmp_path / "dit", unet=make_dit(classes=3, share_tables=False)))


@pytest.mark.parametrize("source", ["dit_folder", "unet_folder"])
def test_the_gradient_for_the_conditioning_equals_finite_differences(request, randn, source):
    prior = load_prior(request.getfixturevalue(source)).to(torch.float64)
    z_t, weight = randn(2, 4, SIDE, SIDE), randn(2, 4, SIDE, SIDE)
    c = prior.embed(torch.tensor([0, 9])).requires_grad_()
    direction = randn(*c.shape)
    for prediction in ("epsilon", "v_prediction", "sample"):
        asked = replace(prior, prediction=prediction)

        def value(c, asked=asked):
            return (asked.denoise(z_t, torch.tensor([101, 901]), c) * weight).sum()

        (gradient,) = torch.autograd.grad(value(c), c)
        expected = directional_derivative(value, [c], [direction])
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-6) and abs(expected) > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_guided_samples_are_those_of_the_pipeline_of_diffusers(dit_folder, tmp_path, prediction):
    folder = shutil.copytree(dit_folder, tmp_path / "dit")
    DDIMScheduler(prediction_type=prediction, clip_sample=False).save_pretrained(folder / "scheduler")
    prior = load_prior(folder).to(torch.float64)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)  # DiT's, in float64
    parts = [
        DiTTransformer2DModel.from_pretrained(folder / "transformer"),
        AutoencoderKL.from_pretrained(folder / "vae"),
    ]
    pipeline = DiTPipeline(*[part.double() for part in parts], scheduler)
    pipeline.set_progress_bar_config(disable=True)
    labels, draw = [3, 999], torch.Generator().manual_seed(0)
    images = pipeline(labels, guidance_scale=2.0, num_inference_steps=4, output_type="pt", generator=draw).images
    z_T = torch.randn(2, 4, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z_0 = reverse(prior, z_T, prior.embed(torch.tensor(labels)), z=z_T, steps=4, guidance=2.0, skip="none")
        ours = (prior.decode(z_0) / 2 + 0.5).clamp(0, 1)
    assert prior.prediction == prediction and images.std() > 0.05
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("prediction", "spacing"),
    [("epsilon", SPACINGS[0]), ("v_prediction", SPACINGS[1]), ("sample", SPACINGS[2]), ("epsilon", SPACINGS[3])],
)
def test_a_unet_is_sampled_as_diffusers_does(tmp_path, randn, prediction, spacing):
    """With another number of timesteps, and betas that grow otherwise."""
    betas = dict(num_train_timesteps=400, beta_schedule="scaled_linear", beta_end=0.015, clip_sample=False)
    scheduler, unet = DDIMScheduler(prediction_type=prediction, **betas, **spacing), make_unet()
    prior = load_prior(write(tmp_path / "unet", unet=unet, scheduler=scheduler, embedding=embeddings()))
    prior, unet, state = prior.to(torch.float64), unet.double(), randn(2, 4, SIDE, SIDE)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    if not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == timesteps(5, total=400, spacing=prior.spacing)[::-1]
    c, labels = embeddings().double(), torch.tensor([9, 2])
    with torch.no_grad():
        ours = reverse(prior, state, prior.embed(labels), z=state, steps=5, guidance=1, skip="none")
        for t in scheduler.timesteps.tolist():
            state = scheduler.step(unet(state, t, c[labels][:, None]).sample, t, state).prev_sample
    assert (len(prior.alpha_bar), prior.classes) == (400, 10)
    assert relative_difference(ours, state) < 1e-10


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_timesteps_are_those_of_the_scheduler_in_the_folder(copied, spacing):
    scheduler = DDIMScheduler(**spacing)
    scheduler.save_pretrained(copied / "scheduler")
    prior = load_prior(copied)
    for steps in (1, 2, 3, 5, 7, 10, 20, 50, 250, 1000):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()[::-1]
        if expected[-1] < 1000:
            assert timesteps(steps, total=1000, spacing=prior.spacing) == expected
        else:
            with pytest.raises(
                ValueError, match=f"steps={steps}: .* into the 1000 timesteps .*from [13]"
            ):
                timesteps(steps, total=1000, spacing=prior.spacing)
    assert prior.spacing.ends_clean == scheduler.config.set_alpha_to_one


def test_the_embedded_prior_and_checkpoints_are_sampled_as_compvis_does(saved):
    embedded = DDIMScheduler.from_pretrained(runs_path("mnist5k", "prior") / "scheduler")
    embedded.set_timesteps(5)
    for prior in (load_prior(runs_path("mnist5k", "prior")), load_prior(saved[0]), saved[1]):
        assert prior.spacing == Spacing("leading", 1, ends_clean=False) == COMPVIS
        assert embedded.timesteps.tolist() == timesteps(5, total=1000, spacing=prior.spacing)[::-1]
    assert not embedded.config.set_alpha_to_one


def test_the_noise_of_every_kind_of_prediction(dit_folder, randn):
    """A model that predicted x0 or v exactly: `denoise` gives the noise that was added."""
    x0, eps, t = randn(2, 4, SIDE, SIDE), randn(2, 4, SIDE, SIDE), torch.tensor([1, 901])
    prior = load_prior(dit_folder)
    a = prior.alpha_bar[t].view(2, 1, 1, 1)
    z_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    for prediction, exact in {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0,
    }.items():
        oracle = type("DiTTransformer2DModel", (), {"__call__": lambda *_, exact=exact, **options: (exact,)})()
        found = replace(prior, unet=oracle, prediction=prediction).denoise(z_t, t, prior.null(2))
        torch.testing.assert_close(found, eps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [None, 0.2])
def test_an_autoencoder_with_a_posterior(tmp_path, randn, shift):
    vae = make_autoencoder(shift_factor=shift)
    prior = load_prior(write(tmp_path / "dit", unet=make_dit(classes=3), autoencoder=vae)).to(torch.float64)
    vae, pixels = vae.double(), randn(2, 3, SIZE_PX, SIZE_PX).clamp(-1, 1)
    z = prior.encode(pixels)
    torch.testing.assert_close(z, 0.3 * (vae.quant_conv(vae.encoder(pixels))[:, :4] - (shift or 0)))
    assert prior.quantize(z) is z and prior.downsampling == 4
    expected = vae.decoder(vae.post_quant_conv(z / 0.3 + (shift or 0)))
    torch.testing.assert_close(prior.decode(z), expected)


def test_a_prior_without_classes(tmp_path, randn):
    unet, vq = make_unet(kind=UNet2DModel, attention_head_dim=4), make_autoencoder(VQModel, num_vq_embeddings=16)
    prior = load_prior(write(tmp_path / "unet", unet=unet, autoencoder=vq)).to(torch.float64)
    z_t = randn(2, 4, SIDE, SIDE)
    assert not prior.is_conditional and prior.latent_shape(64) == (4, 16, 16)
    predicted = prior.denoise(z_t, 5, prior.null(2))  # where a tensor lies in memory decides its last bit on some CPUs
    torch.testing.assert_close(predicted, unet.double()(z_t, 5).sample, rtol=1e-12, atol=1e-12)
    c = prior.null(2).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prior.denoise(z_t, 5, c).sum(), c)
    assert torch.equal(gradient, torch.zeros(2, 1, 1))


def test_a_quantiser_of_another_width(tmp_path, randn):
    vq = make_autoencoder(VQModel, latent_channels=6, vq_embed_dim=4, num_vq_embeddings=16)
    prior = load_prior(write(tmp_path / "dit", unet=make_dit(classes=3), autoencoder=vq)).to(torch.float64)
    z = prior.encode(randn(1, 3, SIZE_PX, SIZE_PX))
    assert z.shape == (1, *prior.latent_shape(SIZE_PX)) == (1, 4, SIDE, SIDE)


def test_the_names_in_released_models(dit_folder, copied):
    """DiT-XL/2 calls itself Transformer2DModel, and its autoencoder has former names of attention."""
    config = json.loads((copied / "transformer/config.json").read_text())
    (copied / "transformer/config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    file, former = copied / "vae/diffusion_pytorch_model.safetensors", {}
    for key, tensor in load_file(file).items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        former[key] = tensor
    assert any("query" in key for key in former)
    save_file(former, file, metadata={"format": "pt"})
    assert load_prior(copied).fingerprint() == load_prior(dit_folder).fingerprint()


def test_a_random_dit(dit_folder, randn):
    prior = load_prior(dit_folder)
    z, null = randn(2, 4, SIDE, SIDE).float(), prior.null(2)
    made = with_random_unet(prior, seed=0)
    assert not torch.allclose(made.denoise(z, 1, null), prior.denoise(z, 1, null))
    assert made.autoencoder is prior.autoencoder and torch.equal(made.null(2), null)
    drawn = with_random_weights(prior, seed=0)
    assert torch.equal(drawn.denoise(z, 1, null), made.denoise(z, 1, null)) and not torch.equal(drawn.null(2), null)


# files that are not what they should be


def test_pickled_weights_are_read_without_executing_them(dit_folder, tmp_path):
    folder = write(tmp_path / "pickled", safe_serialization=False)
    assert load_prior(folder).fingerprint() == load_prior(dit_folder).fingerprint()

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"encoder.conv_in.weight": Runs()}, folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled cannot be used"):
        load_prior(folder)
    assert not (tmp_path / "ran").exists()


def test_tensors_that_are_missing_or_unknown_are_named(copied):
    file = copied / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["blocks.0.weight"] = state.pop("proj_out_1.weight")
    save_file(state, file)
    with pytest.raises(ValueError, match="1 tensors missing: proj_out_1.weight; 1 tensors unknown: blocks.0.weight"):
        load_prior(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(unet=make_unet(), embedding=embeddings()[:, :7].clone()), r"the shape \(11, 7\).*\(classes \+ 1, 8\)"),
        (
            dict(unet=make_unet(class_embed_type="identity"), embedding=embeddings()),
            "unet/config.json has class_embed_type",
        ),
        (dict(unet=make_unet(num_class_embeds=3), embedding=embeddings()), "num_class_embeds, a condition that cannot"),
        (dict(unet=make_unet()), EMBEDDER),
        (dict(unet=make_unet(in_channels=9), embedding=embeddings()), "takes 9 channels and gives 4, latents have 4"),
        (dict(autoencoder=diffusers.AutoencoderTiny()), "AutoencoderTiny.*must be VQModel or AutoencoderKL"),
        (dict(autoencoder=make_autoencoder(latents_mean=(0.1,) * 4)), "channel by channel"),
        (dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatchEuler.*must be a schedule of betas"),
        (dict(scheduler=DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")), "no signal is left"),
        (dict(scheduler=DDIMScheduler(timestep_spacing="karras")), "'karras'.* one of leading, trailing, linspace"),
        (dict(scheduler=DDIMScheduler(steps_offset=-1)), "steps_offset -1: must be .* a whole number from 0"),
        (
            dict(scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")),
            "'flow_prediction'.* must be .* epsilon, v_prediction, sample",
        ),
    ],
)
def test_what_no_prior_can_be_made_of(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_prior(write(tmp_path / "other", **changes))


def test_a_hub_id_without_a_network(dit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load_prior("facebook/DiT-XL-2-256")
    for part in ("Without a network", "transformer/", "scheduler_config.json", "vae/"):
        assert part in str(caught.value)
    kept = tmp_path / "models--facebook--DiT-XL-2-256"  # as the hub's own library keeps what it has fetched
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("f" * 40)
    shutil.copytree(dit_folder, kept / "snapshots" / ("f" * 40))
    assert load_prior("facebook/DiT-XL-2-256").fingerprint() == load_prior(dit_folder).fingerprint()


def test_only_the_parts_of_a_hub_repository_are_fetched(copied, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda hub_id, allow_patterns: asked.extend(allow_patterns) or copied
    )
    load_prior("someone/dit")
    assert "vae/diffusion_pytorch_model.safetensors*" in asked and not [name for name in asked if ".bin" in name]
    file = copied / "transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    load_prior("someone/dit")
    assert [name for name in asked if ".bin" in name] == ["transformer/diffusion_pytorch_model.bin"]


# a source and the data set


FITTING = dict(size_px=SIZE_PX, channels=3, labels=10, classes=None, subset=None)


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        (dict(subset="woof"), IMAGENET["woof"]),
        (dict(labels=1000), tuple(range(1000))),
        (dict(labels=2, classes=[7, 3]), (7, 3)),
        (dict(subset="woof", classes=range(10)), tuple(range(10))),
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
        (dict(), "the data set has 10 classes, dit 1000; list for each class"),
        (dict(classes=[1, 2]), "classes has 2 entries, but the data set has 10 classes"),
        (dict(labels=2, classes=[1, 1000]), r"classes=\[1000\]: the prior has no such classes, only 0 to 999"),
        (dict(subset="woof", size_px=64), "size_px=64: this prior takes 32"),
        (dict(subset="woof", channels=1), "channels=1: this prior has 3"),
    ],
)
def test_a_prior_that_does_not_fit_the_data_set(dit_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        fitted(load_prior(dit_folder), source="dit", **FITTING | changes)


def test_a_prior_without_classes_fits_any(tmp_path):
    prior = load_prior(write(tmp_path / "unet", unet=make_unet(kind=UNet2DModel, attention_head_dim=4)))
    assert fitted(prior, source="unet", **FITTING) == (prior, ())
    with pytest.raises(ValueError, match=r"classes=\[1\], but unet has no classes: must be None"):
        fitted(prior, source="unet", **FITTING | {"classes": [1]})


def test_a_link_stands_for_its_source_until_that_changes(copied, tmp_path):
    folder = tmp_path / "runs/prior"
    link_prior(folder, source=str(copied), **FITTING | {"subset": "woof"})
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 10_000
    assert linked_source(folder) == str(copied) and linked_source(copied) is None
    expected = with_classes(load_prior(copied), IMAGENET["woof"])
    assert load_prior(folder).fingerprint() == expected.fingerprint()
    DDIMScheduler(timestep_spacing="trailing").save_pretrained(copied / "scheduler")
    with pytest.raises(ValueError, match="copied has changed since .*write the link again"):
        load_prior(folder)
    shutil.rmtree(copied)
    with pytest.raises(FileNotFoundError, match="no prior in .*copied"):
        load_prior(folder)
    for content in ("{}", '{"source": 1, "classes": ["a"], "sha256": ""}', "[]", "no JSON"):
        (folder / "source.json").write_text(content)
        with pytest.raises(ValueError, match="source.json is broken"):
            load_prior(folder)


def test_only_what_can_be_read_again_is_written(dit_folder, tmp_path):
    others = replace(make_prior(), prediction="sample"), replace(make_prior(), spacing=Spacing("trailing"))
    for prior in (load_prior(dit_folder), *others):
        with pytest.raises(ValueError, match="only priors with the noise schedule of cin256-v2 are written"):
            save_prior(prior, tmp_path / "prior")


# from end to end


def test_a_link_to_a_compvis_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(compvis.load_checkpoint.__kwdefaults__, "kind", SMALL)
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": original(SMALL).state_dict()}, file)
    link_prior(tmp_path / "prior", source=str(file), **FITTING | {"classes": range(10)})
    assert load_prior(tmp_path / "prior").fingerprint() == load_prior(file).fingerprint()


def test_a_set_is_distilled_through_a_prior_from_elsewhere(dit_folder, tmp_path, monkeypatch):
    source = dit_folder
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    overrides = {
        "prior.source": str(source),
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
    with pytest.raises(
        ValueError, match=f"prior.source is {source}, but .*prior holds no such prior: `dvc repro prior`"
    ):
        _ = Experiment(load_params(overrides)).prior
    for name in ("00_prior", "02_distill"):
        run_notebook(PROFILES.parent / f"notebooks/{name}.ipynb", {"overrides": overrides})
    tensors, record = read_artefact(cell_of(load_params(), "dm-ld3m-1").artefact(0))
    whole = load_prior(source)
    assert record["configuration"]["prior_sha256"] == with_classes(whole, [7, 2]).fingerprint()
    started = whole.embed(torch.tensor([7, 2]))
    assert relative_difference(tensors["c"], started) < 0.1
    assert all(step[f"grad_norm_{name}"] > 0 for step in record["history"] for name in ("z", "c"))
    assert json.loads((runs_path("mnist5k", "prior-check") / "check.json").read_text())["samples"] == 2
    for kept, is_replayed in ((0, True), (1, False)):
        used = Experiment(load_params(overrides | {"spaces.ld3m.uncheckpointed_steps": kept})).prior
        assert bool(used.recordings) == is_replayed
    drawn = Experiment(load_params(overrides | {"spaces.ld3m.prior": "all_random"})).prior
    assert drawn.classes == 2 and not torch.equal(drawn.embed(torch.tensor([0])), started[:1])
    with pytest.raises(ValueError, match=f"prior.source is None, but .* holds {source}: `dvc repro prior` first"):
        _ = Experiment(load_params(overrides | {"prior.source": None, "prior.classes": None})).prior
