"""Read and write priors.

    python -m ld3m.models.prior_io MODEL.ckpt FOLDER          convert a CompVis checkpoint once, to float32
    python -m ld3m.models.prior_io MODEL.ckpt FOLDER half     to half the size

A prior is a CompVis checkpoint (`model.ckpt`), a folder or hub repository of diffusers, or a link. A diffusers folder
has

    unet/ or transformer/   UNet2DConditionModel, UNet2DModel or DiTTransformer2DModel
    vqvae/ or vae/          VQModel or AutoencoderKL
    scheduler/              the noise schedule, the kind of prediction, and the timesteps of sampling
    class_embedder/         for a UNet2DConditionModel: model.safetensors with `weight` (classes + 1, D), the token of
                            each class, and last that of the null class

A link is a folder with `source.json`: the source of the prior, the classes taken from it, and its fingerprint.
"""

import json
import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
)
from ld3m.models.prior_variants import take_label_table, with_classes
from ld3m.runtime import paths
from ld3m.runtime.storage import new_folder, write_json

if TYPE_CHECKING:
    from diffusers import ModelMixin

LINK_FILE = "source.json"
EMBEDDER = "class_embedder/model.safetensors"
PART_FOLDERS = (("unet", "transformer"), ("vqvae", "vae"), ("scheduler",))
SPACINGS = ("leading", "trailing", "linspace")
LEGACY_CLASS_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}  # in released DiTs
UNSUPPORTED_CONDITIONING = ("num_class_embeds", "class_embed_type", "addition_embed_type", "encoder_hid_dim")
OWN_FILES = (  # of a prior that `save_prior` or `link_prior` wrote
    *(f"{part}/config.json" for part in ("unet", "vqvae")),
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vqvae")),
    *("scheduler/scheduler_config.json", EMBEDDER, LINK_FILE),
)
LAYOUT = (
    "a diffusers folder has unet/ or transformer/, vqvae/ or vae/ (each with config.json and "
    f"diffusion_pytorch_model.safetensors), scheduler/scheduler_config.json and, for a U-Net with classes, {EMBEDDER}"
)


def load_prior(source: str | Path) -> Prior:
    """Load a prior.

    Parameters
    ----------
    source : a CompVis checkpoint, a diffusers folder, a link (paths relative to the repository), or a hub id

    Returns
    -------
    The prior, frozen, in float32 on the CPU.

    Raises
    ------
    FileNotFoundError : a file or folder is missing, or the hub cannot be reached
    ValueError : a file is broken, or the parts are no prior that can be used
    """
    path = paths.ROOT / Path(source).expanduser()
    if path.is_file() or path.suffix == ".ckpt":
        return load_checkpoint(path)
    if (path / LINK_FILE).is_file():
        return _load_linked(path)
    # A missing folder below one that exists must not be asked from the hub, where anyone could own the name.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) and not path.parent.is_dir()
    return _read_folder(_fetch(str(source)) if is_hub_id else path)


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
    """Restrict the prior of `source` to the classes of a data set, and return their indices in it.

    `classes` names the prior's class of each of the data set's `labels` classes. None takes those of `subset`, a subset
    of ImageNet-1k, from a prior with 1000 classes, else all. ValueError where prior and data set do not fit.
    """
    if classes is not None and not prior.is_conditional:
        raise ValueError(f"classes={list(classes)}, but {source} has no classes: must be None")
    if classes is None:
        if not prior.is_conditional:
            classes = ()
        elif subset is not None and prior.classes == IMAGENET_CLASSES:
            classes = IMAGENET[subset]
        elif prior.classes == labels:
            classes = range(labels)
        else:
            raise ValueError(
                f"classes=None: the data set has {labels} classes, {source} {prior.classes}; list for each class of "
                "the data set which of the prior's it is, counted from 0"
            )
    if prior.is_conditional and len(classes) != labels:
        raise ValueError(
            f"classes has {len(classes)} entries, but the data set has {labels} classes: list one for each"
        )
    prior = with_classes(prior, classes)
    prior.check(size_px=size_px, channels=channels, classes=labels)
    return prior, tuple(classes)


def link_prior(folder: Path, *, source: str, **fitting: Any) -> None:
    """Write a link to the prior of `source`, with the further arguments of `fitted`; nothing is copied, and
    `load_prior(folder)` refuses a source that has changed since."""
    require_own(folder)
    prior, classes = fitted(load_prior(source), source=source, **fitting)
    with new_folder(folder) as partial:
        write_json(partial / LINK_FILE, {"source": source, "classes": classes, "sha256": prior.fingerprint()})


def linked_source(folder: Path) -> str | None:
    """The source of a link; None for a folder that is none, or is missing."""
    return _read_link(folder)["source"] if (folder / LINK_FILE).is_file() else None


def _read_link(folder: Path) -> dict[str, Any]:
    try:
        link = json.loads((folder / LINK_FILE).read_text())
        return {"source": str(link["source"]), "classes": [*map(int, link["classes"])], "sha256": link["sha256"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / LINK_FILE} is broken ({error!r}): write the link again") from error


def _load_linked(folder: Path) -> Prior:
    link = _read_link(folder)
    if (paths.ROOT / link["source"] / LINK_FILE).is_file():
        raise ValueError(f"{folder / LINK_FILE} names {link['source']}, which is a link itself: write the link again")
    prior = with_classes(load_prior(link["source"]), link["classes"])
    if prior.fingerprint() != link["sha256"]:
        raise IncompatiblePrior(
            f"{link['source']} has changed since {folder / LINK_FILE} was written: restore it, or write the link again"
        )
    return prior


def require_own(folder: Path) -> None:
    """Raise FileExistsError where writing a prior to a folder would delete files of another origin."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a new folder for the prior")
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if others := sorted(str(name) for path in files if str(name := path.relative_to(folder)) not in OWN_FILES):
        raise FileExistsError(
            f"{folder} holds files that are no part of a prior written here and would be lost ({', '.join(others[:20])}"
            "): name a new or empty folder for the prior; nothing was changed"
        )


def save_prior(prior: Prior, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a prior of `build_prior` or of a CompVis checkpoint as a diffusers folder, whole or not at all.

    Parameters
    ----------
    prior : must have the noise schedule of cin256-v2
    folder : a new or empty folder, or one with an earlier prior, which is replaced
    dtype : of the stored weights
    """
    require_own(folder)
    if (prior.prediction, prior.spacing) != ("epsilon", COMPVIS) or not torch.equal(
        prior.alpha_bar, cin256_alpha_bar()
    ):
        raise ValueError("only priors with the noise schedule of cin256-v2 are written; link to the folders of others")
    with new_folder(folder) as partial:
        for module, name in ((prior.unet, "unet"), (prior.autoencoder, "vqvae")):
            stored = nn.Module.to(deepcopy(module), dtype)  # diffusers' own `to` warns without need
            stored.save_pretrained(partial / name)
        cin256_schedule().save_pretrained(partial / "scheduler")
        (partial / "class_embedder").mkdir()
        weight = prior.embedding.weight.detach().to(dtype).contiguous()
        save_file({"weight": weight}, partial / EMBEDDER)


def _fetch(hub_id: str) -> Path:
    """The local copy of the parts of a hub repository; downloads only what it lacks."""
    from huggingface_hub import snapshot_download

    models = [name for names in PART_FOLDERS[:2] for name in names]
    files = ("config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*.safetensors")
    try:
        patterns = ["scheduler/*.json", EMBEDDER, *(f"{model}/{name}" for model in models for name in files)]
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
        pickled = [model for model in models if (folder / model).is_dir() and not [*folder.glob(f"{model}/*.safe*")]]
        if pickled:
            snapshot_download(hub_id, allow_patterns=[f"{model}/diffusion_pytorch_model.bin" for model in pickled])
    except Exception as error:  # offline, unknown and gated repositories raise errors of many kinds
        raise FileNotFoundError(
            f"source={hub_id!r} is no folder, and the hub repository of that name could not be read "
            f"({type(error).__name__}: {error}). Without a network, or with HF_HUB_OFFLINE set, place its parts in a "
            f"folder and name that: {LAYOUT}"
        ) from error
    return folder


def _read_folder(folder: Path) -> Prior:
    if not folder.is_dir():
        raise FileNotFoundError(f"no prior in {folder}: there is no such folder")
    found = {names: [folder / name for name in names if (folder / name).is_dir()] for names in PART_FOLDERS}
    if missing := [" or ".join(names) for names, there in found.items() if not there]:
        checkpoints = sorted(map(str, folder.glob("*.ckpt")))
        advice = f"to use a checkpoint, name the file: {checkpoints[0]}" if checkpoints else LAYOUT
        raise FileNotFoundError(f"no prior in {folder}: {', '.join(missing)} missing; {advice}")
    unet, autoencoder, scheduler = (there[0] for there in found.values())
    try:
        denoiser = _read_model(unet, tuple(DENOISERS))
        embedding = _read_embedding(denoiser, folder / EMBEDDER)
        models = denoiser, _read_model(autoencoder, ("VQModel", "AutoencoderKL"))
        prior = Prior(*models, embedding, *_read_schedule(scheduler))
        _check_parts(prior)
    except Exception as error:  # diffusers and safetensors raise errors of many kinds for a broken or foreign file
        raise ValueError(f"the prior in {folder} cannot be used ({error}): {LAYOUT}") from error
    return prior.freeze_()


def _read_model(folder: Path, allowed: Sequence[str]) -> "ModelMixin":
    """A model of diffusers with every tensor of its file and no other; pickles are read without executing them."""
    import diffusers

    config = json.loads((folder / "config.json").read_text())
    name = LEGACY_CLASS_NAMES.get(config["_class_name"], config["_class_name"])
    if name not in allowed:
        raise ValueError(f"{folder.name}/config.json is of {name}, which must be {' or '.join(allowed)}")
    if further := [key for key in UNSUPPORTED_CONDITIONING if config.get(key) is not None]:
        raise ValueError(
            f"{folder.name}/config.json has {', '.join(further)}, a condition that cannot be learned: a U-Net must "
            "have no classes, or attend to one vector of the class"
        )
    options = {"local_files_only": True, "torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    options["use_safetensors"] = any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))
    model, read = getattr(diffusers, name).from_pretrained(folder, output_loading_info=True, **options)
    problems = {"missing": read["missing_keys"], "unknown": read["unexpected_keys"]}
    if any(problems.values()):
        lines = [
            f"{len(keys)} tensors {kind}: {', '.join(sorted(keys)[:20])}" for kind, keys in problems.items() if keys
        ]
        raise ValueError(f"{folder.name} is not the {name} that its config.json describes; {'; '.join(lines)}")
    return model


def _read_embedding(denoiser: "ModelMixin", file: Path) -> nn.Embedding:
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
    """alpha_bar, what the denoiser predicts, and the timesteps that a DDIMScheduler of this configuration takes."""
    import diffusers

    file = f"{folder.name}/scheduler_config.json"
    name = json.loads((folder / "scheduler_config.json").read_text()).get("_class_name")
    kind = getattr(diffusers, name)
    if not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(f"{file} is of {name}, which is no scheduler of diffusers")
    scheduler = kind.from_pretrained(folder, local_files_only=True)
    given = scheduler.config
    prediction = given.get("prediction_type", "epsilon")
    spacing = Spacing(
        given.get("timestep_spacing", "leading"), given.get("steps_offset", 0), given.get("set_alpha_to_one", True)
    )
    if (
        not hasattr(scheduler, "betas")
        or prediction not in get_args(Prediction)
        or spacing.kind not in SPACINGS
        or not isinstance(spacing.offset, int)
        or spacing.offset < 0
    ):
        raise ValueError(
            f"{file} is a {name} with prediction_type {prediction!r}, timestep_spacing {spacing.kind!r}, steps_offset "
            f"{spacing.offset!r}: must be a schedule of betas with one of {', '.join(get_args(Prediction))}; one of "
            f"{', '.join(SPACINGS)}; a whole number from 0"
        )
    alpha_bar = alpha_bar_of(scheduler)
    if spacing.kind != "leading" and not alpha_bar[-1] > 0:
        raise ValueError(f"{file} starts where no signal is left, from where no latent can be learned")
    return alpha_bar, prediction, spacing


def _check_parts(prior: Prior) -> None:
    given, latent = prior.unet.config, prior.latent_channels
    if given.in_channels != latent or (given.out_channels or latent) not in (latent, 2 * latent):
        raise ValueError(
            f"the denoiser takes {given.in_channels} channels and gives {given.out_channels}, latents have {latent}"
        )
    if prior.autoencoder.config.get("latents_mean") is not None:
        raise ValueError("the autoencoder's latents are scaled channel by channel (latents_mean), not by one factor")


def main(*arguments: str) -> None:
    """Convert a CompVis checkpoint, see the top of this file."""
    match arguments:
        case [file, folder, *rest] if rest in ([], ["half"]):
            require_own(Path(folder))  # before a minute of reading
            save_prior(load_checkpoint(Path(file)), Path(folder), dtype=torch.float16 if rest else torch.float32)
            print(folder)
        case _:
            raise ValueError(__doc__)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
