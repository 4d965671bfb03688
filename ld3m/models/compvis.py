"""Original latent-diffusion checkpoints of CompVis, `model.ckpt`, as a prior.

    python -m ld3m.models.compvis model.ckpt FOLDER          once, for `load_prior`: in float32
    python -m ld3m.models.compvis model.ckpt FOLDER half     half the size

FOLDER is a new one, or that of an earlier prior, which is replaced. `prior.source` in params.yaml may name either, the
file or the folder.

`cin256-v2`, conditional on ImageNet's 1000 classes (`diffusion.with_classes` takes those of a subset), and
`ffhq-ldm-vq-4`, without classes; the models of CelebA-HQ and of LSUN bedrooms with VQ-f4 are of the second kind too.
Which one a file holds is seen from its shapes.

Nothing in the file is executed. Files saved during training also hold objects of PyTorch Lightning: these, and what
they keep in numpy or omegaconf, are read as inert placeholders and dropped; any other object is refused.

Where a file holds a moving average of the U-Net (`model_ema`) it is the one taken, as CompVis's own sampling does; with
`weights="model"` the U-Net of the last training step is taken.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ld3m.models.diffusion_prior import Prior, cin256_alpha_bar, spread_codes
from ld3m.runtime.seeds import forked

Weights = Literal["auto", "ema", "model"]

HARMLESS = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.")  # of these modules, nothing is imported either
SCHEDULE = {  # the buffers that the schedule leaves, none of which is read but `alphas_cumprod` and `scale_factor`
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "logvar", "cond_ids", "scale_factor"),
}
COUNTERS = {"model_ema.decay", "model_ema.num_updates"}  # of the moving average
# The loss of the autoencoder, which needs no list here: no name in it could be of the prior.
LOSS = tuple(f"first_stage_model.loss.{part}" for part in ("discriminator.", "perceptual_loss.", "logvar"))
LISTED = 20  # keys that an error names of a file of another kind
UNET, AUTOENCODER, EMBEDDER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@dataclass(frozen=True)
class Kind:
    """What the shapes and the arithmetic of a checkpoint follow from. Norms have 32 groups, levels two blocks; the
    U-Net attends below its first level, in one head or in heads of `head_width` channels."""

    unet_widths: tuple[int, ...]  # model_channels times channel_mult
    classes: int = 0  # without the null class; 0: the U-Net takes no conditioning
    conditioning_width: int = 1
    head_width: int | None = None  # None: one head, of any width
    autoencoder_widths: tuple[int, ...] = (128, 256, 512)  # ch times ch_mult
    latent_channels: int = 3
    codebook: int = 8192


KINDS = {
    "cin256-v2": Kind(unet_widths=(192, 384, 576, 960), classes=1000, conditioning_width=512),
    "ffhq-ldm-vq-4": Kind(unet_widths=(224, 448, 672, 896), head_width=32),
}
LAYERS = 2  # num_res_blocks


def build_full_size(kind: str, *, seed: int) -> Prior:
    """A frozen prior with random weights, float32, of the size of a released checkpoint: 1.8 GB for `cin256-v2`."""
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
    return build(KINDS[kind], seed=seed)


def build(kind: Kind, *, seed: int) -> Prior:
    """A frozen prior with random weights, float32."""
    with forked(seed, "compvis"):
        prior = Prior(*_modules(kind, scale=1.0), cin256_alpha_bar()).freeze_()
        spread_codes(prior.autoencoder)
    return prior


def load_checkpoint(file: Path, *, kind: Kind | None = None, weights: Weights = "auto") -> Prior:
    """The prior in a CompVis checkpoint, frozen, in float32 on the CPU.

    `kind` None is that of `KINDS` which the file's shapes show. `weights="auto"` takes the moving average of the U-Net
    where the file holds one, `"ema"` insists on it, `"model"` takes the trained U-Net itself.
    ValueError for a broken or foreign file, for one that holds code, and for missing, unknown or misshapen tensors,
    which it lists.
    """
    if weights not in ("auto", "ema", "model"):
        raise ValueError(f"weights = {weights!r}: must be 'auto', 'ema' or 'model'")
    state = _read(Path(file))
    kind = kind or _infer(state, file)
    with torch.device("meta"):
        modules = _modules(kind, scale=float(state.get("scale_factor", 1.0)))
    has_average = any(key.startswith("model_ema.diffusion_model") for key in state)
    average = weights == "ema" or weights == "auto" and has_average
    sources = [
        {key: _source(prefix, key, kind) for key in module.state_dict()}
        for prefix, module in zip((UNET, AUTOENCODER, EMBEDDER), modules, strict=True)
    ]
    if not kind.classes:
        sources[-1] = {}
    known = {source.key for part in sources for source in part.values()} | SCHEDULE | COUNTERS
    known |= {_average(source.key) for source in sources[0].values()}
    if average:
        sources[0] = {key: source._replace(key=_average(source.key)) for key, source in sources[0].items()}
    _check(file, state, modules, sources, known)
    for module, part in zip(modules, sources, strict=True):
        tensors = {key: source.take(state[source.key], kind.head_width) for key, source in part.items()}
        module.load_state_dict(
            {
                key: tensors[key].reshape(empty.shape).float().clone() if key in tensors else torch.zeros(empty.shape)
                for key, empty in module.state_dict().items()
            },
            assign=True,
        )
    return Prior(*modules, cin256_alpha_bar()).freeze_()


def _modules(kind: Kind, *, scale: float) -> tuple[nn.Module, nn.Module, nn.Embedding]:
    """U-Net, autoencoder and class embeddings, with the modules' own initialisation."""
    from diffusers import UNet2DConditionModel, UNet2DModel, VQModel

    lower = len(kind.unet_widths) - 1  # levels that attend
    attending = "CrossAttn{}Block2D" if kind.classes else "Attn{}Block2D"
    shared = dict(
        sample_size=64,
        in_channels=kind.latent_channels,
        out_channels=kind.latent_channels,
        down_block_types=("DownBlock2D",) + (attending.format("Down"),) * lower,
        up_block_types=(attending.format("Up"),) * lower + ("UpBlock2D",),
        block_out_channels=kind.unet_widths,
        layers_per_block=LAYERS,
        norm_num_groups=32,
    )
    if kind.classes:  # which diffusers gives the number of heads by the name of their width
        unet = UNet2DConditionModel(**shared, cross_attention_dim=kind.conditioning_width, attention_head_dim=1)
        embedding = nn.Embedding(kind.classes + 1, kind.conditioning_width)
    else:
        unet = UNet2DModel(**shared, attention_head_dim=kind.head_width)
        embedding = nn.Embedding.from_pretrained(torch.zeros(1, 1))
    levels = len(kind.autoencoder_widths)
    autoencoder = VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=kind.autoencoder_widths,
        layers_per_block=LAYERS,
        latent_channels=kind.latent_channels,
        sample_size=256,
        num_vq_embeddings=kind.codebook,
        norm_num_groups=32,
        scaling_factor=scale,
    )
    return unet, autoencoder, embedding


# names


class Source(NamedTuple):
    """Where a tensor of ours is in the checkpoint."""

    key: str
    kernel: int = 0  # axes of length one that it has there and not here: a linear map written as a 1x1 convolution
    third: int | None = None  # which of the queries, keys and values (0, 1, 2), where one tensor holds the three

    def shape(self, ours: torch.Size) -> torch.Size:
        return torch.Size([ours[0] * (1 if self.third is None else 3), *ours[1:], *[1] * self.kernel])

    def take(self, theirs: Tensor, head_width: int | None) -> Tensor:
        """The queries, keys and values lie head by head: (heads, 3, head_width, ...)."""
        if self.third is None:
            return theirs
        return theirs.unflatten(0, (-1, 3, head_width))[:, self.third]


UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
PLAIN_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
FIRST_STAGE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _source(prefix: str, key: str, kind: Kind) -> Source:
    """Of a key of our U-Net, autoencoder or embedding, which of the three `prefix` says."""
    module, _, leaf = key.rpartition(".")
    if prefix == EMBEDDER:
        return Source(f"{prefix}embedding.{leaf}")
    if prefix == UNET:
        module, kernel, third = _unet_module(module)
    else:
        module, kernel, third = _first_stage_module(module, levels=len(kind.autoencoder_widths))
    return Source(f"{prefix}{module}.{leaf}", kernel if leaf == "weight" else 0, third)


def _unet_module(module: str) -> tuple[str, int, int | None]:
    """The module's name in the checkpoint, and the last two fields of its `Source`."""
    if module in UNET_ENDS:
        return UNET_ENDS[module], 0, None
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        what, j, rest = found.groups()
        place = f"middle_block.{2 * int(j) if what == 'resnets' else 1}"
    else:
        side, i, what, j, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", module).groups()
        # input block 0 is the first convolution; then every level has its blocks, and one that halves the resolution
        number = int(i) * (LAYERS + 1) + (int(j) if what in ("resnets", "attentions") else LAYERS)
        place = f"input_blocks.{1 + number}" if side == "down" else f"output_blocks.{number}"
        place += {"resnets": ".0", "attentions": ".1", "downsamplers": ".0", "upsamplers": ".2"}[what]
    if what == "resnets":
        return f"{place}.{UNET_RESNET[rest]}", 0, None
    if what == "downsamplers":
        return f"{place}.op", 0, None
    if what == "attentions" and rest in PLAIN_ATTENTION:
        third = {"to_q": 0, "to_k": 1, "to_v": 2}.get(rest)
        return f"{place}.{PLAIN_ATTENTION[rest]}", 0 if rest == "group_norm" else 1, third
    return f"{place}.{rest}", 0, None  # the transformers have the same names


def _first_stage_module(module: str, *, levels: int) -> tuple[str, int, int | None]:
    module = re.sub(r"\.mid_block\.resnets\.(\d)", lambda found: f".mid.block_{int(found[1]) + 1}", module)
    module = re.sub(r"\.down_blocks\.(\d)", r".down.\1", module)
    module = re.sub(r"\.up_blocks\.(\d)", lambda found: f".up.{levels - 1 - int(found[1])}", module)
    module = re.sub(r"\.resnets\.", ".block.", module)
    module = re.sub(r"\.(down|up)samplers\.0", r".\1sample", module)
    module = module.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", module):
        return f"{found[1]}.mid.attn_1.{FIRST_STAGE_ATTENTION[found[2]]}", 0 if found[2] == "group_norm" else 2, None
    return module, 0, None


def _average(key: str) -> str:
    """The moving average of a tensor of the U-Net: CompVis keeps it under the name without dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


# files


class _Placeholder:
    """Stands for an object of the training program: takes anything, does nothing."""

    def __new__(cls, *args: Any, **options: Any) -> "_Placeholder":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: place the model.ckpt of a released latent diffusion model there")
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in objects if not name.startswith(HARMLESS))
        if not refused:
            placeholders = [(type("Placeholder", (_Placeholder,), {}), name) for name in objects]
            with torch.serialization.safe_globals(placeholders):
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # broken files raise about anything; torch's own message proposes to run the code
        with file.open("rb") as opened:
            older = "; one of PyTorch before 1.6 has to be saved anew" if opened.read(2) == b"\x80\x02" else ""
        raise ValueError(
            f"{file} is no checkpoint of PyTorch, or a broken one ({type(error).__name__}): download it again and "
            f"compare its size{older}"
        ) from error
    if refused:
        raise ValueError(
            f"{file} holds {_some(refused)}, which could run code and is no part of a latent diffusion model; nothing "
            "of it was run. If you trust the file, save its weights alone: "
            "torch.save({'state_dict': weights}, 'model.ckpt')"
        )
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) and _is_plain(tensor) for key, tensor in state.items()
    ):
        raise ValueError(f"{file} has no 'state_dict' of tensors: it is not a checkpoint of latent diffusion")
    scale = state.get("scale_factor", torch.ones(()))
    if scale.numel() != 1 or not 0 < scale.item() < float("inf"):
        raise ValueError(f"{file} has the scale_factor {scale.tolist()}, which must be one positive number")
    return state


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers are in the file: those of tensors on the device `meta` are not."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _infer(state: dict[str, Tensor], file: Path) -> Kind:
    first = state.get(f"{UNET}input_blocks.0.0.weight")
    width = len(first) if first is not None and first.ndim else None
    for kind in KINDS.values():
        if kind.unet_widths[0] == width:
            return kind
    seen = f"a U-Net {width} wide" if width else f"no U-Net, but {_some(sorted(state)) or 'nothing'}"
    known = ", ".join(f"{name} ({kind.unet_widths[0]} wide)" for name, kind in KINDS.items())
    raise ValueError(f"{file} holds {seen}; latent diffusion models that can be read are {known}")


def _check(
    file: Path,
    state: dict[str, Tensor],
    modules: tuple[nn.Module, ...],
    sources: list[dict[str, Source]],
    known: set[str],
) -> None:
    """Every tensor that is needed is there, finite and in its shape, nothing unknown is, and the noise schedule is
    ours."""
    wanted = {}
    for module, part in zip(modules, sources, strict=True):
        ours = module.state_dict()
        wanted |= {source.key: source.shape(ours[key].shape) for key, source in part.items()}
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unknown": [key for key in state if key not in wanted and key not in known and not key.startswith(LOSS)],
        "misshapen": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape
        ],
    }
    if not any(problems.values()):  # what follows reads the whole file
        problems["not finite"] = [key for key in wanted if not state[key].float().isfinite().all()]
    if any(problems.values()):
        lines = [f"{len(keys)} {name}: {', '.join(sorted(keys))}" for name, keys in problems.items() if keys]
        raise ValueError(f"{file} is not the latent diffusion model that it seems to be; " + "; ".join(lines))
    given, ours = state.get("alphas_cumprod"), cin256_alpha_bar()
    if given is not None and (given.shape != ours.shape or not torch.allclose(given.double(), ours, rtol=1e-3)):
        raise ValueError(
            f"{file} was trained with another noise schedule than 1000 steps, linear_start 0.0015, linear_end 0.0195: "
            "it cannot be used"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


if __name__ == "__main__":
    from ld3m.models.prior_io import require_own, save_prior  # which itself reads checkpoints

    try:
        match sys.argv[1:]:
            case [file, folder, *rest] if rest in ([], ["half"]):
                require_own(Path(folder))  # before a minute of reading
                save_prior(load_checkpoint(Path(file)), Path(folder), dtype=torch.float16 if rest else torch.float32)
                print(folder)
            case _:
                sys.exit(__doc__)
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
