"""Priors of diffusers' own models compute what diffusers does with them."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import relative_difference
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from tiny_priors import SIDE, SIZE_PX, embeddings, make_autoencoder, make_dit, make_unet, write

from ld3m.method.sampler import reverse, timesteps
from ld3m.models.prior_io import load_prior

SPACINGS = [  # as DiT-XL/2 has it, as CompVis, as Stable Diffusion's successors, and what is left
    dict(),
    dict(steps_offset=1, set_alpha_to_one=False),
    dict(timestep_spacing="trailing"),
    dict(timestep_spacing="trailing", set_alpha_to_one=False),
    dict(timestep_spacing="linspace", steps_offset=1),
    dict(steps_offset=3),
]


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


@pytest.mark.parametrize("is_dit", [True, False])
def test_the_gradient_for_the_conditioning_equals_finite_differences(dit_folder, tmp_path, randn, is_dit):
    folder = dit_folder if is_dit else write(tmp_path / "unet", unet=make_unet(), embedding=embeddings())
    prior, z_t, t = load_prior(folder).to(torch.float64), randn(2, 4, SIDE, SIDE), torch.tensor([101, 901])
    c = prior.embed(torch.tensor([0, 9])).requires_grad_()
    for prediction in ("epsilon", "v_prediction", "sample"):
        denoise = partial(replace(prior, prediction=prediction).denoise, z_t, t)
        assert torch.autograd.gradcheck(denoise, [c], atol=1e-12, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_guided_samples_are_those_of_the_pipeline_of_diffusers(dit_folder, tmp_path, prediction):
    folder = shutil.copytree(dit_folder, tmp_path / "dit")
    DDIMScheduler(prediction_type=prediction, clip_sample=False).save_pretrained(folder / "scheduler")
    prior = load_prior(folder).to(torch.float64)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)  # DiT's, in float64
    dit = DiTTransformer2DModel.from_pretrained(folder / "transformer").double()
    pipeline = DiTPipeline(dit, AutoencoderKL.from_pretrained(folder / "vae").double(), scheduler)
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
    c, labels = embeddings().double(), torch.tensor([9, 2])
    with torch.no_grad():
        ours = reverse(prior, state, prior.embed(labels), z=state, steps=5, guidance=1, skip="none")
        for t in scheduler.timesteps.tolist():
            state = scheduler.step(unet(state, t, c[labels][:, None]).sample, t, state).prev_sample
    assert (len(prior.alpha_bar), prior.classes) == (400, 10)
    assert relative_difference(ours, state) < 1e-10


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_timesteps_are_those_of_the_scheduler_in_the_folder(dit_copy, spacing):
    scheduler = DDIMScheduler(**spacing)
    scheduler.save_pretrained(dit_copy / "scheduler")
    prior = load_prior(dit_copy)
    for steps in (1, 2, 3, 7, 20, 250, 1000):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()[::-1]
        if expected[-1] < 1000:
            assert timesteps(steps, total=1000, spacing=prior.spacing) == expected
        else:
            with pytest.raises(ValueError, match=f"steps={steps}: .* into the 1000 timesteps .*from [13]"):
                timesteps(steps, total=1000, spacing=prior.spacing)
    assert prior.spacing.ends_clean == scheduler.config.set_alpha_to_one


@pytest.mark.parametrize("shift", [None, 0.2])
def test_an_autoencoder_with_a_posterior(tmp_path, randn, shift):
    vae = make_autoencoder(shift_factor=shift)
    prior = load_prior(write(tmp_path / "dit", unet=make_dit(classes=3), autoencoder=vae)).to(torch.float64)
    vae, pixels = vae.double(), randn(2, 3, SIZE_PX, SIZE_PX).clamp(-1, 1)
    z = prior.encode(pixels)
    torch.testing.assert_close(z, 0.3 * (vae.quant_conv(vae.encoder(pixels))[:, :4] - (shift or 0)))
    assert prior.quantize(z) is z
    expected = vae.decoder(vae.post_quant_conv(z / 0.3 + (shift or 0)))
    torch.testing.assert_close(prior.decode(z), expected)


def test_a_prior_without_classes_and_a_quantizer_of_another_width(tmp_path, randn):
    unet, vq = make_unet(kind=UNet2DModel), make_autoencoder(VQModel, latent_channels=6, vq_embed_dim=4)
    prior = load_prior(write(tmp_path / "unet", unet=unet, autoencoder=vq)).to(torch.float64)
    assert prior.encode(randn(1, 3, 64, 64)).shape == (1, *prior.latent_shape(64)) == (1, 4, 16, 16)
    z_t, c = randn(2, 4, SIDE, SIDE), prior.null(2).clone().requires_grad_()
    predicted = prior.denoise(z_t, 5, c)  # where a tensor lies in memory decides its last bit on some CPUs
    torch.testing.assert_close(predicted, unet.double()(z_t, 5).sample, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(predicted.sum(), c)
    assert not prior.is_conditional and torch.equal(gradient, torch.zeros(2, 1, 1))


def test_the_names_in_released_models(dit_folder, dit_copy):
    """DiT-XL/2 calls itself Transformer2DModel, and its autoencoder has former names of attention."""
    config = json.loads((dit_copy / "transformer/config.json").read_text())
    (dit_copy / "transformer/config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    file, former = dit_copy / "vae/diffusion_pytorch_model.safetensors", {}
    for key, tensor in load_file(file).items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        former[key] = tensor
    assert any("query" in key for key in former)
    save_file(former, file, metadata={"format": "pt"})
    assert load_prior(dit_copy).fingerprint() == load_prior(dit_folder).fingerprint()
