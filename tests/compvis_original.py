"""CompVis's latent diffusion model in plain torch, written from its published definition to compare ours with.

The names of the tensors are those of its checkpoints, and nothing of diffusers is used. `LatentDiffusion(...)` has
`unet(x, t, context)`, `encode(pixels)`, `quantize(z)` and `decode(z)`.
"""

import math

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate, pad, silu


def norm(channels, eps):
    return nn.GroupNorm(32, channels, eps=eps)


def timestep_embedding(t, width):
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2).float() / (width // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, inputs, outputs, time_width):
        super().__init__()
        self.in_layers = nn.Sequential(norm(inputs, 1e-5), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, outputs))
        self.out_layers = nn.Sequential(
            norm(outputs, 1e-5), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time, context):
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    def __init__(self, width, context_width):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x, context):
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        weight = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # one head
        return self.to_out(weight @ v)


class Geglu(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width, context_width):
        super().__init__()
        self.attn1 = CrossAttention(width, width)
        self.ff = nn.ModuleDict({"net": nn.Sequential(Geglu(width), nn.Dropout(0.0), nn.Linear(4 * width, width))})
        self.attn2 = CrossAttention(width, context_width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context):
        normed = self.norm1(x)
        x = self.attn1(normed, normed) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff.net(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, channels, context_width):
        super().__init__()
        self.norm = norm(channels, 1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_width)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, time, context):
        b, c, h, w = x.shape
        tokens = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.mT.reshape(b, c, h, w))


class Resample(nn.Module):
    """Halves the resolution under the name `op`, doubles it under `conv`."""

    def __init__(self, name, channels):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(channels, channels, 3, stride=2 if name == "op" else 1, padding=1))

    def forward(self, x, time, context):
        return self.op(x) if self.name == "op" else self.conv(interpolate(x, scale_factor=2, mode="nearest"))


class Plain(nn.Conv2d):
    def forward(self, x, time, context):
        return super().forward(x)


class UNet(nn.Module):
    def __init__(self, widths, context_width):
        super().__init__()
        width, time_width = widths[0], 4 * widths[0]
        self.width = width

        def attention(inputs):
            return SpatialTransformer(inputs, context_width)

        self.time_embed = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        blocks, skips, now = [[Plain(3, width, 3, padding=1)]], [width], width
        for level, outputs in enumerate(widths):
            for _ in range(2):
                residual, now = ResBlock(now, outputs, time_width), outputs
                blocks.append([residual, attention(now)] if level else [residual])
                skips.append(now)
            if level < len(widths) - 1:
                blocks.append([Resample("op", now)])
                skips.append(now)
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        first, last = ResBlock(now, now, time_width), ResBlock(now, now, time_width)
        self.middle_block = nn.ModuleList([first, attention(now), last])
        blocks = []
        for level, outputs in reversed(list(enumerate(widths))):
            for block in range(3):
                residual, now = ResBlock(now + skips.pop(), outputs, time_width), outputs
                blocks.append([residual, attention(now)] if level else [residual])
                blocks[-1] += [Resample("conv", now)] if level and block == 2 else []
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.out = nn.Sequential(norm(now, 1e-5), nn.SiLU(), nn.Conv2d(now, 3, 3, padding=1))

    def forward(self, x, t, context):
        time = self.time_embed(timestep_embedding(t, self.width).to(x))
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, time, context)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, time, context)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in block:
                x = layer(x, time, context)
        return self.out(x)


class ResnetBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs, 1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs, 1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (projection(normed).flatten(2) for projection in (self.q, self.k, self.v))  # (b, c, hw)
        weight = (q.mT @ k * x.shape[1] ** -0.5).softmax(-1)  # (b, queries, keys)
        return x + self.proj_out((v @ weight.mT).reshape(x.shape))


class Sampler(nn.Module):
    def __init__(self, channels, *, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        return self.conv(pad(x, (0, 1, 0, 1)) if self.down else interpolate(x, scale_factor=2, mode="nearest"))


def middle(channels):
    first, last = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
    return nn.ModuleDict({"block_1": first, "attn_1": AttnBlock(channels), "block_2": last})


def level(inputs, outputs, *, blocks, resample):
    block = nn.ModuleList([ResnetBlock(outputs if i else inputs, outputs) for i in range(blocks)])
    further = {resample: Sampler(outputs, down=resample == "downsample")} if resample else {}
    return nn.ModuleDict({"block": block} | further)


def run(x, modules):
    """Apply modules in their order, those within lists and dictionaries too."""
    for module in modules:
        if isinstance(module, nn.ModuleDict):
            x = run(x, module.values())
        else:
            x = run(x, module) if isinstance(module, nn.ModuleList) else module(x)
    return x


class Encoder(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, now, last = nn.ModuleList(), widths[0], len(widths) - 1
        for k, width in enumerate(widths):
            self.down.append(level(now, width, blocks=2, resample="downsample" if k < last else None))
            now = width
        self.mid = middle(now)
        self.norm_out, self.conv_out = norm(now, 1e-6), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x):
        return self.conv_out(silu(self.norm_out(run(x, [self.conv_in, self.down, self.mid]))))


class Decoder(nn.Module):
    def __init__(self, widths):
        super().__init__()
        now, levels = widths[-1], []
        self.conv_in, self.mid = nn.Conv2d(3, now, 3, padding=1), middle(now)
        for k in reversed(range(len(widths))):
            levels.insert(0, level(now, widths[k], blocks=3, resample="upsample" if k else None))
            now = widths[k]
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(now, 1e-6), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, z):
        return self.conv_out(silu(self.norm_out(run(z, [self.conv_in, self.mid, *reversed(self.up)]))))


class LatentDiffusion(nn.Module):
    def __init__(self, unet_widths, classes, context_width, first_stage_widths, codebook):
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": UNet(unet_widths, context_width)})
        self.first_stage_model = nn.ModuleDict(
            {
                "encoder": Encoder(first_stage_widths),
                "decoder": Decoder(first_stage_widths),
                "quantize": nn.ModuleDict({"embedding": nn.Embedding(codebook, 3)}),
                "quant_conv": nn.Conv2d(3, 3, 1),
                "post_quant_conv": nn.Conv2d(3, 3, 1),
            }
        )
        self.cond_stage_model = nn.ModuleDict({"embedding": nn.Embedding(classes + 1, context_width)})

    def unet(self, x, t, context=None):
        return self.model.diffusion_model(x, t, context)

    def encode(self, pixels):
        return self.first_stage_model.quant_conv(self.first_stage_model.encoder(pixels))

    def quantize(self, z):
        codes = self.first_stage_model.quantize.embedding.weight
        flat = z.movedim(1, -1).reshape(-1, z.shape[1])
        squares = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
        return codes[squares.argmin(1)].reshape(z.movedim(1, -1).shape).movedim(-1, 1)

    def decode(self, z):
        return self.first_stage_model.decoder(self.first_stage_model.post_quant_conv(self.quantize(z)))
