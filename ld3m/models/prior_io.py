"""Priors on disk: a diffusers folder or hub id, an original CompVis checkpoint, or what the stage `prior` left.

A diffusers folder holds, as diffusers writes them,

    unet/ or transformer/   a UNet2DConditionModel, UNet2DModel or DiTTransformer2DModel
    vqvae/ or vae/          a VQModel or AutoencoderKL
    scheduler/              the noise schedule, what the denoiser predicts, and the timesteps of sampling
    class_embedder/         for a UNet2DConditionModel: model.safetensors with `weight` (classes + 1, D), what it
                            attends to for every class, and last for the null class

The stage leaves such a folder, or `source.json`: it stands for a prior elsewhere, of which it has the fingerprint.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ld3m.data.images import is_path, some
from ld3m.data.subsets import IMAGENET, IMAGENET_CLASSES
from ld3m.models.compvis import load_checkpoint
from ld3m.models.diffusion_prior import (
    COMPVIS,
    DENOISERS,
    IncompatiblePrior,
    Prediction,
    Prior,
    Spacing,
    alpha_bar_of,
    cin256_alpha_bar,
    cin256_schedule,
    take_label_table,
    with_classes,
)
from ld3m.runtime import paths
from ld3m.runtime.storage import new_folder, write_json

if TYPE_CHECKING:
    from diffusers import ModelMixin

LINK = "source.json"
SPACINGS = ("leading", "trailing", "linspace")
AUTOENCODERS = ("VQModel", "AutoencoderKL")
FORMER = {"Transformer2DModel": "DiTTransformer2DModel"}  # what released DiT models call themselves
EMBEDDER = "class_embedder/model.safetensors"
PLACES = (("unet", "transformer"), ("vqvae", "vae"), ("scheduler",))
FURTHER = ("class_embed_type", "addition_embed_type", "encoder_hid_dim")  # conditioning of U-Nets
OWN = (  # the files of a prior that is written here
    *(f"{part}/config.json" for part in ("unet", "vqvae")),
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vqvae")),
    *("scheduler/scheduler_config.json", EMBEDDER, LINK),
)
WEIGHTS = ("config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*.safetensors")
LAYOUT = (
    "a diffusers folder has unet/ or transformer/, vqvae/ or vae/ (each with config.json and "
    f"diffusion_pytorch_model.safetensors), scheduler/scheduler_config.json and, for a U-Net with classes, {EMBEDDER}"
)
PIPELINE = "the embedded prior comes with `dvc pull prior`, `dvc repro -f prior` makes the pipeline's again"


def load_prior(source: str | Path) -> Prior:
    """The prior of any of the kinds above, frozen, in float32 on the CPU. Paths are relative to the repository.

    FileNotFoundError for what is not there, ValueError for what is broken or no such prior.
    """
    path = paths.ROOT / Path(source).expanduser()
    if path.is_file() or path.suffix == ".ckpt":
        return load_checkpoint(path)
    if (path / LINK).is_file():
        return _linked(path)
    return _read_folder(path if path.is_dir() or is_path(str(source), path) else _fetch(str(source)))


def fitting_prior(source: str, **fitting: Any) -> tuple[Prior, tuple[int, ...]]:
    """`fitted` of the prior of a source."""
    return fitted(load_prior(source), source=source, **fitting)


def fitted(
    prior: Prior,
    *,
    source: str,
    size_px: int,
    channels: int,
    labels: int,
    classes: Sequence[int] | None,
    subset: str | None,
) -> tuple[Prior, tuple[int, ...]]:
    """The prior with those of its classes that belong to a data set's `labels`, and their indices there.

    `classes` gives them; None takes those of `subset`, the name of a subset of ImageNet-1k, out of ImageNet's 1000, or
    all of a prior with as many classes as labels. ValueError, naming the `source`, where prior and data set do not fit.
    """
    if not prior.is_conditional:
        if classes is not None:
            raise ValueError(f"prior.classes is {list(classes)}, but {source} has no classes: set it to null")
        chosen: tuple[int, ...] = ()
    elif classes is not None:
        chosen = tuple(classes)
    elif subset is not None and prior.classes == IMAGENET_CLASSES:
        chosen = IMAGENET[subset]
    elif prior.classes == labels:
        chosen = tuple(range(labels))
    else:
        raise ValueError(
            f"the data set has {labels} classes, {source} {prior.classes}: list in prior.classes in params.yaml which "
            "of the prior's classes, counted from 0, belongs to each class of the data set"
        )
    if prior.is_conditional and len(chosen) != labels:
        raise ValueError(
            f"prior.classes has {len(chosen)} entries, the data set {labels} classes: list one for each in params.yaml"
        )
    prior = with_classes(prior, chosen)
    prior.check(size_px=size_px, channels=channels, classes=labels)
    return prior, chosen


def link_prior(folder: Path, *, source: str, **fitting: Any) -> None:
    """Lets `folder` stand for `fitting_prior(source, **fitting)`: nothing is copied, and `load_prior` refuses a source
    that has changed since."""
    require_own(folder)
    prior, chosen = fitting_prior(source, **fitting)
    with new_folder(folder) as partial:
        write_json(partial / LINK, {"source": source, "classes": chosen, "sha256": prior.fingerprint()})


def linked_source(folder: Path) -> str | None:
    """What a folder of the stage `prior` stands for; None where it holds a prior of its own, or is not there."""
    return _read_link(folder)["source"] if (folder / LINK).is_file() else None


def _read_link(folder: Path) -> dict[str, Any]:
    try:
        link = json.loads((folder / LINK).read_text())
        classes = [int(index) for index in link["classes"]]
        return {"source": str(link["source"]), "classes": classes, "sha256": link["sha256"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / LINK} is broken ({error!r}): {PIPELINE}") from error


def _linked(folder: Path) -> Prior:
    link = _read_link(folder)
    if (paths.ROOT / link["source"] / LINK).is_file():
        raise ValueError(f"{folder / LINK} names {link['source']}, which stands for another prior itself: {PIPELINE}")
    prior = with_classes(load_prior(link["source"]), link["classes"])
    if prior.fingerprint() != link["sha256"]:
        raise IncompatiblePrior(
            f"{link['source']} has changed since the stage `prior` looked at it: restore it, or accept it with "
            "`dvc repro -f prior`"
        )
    return prior


def require_own(folder: Path) -> None:
    """Raises FileExistsError for a folder that holds anything but what is written here: a prior takes its place."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a new folder for the prior")
    there = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if others := sorted(str(name) for path in there if str(name := path.relative_to(folder)) not in OWN):
        raise FileExistsError(
            f"{folder} holds what is no part of a prior written here ({some(others)}) and would be lost: name a new or "
            "empty folder for the prior; nothing was changed"
        )


def save_prior(prior: Prior, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Writes a prior of `build_prior` or of a CompVis checkpoint, weights as `dtype`, whole or not at all:
    `load_prior` gives what was stored. What `require_own` accepts is replaced."""
    require_own(folder)
    if (prior.prediction, prior.spacing) != ("epsilon", COMPVIS) or not torch.equal(
        prior.alpha_bar, cin256_alpha_bar()
    ):
        raise ValueError("only priors with the noise schedule of cin256-v2 are written; link to the others' folders")
    with new_folder(folder) as partial:
        for module, name in ((prior.unet, "unet"), (prior.autoencoder, "vqvae")):
            nn.Module.to(deepcopy(module), dtype).save_pretrained(
                partial / name
            )  # diffusers' own `to` warns for nothing
        cin256_schedule().save_pretrained(partial / "scheduler")
        (partial / "class_embedder").mkdir()
        weight = prior.embedding.weight.detach().to(dtype).contiguous()
        save_file({"weight": weight}, partial / EMBEDDER)


def _fetch(hub_id: str) -> Path:
    """The local copy of the parts of a hub repository, of which only what is not there yet is fetched."""
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))

    models = [name for names in PLACES[:2] for name in names]
    try:
        folder = fetch("scheduler/*.json", EMBEDDER, *(f"{model}/{name}" for model in models for name in WEIGHTS))
        if old := [model for model in models if (folder / model).is_dir() and not [*folder.glob(f"{model}/*.safe*")]]:
            fetch(*(f"{model}/diffusion_pytorch_model.bin" for model in old))
    except Exception as error:  # offline, unknown and gated repositories raise about anything
        raise FileNotFoundError(
            f"prior.source: {hub_id!r} is no folder, and the hub repository of that name could not be read "
            f"({type(error).__name__}: {error}). Without a network, or with HF_HUB_OFFLINE set, place its parts in a "
            f"folder and set prior.source in params.yaml to that folder: {LAYOUT}"
        ) from error
    return folder


def _read_folder(folder: Path) -> Prior:
    found = {names: [folder / name for name in names if (folder / name).is_dir()] for names in PLACES}
    missing = [" or ".join(names) for names, there in found.items() if not there]
    if not missing:
        unet, autoencoder, scheduler = (there[0] for there in found.values())
        if _config(unet).get("num_class_embeds") is not None:
            raise ValueError(
                f"the prior in {folder} cannot be used: {unet.name}/config.json has num_class_embeds, so the model "
                "looks the number of a class up in a table of its own, where nothing can be learned. U-Nets can be "
                f"used that attend to a vector for every class ({EMBEDDER}) or take no classes, and DiTs"
            )
        if _class_name(unet) == "UNet2DConditionModel" and not (folder / EMBEDDER).parent.is_dir():
            missing = ["class_embedder"]
    if missing:
        raise FileNotFoundError(_nothing(folder, missing))
    try:
        denoiser = _read_model(unet, tuple(DENOISERS))
        embedding = _conditioning(denoiser, folder / EMBEDDER)
        prior = Prior(denoiser, _read_model(autoencoder, AUTOENCODERS), embedding, *_read_schedule(scheduler))
        _check_parts(prior)
    except Exception as error:  # diffusers and safetensors raise many kinds for a truncated or foreign file
        again = "`dvc checkout -f prior` restores the pipeline's" if _is_ours(folder) else "prior.source names them"
        raise ValueError(
            f"the prior in {folder} cannot be read ({error}): place its files there again; {again}"
        ) from error
    return prior.freeze_()


def _is_ours(folder: Path) -> bool:
    """Whether the pipeline makes what is in a folder, and `prior.source` does not."""
    return folder.is_relative_to(paths.ROOT / "runs")


def _nothing(folder: Path, missing: list[str]) -> str:
    """What is said of a folder without these parts of a prior."""
    parts = f"no prior in {folder}: {', '.join(missing)} missing"
    if _is_ours(folder):
        return f"{parts}. {LAYOUT}; {PIPELINE}"
    if not folder.is_dir():
        return (
            f"prior.source: no prior in {folder}, there is no such folder: set prior.source in params.yaml to a "
            "folder, a model.ckpt of CompVis or a hub id"
        )
    if checkpoints := sorted(folder.glob("*.ckpt")):
        return f"prior.source: {parts}, but there is a checkpoint: set prior.source in params.yaml to {checkpoints[0]}"
    return f"prior.source: {parts}. {LAYOUT}"


def _config(folder: Path) -> dict[str, Any]:
    """That of a model of diffusers; empty where it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _class_name(folder: Path) -> str | None:
    name = _config(folder).get("_class_name")
    return FORMER.get(name, name) if isinstance(name, str) else None


def _read_model(folder: Path, allowed: Sequence[str]) -> "ModelMixin":
    """A model of diffusers with every tensor of its file and no other; a file without safetensors is read without
    executing pickles."""
    import diffusers

    name = _class_name(folder)
    if name not in allowed:
        raise ValueError(f"{folder.name}/config.json is of {name or 'no model'}, which must be {' or '.join(allowed)}")
    options = {"local_files_only": True, "torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    options["use_safetensors"] = any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))
    model, read = getattr(diffusers, name).from_pretrained(folder, output_loading_info=True, **options)
    problems = {"missing": read["missing_keys"], "unknown": read["unexpected_keys"]}
    if any(problems.values()):
        lines = [f"{len(keys)} tensors {kind}: {some(sorted(keys))}" for kind, keys in problems.items() if keys]
        raise ValueError(f"{folder.name} is not the {name} that its config.json describes; {'; '.join(lines)}")
    return model


def _conditioning(denoiser: "ModelMixin", file: Path) -> nn.Embedding:
    """The class embeddings of a denoiser; `file` has those of a UNet2DConditionModel."""
    if type(denoiser).__name__ == "DiTTransformer2DModel":
        return take_label_table(denoiser)
    if type(denoiser).__name__ == "UNet2DModel":
        return nn.Embedding.from_pretrained(torch.zeros(1, 1))
    weight = load_file(file)["weight"].float()
    width = denoiser.config.cross_attention_dim
    if weight.ndim != 2 or len(weight) < 2 or weight.shape[1] != width:
        raise ValueError(f"{EMBEDDER} has the shape {tuple(weight.shape)}, which must be (classes + 1, {width})")
    return nn.Embedding.from_pretrained(weight)


def _read_schedule(folder: Path) -> tuple[Tensor, Prediction, Spacing]:
    """alpha_bar, what the denoiser predicts, and the timesteps of sampling: those of the DDIMScheduler that diffusers
    makes of the same configuration."""
    import diffusers

    file = f"{folder.name}/scheduler_config.json"
    name = json.loads((folder / "scheduler_config.json").read_text()).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"{file} is of {name}, which is no scheduler of diffusers")
    scheduler = kind.from_pretrained(folder, local_files_only=True)
    given, known = scheduler.config, get_args(Prediction)
    prediction = given.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "betas") or prediction not in known:
        raise ValueError(
            f"{file} is a {name} with prediction_type {prediction!r}, which must be a schedule of betas with one of "
            f"{', '.join(known)}"
        )
    spacing = Spacing(
        given.get("timestep_spacing", "leading"), given.get("steps_offset", 0), given.get("set_alpha_to_one", True)
    )
    if spacing.kind not in SPACINGS or type(spacing.offset) is not int or spacing.offset < 0:
        raise ValueError(
            f"{file} has timestep_spacing {spacing.kind!r} and steps_offset {spacing.offset!r}, which must be one of "
            f"{', '.join(SPACINGS)} and a whole number from 0"
        )
    alpha_bar = alpha_bar_of(scheduler)
    if spacing.kind != "leading" and not alpha_bar[-1] > 0:
        raise ValueError(
            f"{file} starts where no signal is left (timestep_spacing {spacing.kind!r} with rescale_betas_zero_snr), "
            "from where no latent can be learned"
        )
    return alpha_bar, prediction, spacing


def _check_parts(prior: Prior) -> None:
    """Raises ValueError where the parts do not fit, or the denoiser wants more than `denoise` gives it."""
    given, latent = prior.unet.config, prior.latent_channels
    if given.in_channels != latent or (given.out_channels or latent) not in (latent, 2 * latent):
        raise ValueError(
            f"the denoiser takes {given.in_channels} channels and gives {given.out_channels}, latents have {latent}"
        )
    if more := [key for key in FURTHER if given.get(key) is not None]:
        raise ValueError(f"the denoiser asks for more than the one vector of a class: {', '.join(more)}")
    if prior.autoencoder.config.get("latents_mean") is not None:
        raise ValueError("the autoencoder's latents are scaled channel by channel (latents_mean), not by one factor")
