"""The blocks of params.yaml: frozen models that refuse unknown keys and values out of range."""

import re
from collections.abc import Callable
from functools import partial
from os.path import abspath, realpath
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from ld3m.data.augment import parse_strategy
from ld3m.data.subsets import check_name
from ld3m.runtime import paths


def that(holds: Callable[[Any], Any] | str, otherwise: str) -> AfterValidator:
    """Refuse values for which `holds` is false, or which do not match it, with the message `otherwise`."""
    test = partial(re.fullmatch, holds) if isinstance(holds, str) else holds

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(otherwise)
        return value

    return AfterValidator(check)


def _lasts(source: str) -> bool:
    """Tell whether a path leads past runs/ and cache/, through links too."""
    path, emptied = paths.ROOT / Path(source).expanduser(), (paths.ROOT / "runs", paths.ROOT / "cache")
    return not any(Path(view(path)).is_relative_to(view(of)) for of in emptied for view in (abspath, realpath))


Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]
Source = Annotated[Text, that(_lasts, "DVC empties runs/ and `make clean` removes cache/: copy it to another folder")]
Rate = Annotated[float, Field(gt=0)]
Guidance = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bfloat16"]
Steps = Annotated[int, Field(ge=1, le=999)]
RecipeKey = Annotated[str, that(r"full_data|ipc_[1-9]\d*", "must be full_data, or ipc_10 and the like")]
Name = Annotated[  # of files, and of stages of DVC, whose templates read a dot
    str, that(r"\w[\w-]{0,99}", "a name has letters, digits, '_' and '-' only, at most 100, and no '-' in front")
]
Distinct = that(lambda values: len(set(values)) == len(values), "has an entry twice: remove one")
Architectures = Annotated[tuple[str, ...], Field(min_length=1), Distinct]
Runs = Annotated[tuple[Whole, ...], Field(min_length=1), Distinct]
Strategy = Annotated[str, AfterValidator(lambda strategy: "_".join(parse_strategy(strategy)) or "none")]
Subset = Annotated[str, AfterValidator(check_name), Tag("subset")]
ClassNames = Annotated[tuple[str | int, ...], Field(min_length=2), Distinct, Tag("names")]
Classes = Annotated[Subset | ClassNames, Discriminator(lambda given: "subset" if isinstance(given, str) else "names")]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def options(self) -> dict[str, Any]:
        """The options of the space or the objective that this is the block of."""
        return self.model_dump()


class CellParams(Model):
    """Sets to distill, one for each of `runs`. `prior` and `experts` name what the stage reads under runs/<dataset>:
    "data" where it needs none."""

    objective: str
    space: str
    ipc: Count
    runs: Runs
    table: Literal["main", "report"]
    prior: Literal["data", "prior", "gan"]
    experts: Literal["data", "trajectories"]
    iterations: Count | None = None  # replaces that of `distill`


class ControlParams(Model):
    """Sets to compare with. `control` is a name, the import path of a function, or full_data, whose `ipc` is 0."""

    control: str
    ipc: Whole
    runs: Runs
    table: Literal["main", "report"]
    prior: Literal["data", "prior"]


class NormalizationParams(Model):
    mean: tuple[float, ...]
    std: tuple[Rate, ...]


class Splits(Model):
    train: Text
    validation: Text | Annotated[float, Field(gt=0, lt=1)]
    test: Text


class DatasetParams(Model):
    source: Source
    size_px: Count
    channels: Literal[1, 3]
    splits: Splits
    image_column: Text
    label_column: Text
    classes: Classes | None
    normalization: NormalizationParams | None
    augmentation: Strategy


class AutoencoderParams(Model):
    """With a `source`, an autoencoder from elsewhere, only that has an effect."""

    source: Source | None
    widths: Annotated[tuple[Annotated[Count, Field(multiple_of=8)], ...], Field(min_length=2)]
    latent_channels: Count
    codebook: Count
    steps: Count
    continuous_steps: Count
    batch: Count
    learning_rate: Rate

    def training(self) -> dict[str, Any]:
        """The arguments of `train_prior.fit_autoencoder`."""
        return self.model_dump(exclude={"source", "widths", "latent_channels", "codebook"})


class DenoiserParams(Model):
    kind: Literal["unet", "dit"]
    widths: tuple[Annotated[Count, Field(multiple_of=16)], ...]
    conditioning_width: Count
    blocks: Count
    steps: Count
    batch: Count
    learning_rate: Rate
    null_share: Share
    ema_decay: Share

    def training(self) -> dict[str, Any]:
        """The arguments of `train_prior.fit_denoiser`."""
        return self.model_dump(exclude={"kind", "widths", "conditioning_width", "blocks"})


class GanCheck(Model):
    """Samples per class, and the training of the ConvNet that classifies them."""

    samples_per_class: Count
    width: Count
    epochs: Count
    learning_rate: Rate


class PriorCheck(GanCheck):
    steps: Steps
    guidance: Guidance


class PriorParams(Model):
    source: Source | None
    classes: Annotated[tuple[Whole, ...], Distinct] | None
    precision: Precision
    autoencoder: AutoencoderParams
    denoiser: DenoiserParams
    check: PriorCheck


class GanParams(Model):
    noise_width: Count
    w_width: Count
    widths: Annotated[tuple[Count, ...], Field(min_length=2)]
    discriminator_widths: Annotated[tuple[Count, ...], Field(min_length=1)]
    steps: Count
    batch: Annotated[int, Field(ge=4, multiple_of=4)]
    learning_rate: Rate
    r1: Annotated[float, Field(ge=0)]
    r1_every: Count
    ema_decay: Share
    augmentation: Strategy
    check: GanCheck

    def training(self) -> dict[str, Any]:
        """The arguments of `train_gan.fit_gan`."""
        given = self.model_dump(exclude={"noise_width", "w_width", "widths", "augmentation", "check"})
        return given | {"strategy": self.augmentation}


class Extension(Model, extra="allow"):
    """A block that names a factory of your own; its other keys are the factory's arguments."""

    factory: Annotated[str, that(r"[\w.]+:\w+", "must be an import path, package.module:name")]

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for the factory."""
        return self.model_dump(exclude={"factory"})


class Blocks(Model, extra="allow"):
    """One block for every built-in choice, and for those of your own."""

    __pydantic_extra__: dict[str, Extension]

    def names(self) -> tuple[str, ...]:
        return *type(self).model_fields, *self.__pydantic_extra__


class NetworkParams(Model):
    width: Count
    depth: Count | None = None
    norms: bool | None = None  # of vit: false is the released code's, which has none


def _kind(network: Any) -> str:
    return "own" if isinstance(network, Extension) or isinstance(network, dict) and "factory" in network else "built-in"


Network = Annotated[Annotated[NetworkParams, Tag("built-in")] | Annotated[Extension, Tag("own")], Discriminator(_kind)]


class TrajectoriesParams(Model):
    experts: Count
    epochs: Count
    batch: Count
    learning_rate: Rate


class ClassMatchingParams(Model):
    real_batch: Count
    trained_epochs: Whole


class TrajectoryMatchingParams(Model):
    student_steps: Count
    student_batch: Count | None
    expert_epochs: Count
    max_start_epoch: Count
    student_lr: Rate
    first_order: bool


class Objectives(Blocks):
    dc: ClassMatchingParams
    dm: ClassMatchingParams
    mtt: TrajectoryMatchingParams


class PixelParams(Model):
    start: Literal["real", "herding", "noise"]


class GladParams(Model):
    layer: Whole
    mean_w: bool
    shifted_normalization: bool
    render_batch: Count


class LD3MParams(Model):
    prior: Literal["trained", "unconditional", "random"]
    start: Literal["real", "herding", "prior", "noise"]
    learn: Literal["auto", "z", "z_T"]
    skip: Literal["x0", "mean", "none"]
    steps: Steps
    guidance: Guidance
    clamp: Literal["none", "hard", "soft"]
    noise: Literal["stored", "redrawn"]
    encoder_input: Literal["x", "normalized"]
    shifted_normalization: bool
    precision: Precision
    render_batch: Count
    uncheckpointed_steps: Annotated[int, Field(strict=True, ge=0, le=999)]

    def options(self) -> dict[str, Any]:
        """Those of `start_latents`: the others are of the prior."""
        return self.model_dump(exclude={"prior", "precision"})


class Spaces(Blocks):
    pixel: PixelParams
    glad: GladParams
    ld3m: LD3MParams


class Budget(Model):
    """What one cell spends: `learning_rates` has one entry for every learnable of the space and the objective; what has
    the rate 0 stays as it starts."""

    iterations: Count
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rates: dict[str, Annotated[float, Field(ge=0)]]


class DistillParams(Model, extra="allow"):
    """`<objective>.<space>` is the budget of the cells of that objective and space."""

    __pydantic_extra__: dict[str, dict[str, Budget]]

    network: str
    momentum: Share
    validation_checks: Count
    validation_seeds: Count


class Recipe(Model):
    epochs: dict[str, Count]
    batch: Count
    learning_rates: dict[str, Rate]
    momentum: Share
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: Rate | None
    ema_decay: Share | None


class RecipeOverrides(Model):
    """Values that replace those of `recipe` for larger sets, whose epochs take longer and may be fewer."""

    epochs: dict[str, Count] | None = None
    batch: Count | None = None
    ema_decay: Share | None = None  # null: none


class EvaluateParams(Model):
    """`recipe_overrides` are for training on all real images, and on sets of so many images a class."""

    seeds: Annotated[int, Field(ge=2)]  # networks of each architecture on the set of run 0
    seeds_further_runs: Count  # on the set of every other run
    recipe: Recipe
    recipe_overrides: dict[RecipeKey, RecipeOverrides]


class GradientNormParams(Model):
    steps: Annotated[tuple[Steps, ...], Field(min_length=1), Distinct]
    images_per_class: Count


class AblationParams(Model):
    """`settings`: ablation -> setting -> what it changes: dotted keys of params.yaml, and `objective` (none: `space` is
    a control), `space` and `ipc` where not dm, ld3m, 1. The first that changes nothing measures the baseline."""

    iterations: Count | None  # null: those of `distill`
    architecture: Annotated[tuple[str, ...], Field(min_length=2), Distinct]
    runs: Count  # sets of every setting
    seeds: Count  # networks of each architecture on a set
    select_on_test: bool
    settings: dict[Name, dict[str, dict[str, Any]]]

    @property
    def baseline(self) -> tuple[str, str]:
        """The ablation, and the setting of it, that measure the baseline."""
        return next((name, key) for name, of in self.settings.items() for key, changes in of.items() if not changes)
