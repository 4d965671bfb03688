"""What params.yaml may hold: frozen models that refuse unknown keys and values out of range."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from ld3m.data.augment import parse_strategy
from ld3m.data.dataset import Normalization
from ld3m.data.subsets import check_name
from ld3m.method.objectives import OBJECTIVES
from ld3m.method.spaces import DEFAULT_LEARNED
from ld3m.models.networks import ARCHITECTURES
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.devices import choose_device

PRIORS = {"pixel": "data", "glad": "gan", "ld3m": "prior"}  # space: the folder of its prior under runs/<dataset>
CONTROLS = ("random_real", "herding", "k_center", "iteration0", "prior_samples", "full_data")

Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bfloat16"]
Widths = Annotated[tuple[Count, ...], Field(min_length=2)]
Steps = Annotated[int, Field(ge=1, le=999)]
Factory = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]  # package.module:name
Table = Literal["main", "report"]


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("has an entry twice")
    return values


def _subset(classes: "tuple[str | int, ...] | str") -> "tuple[str | int, ...] | str":
    return check_name(classes) if isinstance(classes, str) else classes


def _strategy(strategy: str) -> str:
    parse_strategy(strategy)
    return strategy


Distinct = AfterValidator(_distinct)
Architectures = Annotated[tuple[str, ...], Field(min_length=1), Distinct]
Runs = Annotated[tuple[Whole, ...], Field(min_length=1), Distinct]
Strategy = Annotated[str, AfterValidator(_strategy)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def options(self) -> dict[str, Any]:
        """The options of the space or the objective that this is the block of."""
        return self.model_dump()


class CellParams(Model):
    """Sets to distil, one for each of `runs`. `prior` and `experts` name what the stage reads under runs/<dataset>:
    "data" where it needs none."""

    objective: str
    space: str
    ipc: Count
    runs: Runs
    table: Table
    prior: Literal["data", "prior", "gan"]
    experts: Literal["data", "trajectories"]
    iterations: Count | None = None  # replaces that of `distill`


class ControlParams(Model):
    """Sets to compare with. `control` is a name, the import path of a function, or full_data, whose `ipc` is 0."""

    control: str
    ipc: Whole
    runs: Runs
    table: Table
    prior: Literal["data", "prior"]


class NormalizationParams(Model):
    mean: tuple[float, ...]
    std: tuple[Rate, ...]


class Splits(Model):
    train: str
    validation: str | Share
    test: str


class DatasetParams(Model):
    source: str
    size_px: Count
    channels: Literal[1, 3]
    splits: Splits
    image_column: str
    label_column: str
    classes: Annotated[tuple[str | int, ...] | str, AfterValidator(_subset)] | None
    normalization: NormalizationParams | None
    augmentation: Strategy


class AutoencoderParams(Model):
    widths: Widths
    latent_channels: Count
    codebook: Count
    steps: Count
    continuous_steps: Count
    batch: Count
    learning_rate: Rate

    def training(self) -> dict[str, Any]:
        """The arguments of `train_prior.fit_autoencoder`."""
        return self.model_dump(exclude={"widths", "latent_channels", "codebook"})


class DenoiserParams(Model):
    widths: Widths
    conditioning_width: Count
    blocks: Count
    steps: Count
    batch: Count
    learning_rate: Rate
    null_share: Share
    ema_decay: Share

    def training(self) -> dict[str, Any]:
        """The arguments of `train_prior.fit_denoiser`."""
        return self.model_dump(exclude={"widths", "conditioning_width", "blocks"})


class PriorCheck(Model):
    """Guided samples a class, and the training of the ConvNet that judges them."""

    samples_per_class: Count
    steps: Steps
    guidance: float
    width: Count
    epochs: Count
    learning_rate: Rate


class PriorParams(Model):
    source: str | None
    classes: tuple[Whole, ...] | None
    precision: Precision
    autoencoder: AutoencoderParams
    denoiser: DenoiserParams
    check: PriorCheck


class GanCheck(Model):
    """Samples a class, and the training of the ConvNet that judges them."""

    samples_per_class: Count
    width: Count
    epochs: Count
    learning_rate: Rate


class GanParams(Model):
    noise_width: Count
    w_width: Count
    widths: Widths
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


class Extension(BaseModel):
    """A block that names a factory of your own; its other keys are the factory's arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    factory: Factory

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for the factory."""
        return self.model_dump(exclude={"factory"})


class Blocks(BaseModel):
    """One block for every built-in choice, and for those of your own."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
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
    start: Literal["real", "noise"]


class GladParams(Model):
    layer: Whole
    mean_w: bool | Literal["auto"]
    render_batch: Count


class LD3MParams(Model):
    prior: Literal["trained", "unconditional", "random", "all_random"]
    start: Literal["real", "prior", "noise"]
    learn: Literal["auto", "z", "z_T"]
    skip: Literal["x0", "mean", "none"]
    steps: Steps
    guidance: float
    clamp: Literal["none", "hard", "soft"]
    noise: Literal["stored", "redrawn"]
    encoder_input: Literal["pixels", "images"]
    normalization: Literal["real", "shifted"]
    precision: Precision
    render_batch: Count
    uncheckpointed_steps: Annotated[int, Field(strict=True, ge=0, le=999)]

    def options(self) -> dict[str, Any]:
        """Those of `start_latents`: the others are of the prior."""
        given = self.model_dump(exclude={"prior", "precision", "normalization"})
        return given | {"shifted_normalization": self.normalization == "shifted"}


class Spaces(Blocks):
    pixel: PixelParams
    glad: GladParams
    ld3m: LD3MParams


class Budget(Model):
    """What one cell spends: `learning_rates` has one entry for every learnable of the space and the objective; what has
    the rate 0 stays as it starts."""

    iterations: Count
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
    """`recipe_overrides` has the keys full_data, for training on all real images, and ipc_10 and the like."""

    seeds: Annotated[int, Field(ge=2)]  # networks of each architecture on the set of run 0
    seeds_further_runs: Count  # on the set of every other run
    recipe: Recipe
    recipe_overrides: dict[Annotated[str, Field(pattern=r"^(full_data|ipc_[1-9]\d*)$")], RecipeOverrides]


class GradientNormParams(Model):
    steps: Annotated[tuple[Steps, ...], Field(min_length=1), Distinct]
    images_per_class: Count


class AblationParams(Model):
    """`settings`: ablation -> setting -> what it changes: dotted keys of params.yaml, and `objective` and `space` where
    they are not dm and ld3m. One that changes nothing is the baseline, which the first of them measures for all."""

    iterations: Count
    architecture: Annotated[tuple[str, ...], Field(min_length=2), Distinct]
    seeds: Annotated[int, Field(ge=2)]
    select_on_test: bool
    settings: dict[str, dict[str, dict[str, Any]]]

    @property
    def baseline(self) -> tuple[str, str]:
        """The ablation, and the setting of it, that measure the baseline."""
        return next((name, key) for name, of in self.settings.items() for key, changes in of.items() if not changes)


class Params(Model):
    seed: Whole
    device: Literal["auto", "cpu", "cuda"]
    processes: Annotated[int, Field(strict=True, ge=1, le=1024)]
    cluster: Annotated[str, Field(min_length=1)] | None  # the address of a Ray cluster
    checkpoint_minutes: Annotated[float, Field(ge=0)]
    dataset: str
    cells: dict[str, CellParams]
    controls: dict[str, ControlParams]
    architectures: Architectures
    datasets: dict[str, DatasetParams]
    prior: PriorParams
    gan: GanParams
    networks: dict[str, Network]
    trajectories: TrajectoriesParams
    objectives: Objectives
    spaces: Spaces
    distill: DistillParams
    evaluate: EvaluateParams
    gradient_norms: GradientNormParams
    ablations: AblationParams

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        if self.dataset not in self.datasets:
            raise ValueError(f"dataset: {self.dataset!r} is not among datasets ({', '.join(self.datasets)})")
        self._check_cells()
        self._check_budgets()
        if all(changes for of in self.ablations.settings.values() for changes in of.values()):
            raise ValueError("ablations.settings: one must change nothing ({}), the baseline of the others")
        if self.distill.network not in self.ablations.architecture:
            raise ValueError(f"ablations.architecture lacks {self.distill.network}, which is distill.network")
        recipes = {f"evaluate.recipe.{key}": getattr(self.evaluate.recipe, key) for key in ("epochs", "learning_rates")}
        for key, changes in self.evaluate.recipe_overrides.items():
            if changes.epochs is not None:
                recipes[f"evaluate.recipe_overrides.{key}.epochs"] = changes.epochs
        for name in {*self.architectures, *self.ablations.architecture, self.distill.network}:
            for key, recipe in {"networks": self.networks, **recipes}.items():
                if name not in recipe:
                    raise ValueError(f"{key}.{name} is missing")
        for key, recipe in recipes.items():
            if unknown := recipe.keys() - self.networks.keys():
                raise ValueError(f"{key}.{min(unknown)}: there is no such network in networks")
        for name, network in self.networks.items():
            if isinstance(network, NetworkParams) and name not in ARCHITECTURES:
                known = ", ".join(ARCHITECTURES)
                raise ValueError(f"networks.{name}: there are {known}; one of your own has a `factory`")
        needed = self.objectives.mtt.max_start_epoch - 1 + self.objectives.mtt.expert_epochs
        if self.trajectories.epochs != needed:
            raise ValueError(
                f"trajectories.epochs = {self.trajectories.epochs}: must be {needed}, the last epoch that "
                "objectives.mtt reads (max_start_epoch - 1 + expert_epochs)"
            )
        autoencoder, denoiser = self.prior.autoencoder, self.prior.denoiser
        unit = 2 ** (len(autoencoder.widths) - 1 + len(denoiser.widths) - 1)
        if self.prior.source is None and self.data.size_px % unit:
            raise ValueError(
                f"datasets.{self.dataset}.size_px = {self.data.size_px}: must be a multiple of {unit} for a prior with "
                "these prior.autoencoder.widths and prior.denoiser.widths"
            )
        if self.prior.source is None and self.prior.classes is not None:
            raise ValueError("prior.classes are those of prior.source: set it to null where a prior is trained")
        if any(width % 8 for width in autoencoder.widths) or any(width % 16 for width in denoiser.widths):
            raise ValueError("prior.autoencoder.widths must be multiples of 8, prior.denoiser.widths multiples of 16")
        if autoencoder.continuous_steps >= autoencoder.steps:
            raise ValueError("prior.autoencoder.continuous_steps must be below prior.autoencoder.steps")
        if any(cell.prior == "gan" for cell in self.cells.values()):
            side = 4 * 2 ** (len(self.gan.widths) - 1)
            if side != self.data.size_px:
                raise ValueError(
                    f"gan.widths has {len(self.gan.widths)} entries, which draw images of {side} px; needed are those "
                    f"of datasets.{self.dataset}.size_px = {self.data.size_px}: one entry for 4 px, one for each "
                    "doubling; or take the cells with `prior: gan` out of cells"
                )
            if len(self.gan.discriminator_widths) != len(self.gan.widths) - 1:
                raise ValueError(
                    f"gan.discriminator_widths has {len(self.gan.discriminator_widths)} entries; needed are "
                    f"{len(self.gan.widths) - 1}, one for each halving down to 4 px"
                )
        if self.spaces.glad.layer >= 2 * len(self.gan.widths):
            raise ValueError(
                f"spaces.glad.layer = {self.spaces.glad.layer}: must be below {2 * len(self.gan.widths)}, the number "
                "of layers of a GAN with these gan.widths"
            )
        return self

    def _check_cells(self) -> None:
        seen: dict[tuple, str] = {}
        for key in self.cells.keys() & self.controls.keys():
            raise ValueError(f"cells.{key} and controls.{key}: one key for two entries, rename one")
        for key, cell in self.cells.items():
            for kind in ("objective", "space"):
                if (name := getattr(cell, kind)) not in (known := getattr(self, f"{kind}s").names()):
                    raise ValueError(f"cells.{key}.{kind} = {name!r}: there are {', '.join(known)} in {kind}s")
            if (wanted := PRIORS.get(cell.space, cell.prior)) != cell.prior:
                raise ValueError(f"cells.{key}.prior = {cell.prior!r}: {cell.space} needs {wanted!r}")
            if cell.objective in OBJECTIVES and cell.experts != ("trajectories" if cell.objective == "mtt" else "data"):
                raise ValueError(f"cells.{key}.experts = {cell.experts!r}: trajectories for mtt, data for dc and dm")
            if cell.space not in self.distill.__pydantic_extra__.get(cell.objective, {}):
                raise ValueError(f"distill.{cell.objective}.{cell.space} is missing, which cells.{key} asks for")
        for key, control in self.controls.items():
            if control.control not in CONTROLS and ":" not in control.control:
                raise ValueError(
                    f"controls.{key}.control = {control.control!r}: must be one of {', '.join(CONTROLS)}, or the "
                    "import path of your own, package.module:name"
                )
            if (control.ipc == 0) != (control.control == "full_data"):
                raise ValueError(f"controls.{key}.ipc = {control.ipc}: 0 is that of full_data, which has no other")
        for kind, entries in (("cells", self.cells), ("controls", self.controls)):
            for key, entry in entries.items():
                for run in entry.runs:
                    row = (kind, *entry.model_dump(include={"objective", "space", "control", "ipc"}).values(), run)
                    if row in seen:
                        raise ValueError(f"{kind}.{key}.runs has run {run}, which {kind}.{seen[row]} has too")
                    seen[row] = key

    def _check_budgets(self) -> None:
        for objective, budgets in self.distill.__pydantic_extra__.items():
            for space, budget in budgets.items():
                if objective in OBJECTIVES and space in PRIORS:
                    names, given = self._learnables(objective, space), set(budget.learning_rates)
                    possible = {"z", "z_T"} if space == "ld3m" else set()  # the one not learned may keep its rate
                    if not names <= given <= names | possible:
                        raise ValueError(
                            f"distill.{objective}.{space}.learning_rates has {', '.join(sorted(given))}; "
                            f"needed are {', '.join(sorted(names))}"
                        )

    @property
    def data(self) -> DatasetParams:
        """The parameters of the data set that is distilled."""
        return self.datasets[self.dataset]

    @property
    def on_device(self) -> str:
        """What `device` stands for on this machine."""
        return choose_device(self.device)

    @property
    def threads(self) -> int:
        """In how many a single run does what can be done side by side: a GPU needs none."""
        return self.processes if self.on_device == "cpu" else 1

    def networks_a_set(self, run: int) -> int:
        """How many networks of an architecture are trained on the set of a run."""
        return self.evaluate.seeds if run == 0 else self.evaluate.seeds_further_runs

    def dataset_arguments(self) -> dict[str, Any]:
        """The arguments of `data.load_dataset`."""
        given = self.data.model_dump(exclude={"augmentation", "normalization"})
        fixed = self.data.normalization and Normalization(**self.data.normalization.model_dump())
        return given | {"normalization": fixed, "name": self.dataset, "seed": self.seed, "device": self.on_device}

    def network_arguments(self, architecture: str) -> dict[str, Any]:
        """The arguments of `networks.build` but the number of classes and the seed."""
        size = {"channels": self.data.channels, "size_px": self.data.size_px}
        return {"name": architecture} | size | self.networks[architecture].model_dump()

    def recipe(self, architecture: str, ipc: int) -> dict[str, Any]:
        """The arguments of `training.train`, but the data and the seed, with which an architecture is judged on sets of
        `ipc` images a class; 0 stands for all real images."""
        recipe = self.evaluate.recipe.model_dump()
        changes = self.evaluate.recipe_overrides.get(f"ipc_{ipc}" if ipc else "full_data")
        if changes:
            recipe |= changes.model_dump(exclude_unset=True)
        chosen = {"epochs": recipe["epochs"][architecture], "learning_rate": recipe.pop("learning_rates")[architecture]}
        return recipe | chosen | {"warm_up": True, "strategy": self.data.augmentation}

    def trajectories_arguments(self) -> dict[str, Any]:
        """The arguments of `experts.train_experts` but the data and the network."""
        shared = {"strategy": self.data.augmentation, "seed": self.seed}
        shared |= {"processes": self.processes, "cluster": self.cluster}
        return self.trajectories.model_dump(exclude={"experts"}) | {"count": self.trajectories.experts} | shared

    def checkpoint(self, name: str, configuration: dict[str, Any]) -> Checkpoint:
        """Where the run of that name keeps its state; `configuration` are plain values that it must find unchanged."""
        file = paths.ROOT / "checkpoints" / self.dataset / f"{name}.safetensors"  # no output, which DVC would delete
        given = configuration | {"device": self.on_device}  # which has rounding, and groups of networks, of its own
        return Checkpoint(file, minutes=self.checkpoint_minutes, configuration=given)

    def training_checkpoint(self, part: str, data_sha256: str) -> Checkpoint:
        """That of autoencoder, denoiser, gan or trajectories, trained on the data with that fingerprint."""
        keys = {
            "autoencoder": {"prior": {"autoencoder"}},
            "denoiser": {"prior": {"autoencoder", "denoiser", "precision"}},
            "gan": {"gan": True},
            "trajectories": {"trajectories": True},
        }
        given = self.model_dump(include={"seed": True, **keys[part]}, exclude={"gan": {"check"}})
        network = self.network_arguments(self.distill.network) if part == "trajectories" else None
        shared = {"augmentation": self.data.augmentation, "network": network, "data_sha256": data_sha256}
        return self.checkpoint(part, given | shared)

    def prior_arguments(self) -> dict[str, Any]:
        """The arguments of `diffusion.build_prior` but the number of classes."""
        autoencoder, denoiser = self.prior.autoencoder, self.prior.denoiser
        return {
            "channels": self.data.channels,
            "latent_size": self.data.size_px // 2 ** (len(autoencoder.widths) - 1),
            "latent_channels": autoencoder.latent_channels,
            "codebook": autoencoder.codebook,
            "autoencoder_widths": autoencoder.widths,
            "unet_widths": denoiser.widths,
            "unet_blocks": denoiser.blocks,
            "conditioning_width": denoiser.conditioning_width,
            "seed": self.seed,
        }

    def prior_source_arguments(self) -> dict[str, Any]:
        """The arguments of `prior_io.fitted` except the number of labels."""
        given = {"source": self.prior.source, "size_px": self.data.size_px, "channels": self.data.channels}
        subset = self.data.classes if isinstance(self.data.classes, str) else None
        return given | {"classes": self.prior.classes, "subset": subset}

    def prior_check_arguments(self) -> dict[str, Any]:
        """The arguments of `prior_quality.check_prior`."""
        return self.prior.check.model_dump() | {"strategy": self.data.augmentation, "seed": self.seed}

    def _learnables(self, objective: str, space: str) -> set[str]:
        ld3m = self.spaces.ld3m
        latent = DEFAULT_LEARNED[ld3m.skip] if ld3m.learn == "auto" else ld3m.learn
        names = {"pixel": {"images"}, "glad": {"f", "w"}, "ld3m": {latent, "c"}}[space]
        return names | ({"student_lr"} if objective == "mtt" else set())

    def gan_arguments(self) -> dict[str, Any]:
        """The arguments of `gan.build_generator` but the number of classes."""
        given = self.gan.model_dump(include={"noise_width", "w_width", "widths"})
        return given | {"channels": self.data.channels, "seed": self.seed}

    def gan_check_arguments(self) -> dict[str, Any]:
        """The arguments of `prior_quality.check_gan`."""
        return self.gan.check.model_dump() | {"strategy": self.data.augmentation, "seed": self.seed}

    def budget(self, objective: str, space: str, ipc: int = 1, *, iterations: int | None = None) -> Budget:
        """The budget of a cell, with the rates of what is learned in it alone; `iterations` replaces those given.

        What is matched are means over the images of a class, so the gradient of one image falls as 1 / ipc: the rates
        in params.yaml are those of one image a class, and are `ipc` times as large for more.
        """
        given: Budget = self.distill.__pydantic_extra__[objective][space]
        unlearned = {"z", "z_T"} - self._learnables(objective, space) if space == "ld3m" else set()
        learned = given.learning_rates.keys() - unlearned
        rates = {name: given.learning_rates[name] * (1 if name == "student_lr" else ipc) for name in sorted(learned)}
        return given.model_copy(update={"learning_rates": rates, "iterations": iterations or given.iterations})

    def lowers_memory(self, objective: str, space: str) -> tuple[str, ...]:
        """The settings that a cell needs less memory with, the lower they are."""
        matched = "objectives.mtt.student_batch" if objective == "mtt" else f"objectives.{objective}.real_batch"
        rendered = () if space == "pixel" else (f"spaces.{space}.render_batch",)
        kept = (
            ("spaces.ld3m.uncheckpointed_steps",) if space == "ld3m" and self.spaces.ld3m.uncheckpointed_steps else ()
        )
        return (*kept, *rendered, matched)
