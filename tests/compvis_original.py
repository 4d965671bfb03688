"""CompVis's latent diffusion model in plain torch, written from its published definition to compare ours with.

The names of the tensors are those of its checkpoints, and nothing of diffusers is used.
"""

import math

import torch
from torch.nn.functional import conv2d, gelu, group_norm, interpolate, layer_norm, linear, pad, silu


def timestep_embedding(t, width):
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2).float() / (width // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LatentDiffusion:
    """`state` has a random tensor for every name, drawn where it is first used, none at a value where a confusion of
    two tensors would not show."""

    def __init__(self, unet_widths, classes, context_width, first_stage_widths, codebook):
        self.unet_widths, self.first_stage_widths = unet_widths, first_stage_widths
        self.state = {
            "cond_stage_model.embedding.weight": torch.randn(classes + 1, context_width),
            "first_stage_model.quantize.embedding.weight": torch.randn(codebook, 3),
        }
        z = self.encode(torch.zeros(1, 3, 32, 32))
        self.decode(z)
        self.unet(z, torch.zeros(1), torch.zeros(1, 1, context_width))

    def double(self):
        self.state = {name: tensor.double() for name, tensor in self.state.items()}
        return self

    def drawn(self, name, *shape, center=0.0, spread=0.3):
        if name not in self.state:
            self.state[name] = center + spread * torch.randn(shape)
        return self.state[name]

    def linear(self, x, at, outputs, *, bias=True):
        weight = self.drawn(f"{at}.weight", outputs, x.shape[-1], spread=(3 * x.shape[-1]) ** -0.5)
        return linear(x, weight, self.drawn(f"{at}.bias", outputs) if bias else None)

    def conv(self, x, at, outputs, *, size=3, stride=1, padding=None):
        spread = (3 * x.shape[1] * size**2) ** -0.5
        weight = self.drawn(f"{at}.weight", outputs, x.shape[1], size, size, spread=spread)
        padding = size // 2 if padding is None else padding
        return conv2d(x, weight, self.drawn(f"{at}.bias", outputs), stride=stride, padding=padding)

    def norm(self, x, at, eps):
        weight, bias = self.drawn(f"{at}.weight", x.shape[1], center=1.0), self.drawn(f"{at}.bias", x.shape[1])
        return group_norm(x, 32, weight, bias, eps)

    def layer_norm(self, x, at):
        width = x.shape[-1]
        weight, bias = self.drawn(f"{at}.weight", width, center=1.0), self.drawn(f"{at}.bias", width)
        return layer_norm(x, (width,), weight, bias)

    def upsample(self, x, at):
        return self.conv(interpolate(x, scale_factor=2, mode="nearest"), at, x.shape[1])

    # U-Net

    def res_block(self, x, time, at, outputs):
        h = self.conv(silu(self.norm(x, f"{at}.in_layers.0", 1e-5)), f"{at}.in_layers.2", outputs)
        h = h + self.linear(silu(time), f"{at}.emb_layers.1", outputs)[:, :, None, None]
        h = self.conv(silu(self.norm(h, f"{at}.out_layers.0", 1e-5)), f"{at}.out_layers.3", outputs)
        return h + (x if x.shape[1] == outputs else self.conv(x, f"{at}.skip_connection", outputs, size=1))

    def cross_attention(self, x, context, at):
        width = x.shape[-1]
        q = self.linear(x, f"{at}.to_q", width, bias=False)
        k, v = (self.linear(context, f"{at}.{name}", width, bias=False) for name in ("to_k", "to_v"))
        weight = (q @ k.mT * width**-0.5).softmax(-1)  # one head
        return self.linear(weight @ v, f"{at}.to_out.0", width)

    def spatial_transformer(self, x, context, at):
        width, block = x.shape[1], f"{at}.transformer_blocks.0"
        tokens = self.conv(self.norm(x, f"{at}.norm", 1e-6), f"{at}.proj_in", width, size=1).flatten(2).mT
        normed = self.layer_norm(tokens, f"{block}.norm1")
        tokens = tokens + self.cross_attention(normed, normed, f"{block}.attn1")
        normed = self.layer_norm(tokens, f"{block}.norm2")
        tokens = tokens + self.cross_attention(normed, context, f"{block}.attn2")
        normed = self.layer_norm(tokens, f"{block}.norm3")
        hidden, gate = self.linear(normed, f"{block}.ff.net.0.proj", 8 * width).chunk(2, dim=-1)
        tokens = tokens + self.linear(hidden * gelu(gate), f"{block}.ff.net.2", width)
        return x + self.conv(tokens.mT.reshape(x.shape), f"{at}.proj_out", width, size=1)

    def unet(self, x, t, context):
        root, widths = "model.diffusion_model", self.unet_widths
        time = self.linear(timestep_embedding(t, widths[0]).to(x), f"{root}.time_embed.0", 4 * widths[0])
        time = self.linear(silu(time), f"{root}.time_embed.2", 4 * widths[0])

        def block(x, at, level):
            x = self.res_block(x, time, f"{at}.0", widths[level])
            return self.spatial_transformer(x, context, f"{at}.1") if level else x

        kept = [self.conv(x, f"{root}.input_blocks.0.0", widths[0])]
        for level, width in enumerate(widths):
            for _ in range(2):
                kept.append(block(kept[-1], f"{root}.input_blocks.{len(kept)}", level))
            if level < len(widths) - 1:
                kept.append(self.conv(kept[-1], f"{root}.input_blocks.{len(kept)}.0.op", width, stride=2))
        x = block(kept[-1], f"{root}.middle_block", len(widths) - 1)
        x = self.res_block(x, time, f"{root}.middle_block.2", widths[-1])
        for k in range(3 * len(widths)):
            level, at = len(widths) - 1 - k // 3, f"{root}.output_blocks.{k}"
            x = block(torch.cat([x, kept.pop()], dim=1), at, level)
            if level and k % 3 == 2:
                x = self.upsample(x, f"{at}.2.conv")
        return self.conv(silu(self.norm(x, f"{root}.out.0", 1e-5)), f"{root}.out.2", 3)

    # Autoencoder

    def resnet_block(self, x, at, outputs):
        h = self.conv(silu(self.norm(x, f"{at}.norm1", 1e-6)), f"{at}.conv1", outputs)
        h = self.conv(silu(self.norm(h, f"{at}.norm2", 1e-6)), f"{at}.conv2", outputs)
        return h + (x if x.shape[1] == outputs else self.conv(x, f"{at}.nin_shortcut", outputs, size=1))

    def attn_block(self, x, at):
        width, normed = x.shape[1], self.norm(x, f"{at}.norm", 1e-6)
        q, k, v = (self.conv(normed, f"{at}.{name}", width, size=1).flatten(2) for name in "qkv")  # (b, c, hw)
        weight = (q.mT @ k * width**-0.5).softmax(-1)  # (b, queries, keys)
        return x + self.conv((v @ weight.mT).reshape(x.shape), f"{at}.proj_out", width, size=1)

    def middle(self, x, at):
        x = self.resnet_block(x, f"{at}.block_1", x.shape[1])
        return self.resnet_block(self.attn_block(x, f"{at}.attn_1"), f"{at}.block_2", x.shape[1])

    def encode(self, x):
        root, widths = "first_stage_model.encoder", self.first_stage_widths
        x = self.conv(x, f"{root}.conv_in", widths[0])
        for level, width in enumerate(widths):
            for k in range(2):
                x = self.resnet_block(x, f"{root}.down.{level}.block.{k}", width)
            if level < len(widths) - 1:
                x = pad(x, (0, 1, 0, 1))
                x = self.conv(x, f"{root}.down.{level}.downsample.conv", width, stride=2, padding=0)
        x = self.middle(x, f"{root}.mid")
        x = self.conv(silu(self.norm(x, f"{root}.norm_out", 1e-6)), f"{root}.conv_out", 3)
        return self.conv(x, "first_stage_model.quant_conv", 3, size=1)

    def quantize(self, z):
        codes = self.state["first_stage_model.quantize.embedding.weight"]
        flat = z.movedim(1, -1).reshape(-1, z.shape[1])
        squares = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
        return codes[squares.argmin(1)].reshape(z.movedim(1, -1).shape).movedim(-1, 1)

    def decode(self, z):
        root, widths = "first_stage_model.decoder", self.first_stage_widths
        x = self.conv(self.quantize(z), "first_stage_model.post_quant_conv", 3, size=1)
        x = self.middle(self.conv(x, f"{root}.conv_in", widths[-1]), f"{root}.mid")
        for level in reversed(range(len(widths))):
            for k in range(3):
                x = self.resnet_block(x, f"{root}.up.{level}.block.{k}", widths[level])
            if level:
                x = self.upsample(x, f"{root}.up.{level}.upsample.conv")
        return self.conv(silu(self.norm(x, f"{root}.norm_out", 1e-6)), f"{root}.conv_out", 3)
