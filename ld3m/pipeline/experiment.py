"""From the parameters of params.yaml to the objects of one cell: data, prior, networks, objective, synthetic set."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ld3m.data import dataset as data
from ld3m.evaluation.artefact import read_artefact, write_artefact
from ld3m.evaluation.controls import CONTROLS, chosen
from ld3m.evaluation.evaluate import EvaluationJob, evaluate_sets
from ld3m.evaluation.experts import Experts, open_experts
from ld3m.method.distill import Distilled, Objective, Synthetic, distill
from ld3m.method.objectives import OBJECTIVES
from ld3m.method.spaces import SPACES
from ld3m.models.diffusion_prior import IncompatiblePrior, Prior
from ld3m.models.gan import Generator, build_generator, load_generator
from ld3m.models.networks import build, flat_parameters
from ld3m.models.prior_io import linked_source, load_autoencoder, load_prior
from ld3m.models.prior_variants import unconditional, with_random_unet
from ld3m.models.train_prior import build_prior
from ld3m.pipeline.cells import Cell, runs_path
from ld3m.pipeline.factories import own
from ld3m.pipeline.params import PRIORS, Params
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.memory import explain_out_of_memory, peak_gib
from ld3m.runtime.parallel import end_workers
from ld3m.runtime.seeds import derive
from ld3m.runtime.storage import require_space, write_json


def shared(load: Callable[["Experiment"], Any]) -> Any:
    """A property that is loaded when it is first asked for, and shared by all runs."""

    @property
    def get(self: "Experiment") -> Any:
        if load.__name__ not in self.loaded:
            self.loaded[load.__name__] = load(self)
        return self.loaded[load.__name__]

    return get


@dataclass(frozen=True)
class Experiment:
    """Everything that the cells of one params.yaml share; each part is loaded when it is first asked for.

    Of a cell there may be several runs: from other real images, with other noise, batches and networks. The
    data set, the prior and the experts are the same for all.
    """

    params: Params
    run: int = 0
    loaded: dict[str, Any] = field(default_factory=dict, repr=False)  # shared with `of_run`'s

    def of_run(self, run: int) -> "Experiment":
        """Return the experiment of another run, which shares what is loaded."""
        return replace(self, run=run)

    @property
    def seed(self) -> int:
        return derive(self.params.seed, "run", self.run)

    @shared
    def dataset(self) -> data.Dataset:
        given = self.params.data
        return data.load_dataset(
            **given.model_dump(exclude={"augmentation", "normalization"}),
            name=self.params.dataset,
            normalization=given.normalization and data.Normalization(**given.normalization.model_dump()),
            seed=self.params.seed,
            device=self.params.on_device,
        )

    @shared
    def prior(self) -> Prior:
        folder, wanted = runs_path(self.params.dataset, "prior"), self.params.prior.source
        if (there := linked_source(folder)) != wanted:
            raise IncompatiblePrior(
                f"prior.source is {wanted}, but {folder} holds {there or 'no such prior'}: `dvc repro prior` first"
            )
        prior, change = self._loaded("prior", load_prior), self.params.spaces.ld3m.prior
        if change == "unconditional":
            prior = unconditional(prior)
        if change == "random":
            prior = with_random_unet(prior, seed=self.params.seed)
        return self.launched(prior)

    def _loaded(self, stage: str, load: Callable[[Path], Any]) -> Any:
        """The prior or the GAN that a stage wrote; ValueError where it does not fit the data set."""
        try:
            model = load(runs_path(self.params.dataset, stage))
        except FileNotFoundError as error:
            again = f"`dvc pull {stage}` brings the embedded one, `dvc repro -f {stage}` trains one"
            raise FileNotFoundError(f"{error}; {again}") from error
        self.check_fit(model)
        return model

    def check_fit(self, model: Prior | Generator) -> None:
        """Raise ValueError where a prior or a GAN does not fit the images and the classes of the data set."""
        given = self.params.data
        model.check(size_px=given.size_px, channels=given.channels, classes=len(self.dataset.train.classes))

    def new_prior(self) -> Prior:
        """Return a prior of the sizes in params.yaml, to be trained; ValueError if they do not fit the images."""
        autoencoder, denoiser = self.params.prior.autoencoder, self.params.prior.denoiser
        prior = build_prior(
            size_px=self.params.data.size_px,
            channels=self.params.data.channels,
            classes=len(self.dataset.train.classes),
            autoencoder=autoencoder.source and load_autoencoder(autoencoder.source),
            latent_channels=autoencoder.latent_channels,
            codebook=autoencoder.codebook,
            autoencoder_widths=autoencoder.widths,
            kind=denoiser.kind,
            widths=denoiser.widths,
            blocks=denoiser.blocks,
            conditioning_width=denoiser.conditioning_width,
            seed=self.params.seed,
        )
        return self._new(prior, "prior.autoencoder and prior.denoiser.widths")

    def _new(self, model: Any, keys: str) -> Any:
        try:
            self.check_fit(model)
        except ValueError as error:
            raise ValueError(f"{keys} do not fit datasets.{self.params.dataset}: {error}") from error
        return model.to(self.params.on_device)

    def launched(self, prior: Prior) -> Prior:
        """The prior on the device and in the precision of params.yaml, its kernels launched in the way asked for."""
        given = self.params.spaces.ld3m
        prior = prior.to(self.params.on_device).in_precision(given.precision)
        return prior if given.uncheckpointed_steps else prior.with_cuda_graphs()

    @shared
    def gan(self) -> Generator:
        return self._loaded("gan", load_generator).to(self.params.on_device)

    def new_gan(self) -> Generator:
        """Return an untrained GAN of the sizes in params.yaml; ValueError if they do not fit the images."""
        gan = build_generator(
            classes=len(self.dataset.train.classes),
            channels=self.params.data.channels,
            noise_width=self.params.gan.noise_width,
            w_width=self.params.gan.w_width,
            widths=self.params.gan.widths,
            seed=self.params.seed,
        )
        return self._new(gan, "gan.widths")

    def new_network(self, architecture: str) -> Callable[..., nn.Module]:
        """Called with `seed=...`, gives a freshly initialized network of the data set's size."""
        given = self.params.network_arguments(architecture)
        if "factory" in given:
            given["factory"] = own("network", f"networks.{architecture}.factory", given["factory"])
        return partial(build, classes=len(self.dataset.train.classes), device=self.params.on_device, **given)

    def recipes(self, ipc: int) -> dict[str, dict[str, Any]]:
        """Return how every architecture is trained on sets of `ipc` images a class (0: all real images)."""
        return {name: self.params.recipe(name, ipc) for name in self.params.architectures}

    def initial(self, ipc: int) -> tuple[Tensor, Tensor]:
        """Random real pixels (N, C, H, W) and labels (N,), other ones in every run."""
        train = self.dataset.train
        index = data.initial_indices(train, ipc=ipc, seed=self.seed)
        return train.x(index), train.labels[index]

    def synthetic(self, space: str, ipc: int, *, prior: str | None = None, **changes: Any) -> Synthetic:
        """Return the synthetic set at iteration 0; `changes` replace parameters of the space (`skip="none"`, say).

        `prior` is that of the cell, by default that of the space ("data", none, for one of your own).
        """
        block = getattr(self.params.spaces, space).model_copy(update=changes)
        is_chosen = getattr(block, "start", None) == "herding"
        if is_chosen and prior == "data":
            raise ValueError(f"spaces.{space}.start = 'herding' reads the prior: give its cells `prior: prior`")
        x, labels = chosen(self, ipc) if is_chosen else self.initial(ipc)
        start = SPACES[space] if space in SPACES else own("space", f"spaces.{space}.factory", block.factory)
        return start(
            x,
            labels,
            normalization=self.dataset.normalization,
            prior=self.prior_of(prior or PRIORS.get(space, "data")),
            seed=self.seed,
            threads=self.params.threads,
            **block.options(),
        )

    def prior_of(self, name: str) -> Prior | Generator | None:
        """Return the prior that a cell names: "prior", "gan", or "data" for none."""
        return None if name == "data" else getattr(self, name)

    def objective(self, name: str) -> Objective:
        block = getattr(self.params.objectives, name)
        make = OBJECTIVES[name] if name in OBJECTIVES else own("objective", f"objectives.{name}.factory", block.factory)
        return make(
            self.dataset.train,
            normalization=self.dataset.normalization,
            new_network=self.new_network(self.params.distill.network),
            experts=self.experts,
            strategy=self.params.data.augmentation,
            threads=self.params.threads,
            seed=derive(self.seed, name),
            **block.options(),
        )

    def experts(self, *, last_epoch: int) -> Experts:
        return open_experts(
            runs_path(self.params.dataset, "trajectories"),
            count=self.params.trajectories.experts,
            last_epoch=last_epoch,
            parameters=len(flat_parameters(self.new_network(self.params.distill.network)(seed=0))),
        )

    def validate(self, images: Tensor, labels: Tensor) -> list[float]:
        """Validation accuracies, in [0, 1], of networks of the distilling architecture trained on the images."""
        given = self.params.distill
        recipes = {given.network: self.params.recipe(given.network, self._ipc(labels))}
        job = EvaluationJob(images.__getitem__, labels, recipes, range(given.validation_seeds), self.seed)
        return self.evaluate([job], self.dataset.validation)[0][given.network]

    def evaluation_job(self, images: Tensor | None, labels: Tensor, *, networks: int | None = None) -> EvaluationJob:
        """The images (None: all real ones) and the networks to train on them, by default as many as `evaluate` says."""
        ipc = 0 if images is None else self._ipc(labels)
        real = partial(self.dataset.train.normalized, self.dataset.normalization)
        fetch = real if images is None else images.__getitem__
        seeds = range(networks or self.params.networks_a_set(self.run))
        return EvaluationJob(fetch, labels, self.recipes(ipc), seeds, self.seed)

    def evaluate(
        self, jobs: list[EvaluationJob], real: data.Split, *, checkpoint: Checkpoint | None = None
    ) -> list[dict[str, list[float]]]:
        """For every set the accuracies, in [0, 1], on a split of real images: {architecture: one a network}."""
        with explain_out_of_memory("evaluate.recipe.batch", "that of evaluate.recipe_overrides", "processes"):
            return evaluate_sets(
                jobs,
                real,
                normalization=self.dataset.normalization,
                networks={name: self.new_network(name) for job in jobs for name in job.recipes},
                processes=self.params.processes,
                cluster=self.params.cluster,
                checkpoint=checkpoint,
            )

    def _ipc(self, labels: Tensor) -> int:
        """Images a class, of a set with unlike numbers about."""
        return max(1, round(len(labels) / len(self.dataset.train.classes)))

    def control(self, name: str, ipc: int) -> tuple[Tensor | None, Tensor]:
        """Return normalized images (N, C, H, W) and labels of a control; None stands for all real training images."""
        if name == "full_data":
            return None, self.dataset.train.labels
        return (CONTROLS[name] if name in CONTROLS else own("control", "control", name))(self, ipc)

    def distill(self, cell: Cell) -> Path:
        """Distill one cell, from the checkpoint of an interrupted run, which the caller removes; return its folder."""
        configuration = self.configuration(cell) | {"normalization": vars(self.dataset.normalization)}
        params, checkpoint = self.params, self.checkpoint_of(cell, configuration)
        budget = params.budget(*cell.row, iterations=cell.iterations)
        with explain_out_of_memory(*params.lowers_memory(cell.objective, cell.space)):
            synthetic = self.synthetic(cell.space, cell.ipc, prior=cell.prior)
            values = sum(tensor.numel() for tensor in synthetic.tensors().values())
            require_space(cell.artefact(self.run), 16 * values + 2**20)
            run = distill(
                synthetic,
                self.objective(cell.objective),
                iterations=budget.iterations,
                learning_rates=budget.learning_rates,
                optimizer=budget.optimizer,
                momentum=params.distill.momentum,
                validate=partial(self.validate, labels=synthetic.labels),
                validation_checks=params.distill.validation_checks,
                checkpoint=checkpoint,
            )
        with checkpoint:  # one process writes
            return self._write(run, synthetic, cell)

    def _write(self, run: Distilled, synthetic: Synthetic, cell: Cell) -> Path:
        """Write the artefact of a finished run, and what the run cost; return the artefact's folder."""
        folder, iterations = cell.artefact(self.run), len(run.history)
        cost = {"iterations": iterations, "images rendered": iterations * len(synthetic.labels)}
        if cell.space == "ld3m":
            given = self.params.spaces.ld3m
            cost["denoising steps, forward and backward"] = iterations * given.steps
            cost["recomputed forward steps"] = iterations * max(0, given.steps - given.uncheckpointed_steps)
        end_workers()
        write_artefact(
            folder,
            run.best,
            labels=synthetic.labels,
            classes=self.dataset.train.classes,
            normalization=self.dataset.normalization,
            name=f"{cell.dataset} {cell.name} run {self.run}",
            record={
                "configuration": self.configuration(cell),
                "history": run.history,
                "validation": run.validation,
                "cost": cost,
                "score": {"split": "validation", "accuracy": run.chosen["accuracies"]},
            },
        )
        measured = {"iterations": iterations, "seconds": run.seconds, "peak_mib": 1024 * peak_gib()}
        write_json(cell.cost_file(self.run), measured)
        return folder

    def checkpoint_of(self, cell: Cell, configuration: dict[str, Any]) -> Checkpoint:
        return self.params.checkpoint(f"{cell.key}-run-{self.run}", configuration)

    def images_of(self, cell: Cell) -> tuple[Tensor | None, Tensor]:
        """Return images and labels of a distilled cell from disk, or of a control."""
        if cell.objective == "none":
            with explain_out_of_memory("spaces.ld3m.render_batch"):
                return self.control(self.params.controls[cell.key].control, cell.ipc)
        tensors, _ = read_artefact(cell.artefact(self.run))
        return tensors["images"].to(self.params.on_device), tensors["labels"]

    def configuration(self, cell: Cell) -> dict[str, Any]:
        """Return plain values that say how a cell was made, and which a resumed run must find unchanged."""
        params, architecture = self.params, self.params.distill.network
        objective, space, ipc = cell.row
        budget = params.budget(*cell.row, iterations=cell.iterations)
        prior = self.prior_of(cell.prior)
        return {
            "objective": objective,
            "space": space,
            "ipc": ipc,
            "seed": self.seed,
            "run": self.run,
            "dataset": params.dataset,
            "augmentation": params.data.augmentation,
            "network": architecture,
            "network_size": params.networks[architecture].model_dump(),
            "iterations": budget.iterations,
            "learning_rates": budget.learning_rates,
            "optimizer": budget.optimizer,
            "momentum": params.distill.momentum,
            "validation_checks": params.distill.validation_checks,
            "validation_seeds": params.distill.validation_seeds,
            "validation_recipe": params.recipe(architecture, ipc),
            "objective_parameters": getattr(params.objectives, objective).model_dump(),
            "trajectories": params.trajectories.model_dump() if objective == "mtt" else None,
            "space_parameters": getattr(params.spaces, space).model_dump(),
            "data_sha256": self.dataset.fingerprint,
            "prior_sha256": prior.fingerprint() if prior else None,
        }
