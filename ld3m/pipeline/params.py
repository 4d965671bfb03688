"""params.yaml as one frozen model, whose blocks must fit each other."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ld3m.evaluation.controls import CONTROLS
from ld3m.method.objectives import OBJECTIVES
from ld3m.method.spaces import DEFAULT_LEARNED
from ld3m.models.diffusion_prior import HEAD_WIDTH
from ld3m.pipeline import blocks
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.devices import choose_device

PRIORS = {"pixel": "data", "glad": "gan", "ld3m": "prior"}  # space: the folder of its prior under runs/<dataset>


class Params(blocks.Model):
    seed: blocks.Whole
    device: Literal["auto", "cpu", "cuda"]
    processes: Annotated[int, Field(strict=True, ge=1, le=1024)]
    cluster: blocks.Text | None  # the address of a Ray cluster
    checkpoint_minutes: Annotated[float, Field(ge=0)]
    dataset: str
    cells: dict[blocks.Name, blocks.CellParams]
    controls: dict[blocks.Name, blocks.ControlParams]
    architectures: blocks.Architectures
    datasets: dict[blocks.Name, blocks.DatasetParams]
    prior: blocks.PriorParams
    gan: blocks.GanParams
    networks: dict[str, blocks.Network]
    trajectories: blocks.TrajectoriesParams
    objectives: blocks.Objectives
    spaces: blocks.Spaces
    distill: blocks.DistillParams
    evaluate: blocks.EvaluateParams
    gradient_norms: blocks.GradientNormParams
    ablations: blocks.AblationParams

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        if self.dataset not in self.datasets:
            raise ValueError(f"dataset = {self.dataset!r}: must be a key of datasets: {', '.join(self.datasets)}")
        self._check_models()
        self._check_cells()
        for objective, budgets in self.distill.__pydantic_extra__.items():
            for space in budgets:
                self.budget(objective, space)
        if all(changes for of in self.ablations.settings.values() for changes in of.values()):
            raise ValueError("ablations.settings has no baseline: add a setting that changes nothing, `name: {}`")
        if self.ablations.runs * self.ablations.seeds < 2:
            raise ValueError("ablations.seeds = 1: must be at least 2 with ablations.runs = 1, for an interval")
        if self.distill.network not in self.ablations.architecture:
            raise ValueError(f"ablations.architecture lacks {self.distill.network!r}, which is distill.network: add it")
        trained = {*self.architectures, *self.ablations.architecture, self.distill.network}
        recipe, overrides = self.evaluate.recipe, self.evaluate.recipe_overrides
        given = {"networks": self.networks, "evaluate.recipe.epochs": recipe.epochs}
        given |= {"evaluate.recipe.learning_rates": recipe.learning_rates}
        given |= {f"evaluate.recipe_overrides.{key}.epochs": of.epochs for key, of in overrides.items() if of.epochs}
        for key, of in given.items():
            if missing := trained - of.keys():
                listed = "architectures, ablations.architecture or distill.network"
                raise ValueError(f"{key}.{min(missing)} is missing: add it, for {min(missing)!r} is in {listed}")
            if unknown := of.keys() - self.networks.keys():
                raise ValueError(f"{key}.{min(unknown)} is of no network: networks has {', '.join(self.networks)}")
        needed = self.objectives.mtt.max_start_epoch - 1 + self.objectives.mtt.expert_epochs
        if self.trajectories.epochs != needed:
            raise ValueError(
                f"trajectories.epochs = {self.trajectories.epochs}: must be {needed}, the last epoch that "
                "objectives.mtt reads (max_start_epoch - 1 + expert_epochs)"
            )
        for name in ("dc", "dm"):
            if (epochs := getattr(self.objectives, name).trained_epochs) > needed:
                raise ValueError(f"objectives.{name}.trained_epochs = {epochs}: must be at most {needed}, of experts")
        return self

    def _check_models(self) -> None:
        if self.prior.classes and not self.prior.source:
            raise ValueError(
                "prior.classes lists classes of the prior in prior.source, which is empty: leave both empty"
            )
        given = self.prior.autoencoder
        if given.continuous_steps >= given.steps:
            raise ValueError(
                f"prior.autoencoder.continuous_steps = {given.continuous_steps}: must be below {given.steps}, which is "
                "prior.autoencoder.steps"
            )
        denoiser = self.prior.denoiser
        wanted = len(denoiser.widths) == 1 and not denoiser.widths[0] % HEAD_WIDTH
        if not (wanted if denoiser.kind == "dit" else len(denoiser.widths) > 1):
            raise ValueError(
                f"prior.denoiser.widths = {list(denoiser.widths)}: must have at least two entries for kind: unet, and "
                f"one, a multiple of {HEAD_WIDTH}, for kind: dit"
            )
        if (count := len(self.gan.widths)) != (needed := 1 + len(self.gan.discriminator_widths)):
            raise ValueError(
                f"gan.widths has {count} entries: must have {needed}, one more than gan.discriminator_widths"
            )
        if self.spaces.glad.layer >= (layers := 2 * count):
            raise ValueError(
                f"spaces.glad.layer = {self.spaces.glad.layer}: must be below {layers}, the number of layers of a GAN "
                "with these gan.widths"
            )

    def _check_cells(self) -> None:
        for key in self.cells.keys() & self.controls.keys():
            raise ValueError(f"cells.{key} and controls.{key}: one key for two entries, rename one")
        for key, cell in self.cells.items():
            for kind in ("objective", "space"):
                if (name := getattr(cell, kind)) not in (known := getattr(self, f"{kind}s").names()):
                    raise ValueError(f"cells.{key}.{kind} = {name!r}: there are {', '.join(known)} in {kind}s")
            needed = PRIORS.get(cell.space, cell.prior)
            reads_prior = cell.space == "pixel" and cell.prior == "prior"  # to start from herding
            if cell.prior != needed and not reads_prior:
                raise ValueError(f"cells.{key}.prior = {cell.prior!r}: {cell.space} needs {needed!r}")
            if cell.objective == "mtt" and cell.experts != "trajectories":
                raise ValueError(f"cells.{key}.experts = {cell.experts!r}: mtt needs trajectories")
            if cell.space not in self.distill.__pydantic_extra__.get(cell.objective, {}):
                raise ValueError(f"distill.{cell.objective}.{cell.space} is missing, which cells.{key} asks for")
        names = (*CONTROLS, "full_data")
        for key, control in self.controls.items():
            if control.control not in names and ":" not in control.control:
                known = f"{', '.join(names)}, or the import path of your own, package.module:name"
                raise ValueError(f"controls.{key}.control = {control.control!r}: must be one of {known}")
            if (control.ipc == 0) != (control.control == "full_data"):
                raise ValueError(
                    f"controls.{key}.ipc = {control.ipc}: must be 0 for full_data, and at least 1 for others"
                )
        seen: dict[tuple, str] = {}
        for kind, entries in (("cells", self.cells), ("controls", self.controls)):
            for key, entry in entries.items():
                for run in entry.runs:
                    row = (*entry.model_dump(include={"objective", "space", "control", "ipc"}).values(), run)
                    if row in seen:
                        raise ValueError(f"{kind}.{key}.runs has run {run}, which {kind}.{seen[row]} has too")
                    seen[row] = key

    @property
    def data(self) -> blocks.DatasetParams:
        """The parameters of the data set that is distilled."""
        return self.datasets[self.dataset]

    @property
    def on_device(self) -> str:
        """What `device` stands for on this machine."""
        return choose_device(self.device)

    @property
    def threads(self) -> int:
        """How many threads a single run uses for what can be done side by side; 1 on a GPU."""
        return self.processes if self.on_device == "cpu" else 1

    def networks_a_set(self, run: int) -> int:
        """How many networks of an architecture are trained on the set of a run."""
        return self.evaluate.seeds if run == 0 else self.evaluate.seeds_further_runs

    def network_arguments(self, architecture: str) -> dict[str, Any]:
        """The arguments of `networks.build` but the number of classes and the seed."""
        size = {"channels": self.data.channels, "size_px": self.data.size_px}
        return {"name": architecture} | size | self.networks[architecture].model_dump()

    def recipe(self, architecture: str, ipc: int) -> dict[str, Any]:
        """The arguments of `training.train`, except data and seed, for `ipc` images per class (0: all images)."""
        recipe = self.evaluate.recipe.model_dump()
        changes = self.evaluate.recipe_overrides.get(f"ipc_{ipc}" if ipc else "full_data")
        if changes:
            recipe |= changes.model_dump(exclude_unset=True)
        chosen = {"epochs": recipe["epochs"][architecture], "learning_rate": recipe.pop("learning_rates")[architecture]}
        return recipe | chosen | {"warm_up": True, "strategy": self.data.augmentation}

    def checkpoint(self, name: str, configuration: dict[str, Any]) -> Checkpoint:
        """Where the run of that name keeps its state; `configuration` are plain values that it must find unchanged."""
        file = paths.ROOT / "checkpoints" / self.dataset / f"{name}.safetensors"  # no output, which DVC would delete
        given = configuration | {"device": self.on_device}  # which has rounding, and groups of networks, of its own
        return Checkpoint(file, minutes=self.checkpoint_minutes, configuration=given)

    def training_checkpoint(self, part: str, data_sha256: str) -> Checkpoint:
        """The checkpoint of training autoencoder, denoiser, gan or trajectories on the data with that fingerprint."""
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

    def prior_source_arguments(self) -> dict[str, Any]:
        """The arguments of `prior_io.fitted` but the prior and the names of the classes."""
        given = {"source": self.prior.source, "size_px": self.data.size_px, "channels": self.data.channels}
        subset = self.data.classes if isinstance(self.data.classes, str) else None
        return given | {"classes": self.prior.classes, "subset": subset}

    def budget(self, objective: str, space: str, ipc: int = 1, *, iterations: int | None = None) -> blocks.Budget:
        """The budget of a cell: its iterations (`iterations` replaces those given) and the rates of what it learns.

        What is matched are means over the images of a class, so the gradient of one image falls as 1 / ipc. The rates
        in params.yaml are those for one image per class; those of SGD are `ipc` times as large for more.
        """
        given: blocks.Budget = self.distill.__pydantic_extra__[objective][space]
        ld3m, learned = self.spaces.ld3m, set(given.learning_rates)
        latent = DEFAULT_LEARNED[ld3m.skip] if ld3m.learn == "auto" else ld3m.learn
        if space == "ld3m":
            learned -= {"z", "z_T"} - {latent}  # the one not learned may keep its rate
        if objective in OBJECTIVES and space in PRIORS:
            needed = {"pixel": {"images"}, "glad": {"f", "w"}, "ld3m": {latent, "c"}}[space]
            needed |= {"student_lr"} if objective == "mtt" else set()
            if learned != needed:
                raise ValueError(
                    f"distill.{objective}.{space}.learning_rates has {', '.join(sorted(given.learning_rates))}; needed "
                    f"are {', '.join(sorted(needed))}"
                )
        factors = {"student_lr": 1} if given.optimizer == "sgd" else dict.fromkeys(learned, 1)
        rates = {name: given.learning_rates[name] * factors.get(name, ipc) for name in sorted(learned)}
        return given.model_copy(update={"learning_rates": rates, "iterations": iterations or given.iterations})

    def lowers_memory(self, objective: str, space: str) -> tuple[str, ...]:
        """The keys of params.yaml to lower where a cell runs out of memory."""
        matched = "objectives.mtt.student_batch" if objective == "mtt" else f"objectives.{objective}.real_batch"
        rendered = () if space == "pixel" else (f"spaces.{space}.render_batch",)
        keeps_graphs = space == "ld3m" and self.spaces.ld3m.uncheckpointed_steps
        return (*(("spaces.ld3m.uncheckpointed_steps",) if keeps_graphs else ()), *rendered, matched)
