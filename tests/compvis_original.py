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
    def __init__(self, *, channels, width, multipliers, context_width, blocks=2):
        super().__init__()
        time_width = 4 * width
        self.width = width

        def attention(inputs):
            return SpatialTransformer(inputs, context_width)

        self.time_embed = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.input_blocks = nn.ModuleList([nn.ModuleList([Plain(channels, width, 3, padding=1)])])
        skips, now = [width], width
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                layers = [ResBlock(now, multiplier * width, time_width)]
                now = multiplier * width
                layers += [attention(now)] if level else []
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(now)
            if level < len(multipliers) - 1:
                self.input_blocks.append(nn.ModuleList([Resample("op", now)]))
                skips.append(now)
        self.middle_block = nn.ModuleList(
            [ResBlock(now, now, time_width), attention(now), ResBlock(now, now, time_width)]
        )
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(blocks + 1):
                layers = [ResBlock(now + skips.pop(), multiplier * width, time_width)]
                now = multiplier * width
                layers += [attention(now)] if level else []
                layers += [Resample("conv", now)] if level and block == blocks else []
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(norm(now, 1e-5), nn.SiLU(), nn.Conv2d(now, channels, 3, padding=1))

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


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    def __init__(self, inputs, outputs, blocks, resample):
        super().__init__()
        self.block = nn.ModuleList([ResnetBlock(outputs if i else inputs, outputs) for i in range(blocks)])
        if resample:
            self.add_module(resample, Sampler(outputs, down=resample == "downsample"))
        self.resample = resample

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return getattr(self, self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    def __init__(self, *, channels, z_channels, widths, blocks=2):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, now = nn.ModuleList(), widths[0]
        for level, width in enumerate(widths):
            self.down.append(Level(now, width, blocks, "downsample" if level < len(widths) - 1 else None))
            now = width
        self.mid = Middle(now)
        self.norm_out, self.conv_out = norm(now, 1e-6), nn.Conv2d(now, z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, *, channels, z_channels, widths, blocks=2):
        super().__init__()
        now = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(z_channels, now, 3, padding=1), Middle(now)
        levels = []
        for level in reversed(range(len(widths))):
            levels.insert(0, Level(now, widths[level], blocks + 1, "upsample" if level else None))
            now = widths[level]
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(now, 1e-6), nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))


class LatentDiffusion(nn.Module):
    def __init__(self, *, width, multipliers, classes, context_width, first_stage_widths, codebook):
        super().__init__()
        unet = UNet(channels=3, width=width, multipliers=multipliers, context_width=context_width)
        self.model = nn.ModuleDict({"diffusion_model": unet})
        self.first_stage_model = nn.ModuleDict(
            {
                "encoder": Encoder(channels=3, z_channels=3, widths=first_stage_widths),
                "decoder": Decoder(channels=3, z_channels=3, widths=first_stage_widths),
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
