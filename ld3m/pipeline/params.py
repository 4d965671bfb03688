"""What params.yaml may hold: frozen models that refuse unknown keys and values out of range.

The methods turn parameters into the arguments of the rooms that use them.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ld3m.data.augment import parse_strategy
from ld3m.data.dataset import Normalization
from ld3m.data.subsets import check_name
from ld3m.method.spaces import DEFAULT_LEARNED
from ld3m.models.networks import ARCHITECTURES
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.devices import choose_device

Objective = Literal["dc", "dm", "mtt"]
Space = Literal["pixel", "glad", "ld3m"]
Control = Literal["random_real", "herding", "k_center", "iteration0", "prior_samples"]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Processes = Annotated[int, Field(strict=True, ge=1, le=1024)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bfloat16"]
Widths = Annotated[tuple[Count, ...], Field(min_length=2)]
Steps = Annotated[int, Field(ge=1, le=999)]


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("has an entry twice")
    return values


Distinct = AfterValidator(_distinct)


def _known(architecture: str) -> str:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    return architecture


def _subset(classes: "tuple[str | int, ...] | str") -> "tuple[str | int, ...] | str":
    return check_name(classes) if isinstance(classes, str) else classes


def _strategy(strategy: str) -> str:
    parse_strategy(strategy)
    return strategy


Architecture = Annotated[str, AfterValidator(_known)]
Strategy = Annotated[str, AfterValidator(_strategy)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def options(self) -> dict[str, Any]:
        """The options of the space or the objective that this is the block of."""
        return self.model_dump()


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


class NetworkParams(Model):
    width: Count
    depth: Count | None = None
    norms: bool | None = None  # of vit: false is the released code's, which has none


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


class Objectives(Model):
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


class Spaces(Model):
    pixel: PixelParams
    glad: GladParams
    ld3m: LD3MParams


class Budget(Model):
    """What one cell spends: `learning_rates` has one entry for every learnable of the space and the objective; what has
    the rate 0 stays as it starts."""

    iterations: Count
    learning_rates: dict[str, Annotated[float, Field(ge=0)]]


class Budgets(Model):
    pixel: Budget
    glad: Budget
    ld3m: Budget


class DistillParams(Model):
    network: Architecture
    momentum: Share
    validation_checks: Count
    validation_seeds: Count
    dc: Budgets
    dm: Budgets
    mtt: Budgets


class Recipe(Model):
    epochs: dict[Architecture, Count]
    batch: Count
    learning_rates: dict[Architecture, Rate]
    momentum: Share
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: Rate | None
    ema_decay: Share | None


class RecipeChanges(Model):
    """What replaces values of `recipe` for larger sets, whose epochs take longer and may be fewer."""

    epochs: dict[Architecture, Count] | None = None
    batch: Count | None = None
    ema_decay: Share | None = None  # null: none


class EvaluateParams(Model):
    """`changes` has the keys full_data, where all real images are trained on, and ipc_10 and the like."""

    seeds: Annotated[int, Field(ge=2)]
    recipe: Recipe
    changes: dict[Annotated[str, Field(pattern=r"^(full_data|ipc_[1-9]\d*)$")], RecipeChanges]


class GradientNormParams(Model):
    steps: Annotated[tuple[Steps, ...], Field(min_length=1), Distinct]
    images_per_class: Count


class AblationParams(Model):
    """`settings`: ablation -> setting -> what it changes: dotted keys of params.yaml, and `objective` and `space` where
    they are not dm and ld3m. One that changes nothing is the baseline, which the first of them measures for all."""

    iterations: Count
    architecture: Annotated[tuple[Architecture, ...], Field(min_length=2), Distinct]
    seeds: Annotated[int, Field(ge=2)]
    select_on_test: bool
    settings: dict[str, dict[str, dict[str, Any]]]

    @property
    def baseline(self) -> tuple[str, str]:
        """The ablation, and the setting of it, that measure the baseline."""
        return next((name, key) for name, of in self.settings.items() for key, changes in of.items() if not changes)


class Grid(Model):
    objective: Annotated[tuple[Objective, ...], Field(min_length=1), Distinct]
    space: Annotated[tuple[Space, ...], Field(min_length=1), Distinct]
    ipc: Annotated[tuple[Count, ...], Field(min_length=1), Distinct]
    control: Annotated[tuple[Control, ...], Distinct]
    architecture: Annotated[tuple[Architecture, ...], Field(min_length=1), Distinct]


class MoreCell(Model):
    """`runs` sets, all that is random drawn anew for each. The grid has the first of its cells: for these one more at
    least is added. `iterations`, of a cell that the grid lacks, replaces those of `distill`: for larger sets, whose
    iterations take longer."""

    objective: Objective
    space: Space
    ipc: Count
    runs: Count
    iterations: Count | None = None


class MoreControl(Model):
    control: Control
    ipc: Count
    runs: Count


class MoreParams(Model):
    """What the report adds to the main table. `seeds`: networks an architecture on the sets of runs after run 0."""

    seeds: Count
    cells: dict[str, MoreCell]  # <objective>-<space>-<ipc>
    controls: dict[str, MoreControl]  # <control>-<ipc>


def _cell(entry: MoreCell | MoreControl) -> tuple[str, str, int]:
    """(objective, space, ipc), of a control ("none", its name, ipc)."""
    if isinstance(entry, MoreControl):
        return "none", entry.control, entry.ipc
    return entry.objective, entry.space, entry.ipc


class Params(Model):
    seed: Whole
    paper: Annotated[bool, Field(strict=True)]  # `config.load_params` has laid profiles/paper.yaml over the others
    device: Literal["auto", "cpu", "cuda"]
    processes: Processes
    cluster: Annotated[str, Field(min_length=1)] | None  # the address of a Ray cluster
    checkpoint_minutes: Annotated[float, Field(ge=0)]
    dataset: str
    grid: Grid
    more: MoreParams
    datasets: dict[str, DatasetParams]
    prior: PriorParams
    gan: GanParams
    networks: dict[Architecture, NetworkParams]
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
        if "glad" in self.grid.space:
            raise ValueError(
                "grid.space has glad: put its cells in more.cells, so that the main table need not wait for its GAN"
            )
        for kind, entries in (("cells", self.more.cells), ("controls", self.more.controls)):
            for key, entry in entries.items():
                cell = _cell(entry)
                if key != "-".join(map(str, cell)).removeprefix("none-"):
                    raise ValueError(f"more.{kind}.{key} is the entry of {'-'.join(map(str, cell))}: name it so")
        if all(changes for of in self.ablations.settings.values() for changes in of.values()):
            raise ValueError("ablations.settings: one must change nothing ({}), the baseline of the others")
        if self.distill.network not in self.ablations.architecture:
            raise ValueError(f"ablations.architecture lacks {self.distill.network}, which is distill.network")
        for name in {*self.grid.architecture, self.distill.network}:
            if name not in self.networks:
                raise ValueError(f"networks.{name} is missing: its width and depth")
            for key in ("epochs", "learning_rates"):
                if name not in getattr(self.evaluate.recipe, key):
                    raise ValueError(f"evaluate.recipe.{key}.{name} is missing")
            for key, changes in self.evaluate.changes.items():
                if changes.epochs is not None and name not in changes.epochs:
                    raise ValueError(f"evaluate.changes.{key}.epochs.{name} is missing")
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
        if any(cell.space == "glad" for cell in self.more.cells.values()):
            side = 4 * 2 ** (len(self.gan.widths) - 1)
            if side != self.data.size_px:
                raise ValueError(
                    f"gan.widths has {len(self.gan.widths)} entries, which draw images of {side} px; needed are those "
                    f"of datasets.{self.dataset}.size_px = {self.data.size_px}: one entry for 4 px, one for each "
                    "doubling; or take the cells of glad out of more.cells"
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
        for objective in get_args(Objective):
            for space in get_args(Space):
                names, possible = self._learnables(objective, space), set()
                if space == "ld3m":
                    possible = {"z", "z_T"}  # the one that is not learned may keep its rate
                given = set(getattr(getattr(self.distill, objective), space).learning_rates)
                if not names <= given <= names | possible:
                    raise ValueError(
                        f"distill.{objective}.{space}.learning_rates has {', '.join(sorted(given))}; "
                        f"needed are {', '.join(sorted(names))}"
                    )
        return self

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

    def in_grid(self, objective: str, space: str, ipc: int) -> bool:
        """Whether the main table has a cell, or a control (objective "none", its name as space)."""
        if objective == "none":
            return space == "full_data" or space in self.grid.control and ipc in self.grid.ipc
        return objective in self.grid.objective and space in self.grid.space and ipc in self.grid.ipc

    def place(self, objective: str, space: str, ipc: int, run: int) -> str:
        """The folder under runs/ for a run of a cell. Those of `more` lie apart: DVC depends on folders, and the main
        table shall not wait for them."""
        return self.dataset if run == 0 and self.in_grid(objective, space, ipc) else f"{self.dataset}/more"

    def runs(self, objective: str, space: str, ipc: int, *, more: bool) -> range:
        """The runs of a cell: with `more` those that it adds (often none), else the grid's, which is run 0."""
        if not more:
            return range(1)
        entry = {_cell(entry): entry for entry in (*self.more.cells.values(), *self.more.controls.values())}
        cell = (objective, space, ipc)
        if cell not in entry:
            return range(0)
        first = 1 if self.in_grid(*cell) else 0
        return range(first, max(first + 1, entry[cell].runs))

    def networks_a_set(self, run: int) -> int:
        """How many networks of an architecture judge the set of a run."""
        return self.evaluate.seeds if run == 0 else self.more.seeds

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
        changes = self.evaluate.changes.get(f"ipc_{ipc}" if ipc else "full_data")
        if changes:
            recipe |= changes.model_dump(exclude_unset=True)
        chosen = {"epochs": recipe["epochs"][architecture], "learning_rate": recipe.pop("learning_rates")[architecture]}
        return recipe | chosen | {"warm_up": True, "strategy": self.data.augmentation}

    def trajectories_arguments(self) -> dict[str, Any]:
        """The arguments of `experts.train_experts` but the data and the network."""
        shared = {"strategy": self.data.augmentation, "seed": self.seed}
        shared |= {"processes": self.processes, "cluster": self.cluster}
        return self.trajectories.model_dump(exclude={"experts"}) | {"count": self.trajectories.experts} | shared

    def checkpoint(self, name: str, configuration: dict[str, Any], *, place: str | None = None) -> Checkpoint:
        """Where the run of that name keeps its state; `configuration` are plain values that it must find unchanged."""
        file = paths.checkpoint_file(place or self.dataset, name)
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
        """The arguments of `train_prior.recognised`."""
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
        """The arguments of `train_gan.recognised`."""
        return self.gan.check.model_dump() | {"strategy": self.data.augmentation, "seed": self.seed}

    def budget(self, objective: str, space: str, ipc: int = 1) -> Budget:
        """The budget of a cell, with the rates of what is learned in it alone.

        What is matched are means over the images of a class, so the gradient of one image falls as 1 / ipc: the rates
        in params.yaml are those of one image a class, and are `ipc` times as large for more.
        """
        given: Budget = getattr(getattr(self.distill, objective), space)
        rates = {
            name: given.learning_rates[name] * (1 if name == "student_lr" else ipc)
            for name in sorted(self._learnables(objective, space))
        }
        entry = None if self.in_grid(objective, space, ipc) else self.more.cells.get(f"{objective}-{space}-{ipc}")
        iterations = entry and entry.iterations or given.iterations
        return given.model_copy(update={"learning_rates": rates, "iterations": iterations})

    def lowers_memory(self, objective: str, space: str) -> tuple[str, ...]:
        """The settings that a cell needs less memory with, the lower they are."""
        matched = "objectives.mtt.student_batch" if objective == "mtt" else f"objectives.{objective}.real_batch"
        rendered = () if space == "pixel" else (f"spaces.{space}.render_batch",)
        kept = (
            ("spaces.ld3m.uncheckpointed_steps",) if space == "ld3m" and self.spaces.ld3m.uncheckpointed_steps else ()
        )
        return (*kept, *rendered, matched)
