"""Tiny models of diffusers, none of whose weights is at a value where a confusion would not show."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel, VQModel
from safetensors.torch import save_file

SIZE_PX, SIDE = 32, 8  # of the images and latents


def make(kind, **given):
    """A model in evaluation mode, every weight away from where it is initialized; the same weights every time."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = kind(**given)
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def make_dit(*, classes=1000, share_tables=True):
    given = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2)
    dit = make(DiTTransformer2DModel, sample_size=SIDE, num_embeds_ada_norm=classes, **given)
    table, *others = [block.norm1.emb.class_embedder for block in dit.transformer_blocks]
    for other in others if share_tables else ():
        other.load_state_dict(table.state_dict())
    return dit


def make_unet(*, kind=UNet2DConditionModel, **changes):
    """A U-Net that attends to one class embedding of width 8; of another `kind`, without classes."""
    attends = kind is UNet2DConditionModel
    name = "CrossAttn{}Block2D" if attends else "Attn{}Block2D"
    given = dict(cross_attention_dim=8, attention_head_dim=2) if attends else dict(attention_head_dim=4)
    given |= dict(sample_size=SIDE, in_channels=4, out_channels=4, block_out_channels=(16, 16), norm_num_groups=8)
    given |= dict(down_block_types=("DownBlock2D", name.format("Down")), layers_per_block=1)
    return make(kind, up_block_types=(name.format("Up"), "UpBlock2D"), **given | changes)


def make_autoencoder(kind=AutoencoderKL, **changes):
    given = dict(block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.3)
    given |= dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    return make(kind, **given | changes)


def embeddings(classes=10):
    return torch.randn(classes + 1, 8, generator=torch.Generator().manual_seed(4))


def write(folder, *, unet=None, autoencoder=None, scheduler=None, embedding=None, **options):
    """A diffusers folder of parts, each in its usual place; by default those of the released DiT-XL/2."""
    unet, autoencoder = unet or make_dit(), autoencoder or make_autoencoder()
    unet.save_pretrained(folder / ("transformer" if isinstance(unet, DiTTransformer2DModel) else "unet"), **options)
    autoencoder.save_pretrained(folder / ("vqvae" if isinstance(autoencoder, VQModel) else "vae"), **options)
    (scheduler or DDPMScheduler()).save_pretrained(folder / "scheduler")
    if embedding is not None:
        (folder / "class_embedder").mkdir()
        save_file({"weight": embedding}, folder / "class_embedder/model.safetensors")
    return folder
