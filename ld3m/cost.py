"""What the work of params.yaml will cost, before it is done: counted, and timed in a few iterations of the real code.

    python -m ld3m.cost                       # params.yaml as it is
    python -m ld3m.cost imagenet128           # with a profile laid over it, or several in their order: names or files

Data and priors that are not there are replaced by random ones of the same shapes. What would take more than seconds, or
half of the free memory, is tried with fewer images or steps, and the table says with how many. A cell costs what its
space and its objective do: they take turns, and are tried apart. Left out are decoding, checks of the priors, the
images of controls, and figures.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from ld3m import paths
from ld3m.config import ablation_settings, apply_profile, load_params
from ld3m.devices import describe
from ld3m.experiment import CARD_NETWORKS, Experiment
from ld3m.measure import Line, Plane, clock, peak_of
from ld3m.memory import available_bytes, too_little, used_bytes
from ld3m.networks import flat_parameters
from ld3m.rehearsal import Rehearsal
from ld3m.schema import Params
from ld3m.tables import cells
from ld3m.train_gan import GROUP

TABLE, REPORT, THERE = "main table", "report", "there already"  # the report's are what `make report` adds
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # as dvc.yaml has it for what trains on all threads
    "HF_HUB_OFFLINE": "1",  # nothing is fetched for an estimate
}
START = "import papermill, ld3m.experiment, ld3m.figures"  # what every stage does first


@dataclass(frozen=True)
class Cost:
    """Of one piece of work, or of `count` alike: iterations of `seconds` each, and `checks` seconds of checks."""

    work: str
    images: int
    parameters: int  # that are learned
    iterations: int
    seconds: float
    peak: float  # bytes, of all its processes together
    lower: tuple[str, ...]  # settings: the lower, the less memory
    checks: float = 0.0
    tried: str = ""  # how much of an iteration was, where it was not the whole
    count: int = 1
    part: str = TABLE

    @property
    def total(self) -> float:
        """Seconds."""
        return self.count * (self.iterations * self.seconds + self.checks)


@dataclass(frozen=True)
class Meter:
    """Tries each part of the work once, when it is first asked for."""

    rehearsal: Rehearsal
    known: dict[Any, Any] = field(default_factory=dict)

    @property
    def params(self) -> Params:
        return self.rehearsal.params

    def images(self, split: str) -> int:
        return len(getattr(self.rehearsal.dataset, split))

    @property
    def classes(self) -> int:
        return len(self.rehearsal.dataset.train.classes)

    def rendering(self, space: str, images: int) -> Plane:
        return self._once(("rendering", space, images), lambda: self.rehearsal.rendering(space, images=images))

    def matching(self, objective: str, ipc: int) -> Plane:
        return self._once(("matching", objective, ipc), lambda: self.rehearsal.matching(objective, ipc=ipc))

    def networks(self, architectures: Sequence[str], batch: int) -> dict[str, tuple[Line, Line]]:
        """Lines of training and of testing, tried up to the batch, or a larger one that was asked for before."""
        if lacking := [name for name in architectures if self.known.get(name, (0, None))[0] < batch]:
            found = self.rehearsal.networks(lacking, batch=batch, test_batch=self.params.evaluate.recipe.batch)
            self.known.update({name: (batch, lines) for name, lines in found.items()})
        return {name: self.known[name][1] for name in architectures}

    def _once(self, key: Any, measure: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]


def of_prior(meter: Meter) -> Iterator[Cost]:
    """The two trainings of the stage `prior`."""
    prior = meter.rehearsal.new_prior()
    parts = {"autoencoder": (prior.autoencoder,), "denoiser": (prior.unet, prior.embedding)}
    for (name, modules), line in zip(parts.items(), meter.rehearsal.prior_training(), strict=True):
        yield Cost(
            f"prior, {name}",
            images=meter.images("train"),
            parameters=sum(parameter.numel() for module in modules for parameter in module.parameters()),
            iterations=getattr(meter.params.prior, name).steps,
            seconds=line.seconds(),
            peak=line.peak(),
            lower=(f"prior.{name}.batch",),
            tried=line.tried("images"),
            part=THERE if paths.prior_folder(meter.params.dataset).exists() else TABLE,
        )


def of_gan(meter: Meter) -> Iterator[Cost]:
    line = meter.rehearsal.gan_training()
    yield Cost(
        "gan",
        images=meter.images("train"),
        parameters=len(flat_parameters(meter.rehearsal.new_gan())),
        iterations=meter.params.gan.steps,
        seconds=line.seconds(),
        peak=line.peak(),
        lower=("gan.batch",),
        tried=line.tried(f"groups of {GROUP} images"),
        part=THERE if paths.gan_folder(meter.params.dataset).exists() else REPORT,
    )


def of_trajectories(meter: Meter) -> Iterator[Cost]:
    given, network = meter.params.trajectories, meter.params.distill.network
    yield of_networks(
        meter,
        "trajectories",
        (network,),
        images=meter.images("train"),
        batch=given.batch,
        epochs={network: given.epochs},
        seeds=given.experts,
        tested=meter.images("validation"),
        lower=("trajectories.batch", "processes"),
    )


def of_judging(meter: Meter, ipc: int, *, sets: int = 1, part: str = TABLE) -> Iterator[Cost]:
    """Training every architecture on each of some sets of `ipc` images a class; 0 stands for the full data."""
    given, names = meter.params.evaluate, meter.params.grid.architecture
    changed = given.recipe if ipc else given.full_data
    yield of_networks(
        meter,
        f"evaluate {sets} of {ipc} a class" if ipc else "evaluate full data",
        names,
        images=ipc * meter.classes or meter.images("train"),
        batch=changed.batch,
        epochs=changed.epochs if ipc else dict.fromkeys(names, changed.epochs),
        seeds=given.seeds,
        tested=meter.images("test"),
        lower=("evaluate.recipe.batch" if ipc else "evaluate.full_data.batch", "processes"),
        count=sets,
        part=part,
    )


def of_networks(
    meter: Meter,
    work: str,
    architectures: Sequence[str],
    *,
    images: int,
    batch: int,
    epochs: dict[str, int],
    seeds: int,
    tested: int,
    **labels: Any,
) -> Cost:
    """Trains `seeds` networks of each architecture, `processes` of them at once, and tests each on `tested` images."""
    processes, batch = meter.params.processes, min(batch, images)
    lines = meter.networks(architectures, batch)
    whole, rest = divmod(images, batch)
    seconds = 0.0
    for name, (training, testing) in lines.items():
        epoch = whole * training.seconds(batch) + (training.seconds(rest) if rest else 0)
        seconds += seeds * (epochs[name] * epoch + tested / testing.largest * testing.seconds(testing.largest))
    steps = sum(seeds * epochs[name] for name in lines) * ceil(images / batch)
    count = seeds * len(lines)
    peak = max(max(training.peak(batch), testing.peak()) for training, testing in lines.values())
    largest = min(training.largest for training, _ in lines.values())
    return Cost(
        work,
        images=images,
        parameters=sum(len(flat_parameters(meter.rehearsal.new_network(name)(seed=0))) for name in lines),
        iterations=steps,
        seconds=seconds * ceil(count / processes) / count / steps,
        peak=peak if processes == 1 else used_bytes(meter.params.on_device) + processes * peak,
        tried=f"{largest} of {batch} images" if largest < batch else "",
        **labels,
    )


def of_checks(meter: Meter, ipc: int) -> Cost:
    """One check on validation data."""
    params, network = meter.params, meter.params.distill.network
    return of_networks(
        meter,
        "check",
        (network,),
        images=ipc * meter.classes,
        batch=params.evaluate.recipe.batch,
        epochs=params.evaluate.recipe.epochs,
        seeds=params.distill.validation_seeds,
        tested=meter.images("validation"),
        lower=("evaluate.recipe.batch", "processes"),
    )


def of_cell(meter: Meter, objective: str, space: str, ipc: int) -> Iterator[Cost]:
    given, images = meter.params.distill, ipc * meter.classes
    rendering, matching, check = meter.rendering(space, images), meter.matching(objective, ipc), of_checks(meter, ipc)
    units = ("images", "steps of the student") if objective == "mtt" else ("real images", "rounds of classes")
    yield Cost(
        f"distill {objective}-{space}-{ipc}",
        images=images,
        parameters=images * meter.rehearsal.learned(space) + (objective == "mtt"),
        iterations=meter.params.budget(objective, space, ipc).iterations,
        seconds=images / rendering.wide.full * rendering.seconds() + matching.seconds(),
        peak=peak_of(rendering, matching, device=meter.params.on_device),
        lower=meter.params.lowers_memory(objective, space),
        checks=(given.validations + max(1, CARD_NETWORKS / given.validation_seeds)) * check.total,
        tried="; ".join(filter(None, (rendering.tried("images", "steps"), matching.tried(*units)))),
        part=TABLE if space in meter.params.grid.space else REPORT,
    )


def of_gradient_norms(meter: Meter) -> Iterator[Cost]:
    """Every skip with each latent at every number of steps: as an iteration of DM for each network."""
    given = meter.params.gradient_norms
    images = given.images_per_class * meter.classes
    rendering, matching = meter.rendering("ld3m", images), meter.matching("dm", given.images_per_class)
    chains = [images / rendering.wide.full * rendering.seconds(steps) for steps in given.steps]
    yield Cost(
        "gradient norms",
        images=images,
        parameters=images * meter.rehearsal.learned("ld3m"),
        iterations=6 * given.networks * len(chains),
        seconds=sum(chains) / len(chains) + matching.seconds(),
        peak=peak_of(rendering, matching, device=meter.params.on_device),
        lower=meter.params.lowers_memory("dm", "ld3m"),
        tried=rendering.tried("images", "steps"),
    )


def of_ablation(meter: Meter, name: str, settings: dict[str, tuple[Params, str, str]]) -> Iterator[Cost]:
    """All settings, `processes` of them at once. One takes what the cell of its objective and space does, but for the
    number of its steps; a class at a time is in work."""
    given, processes, images = meter.params.ablations, meter.params.processes, meter.classes
    at_once = processes if meter.params.on_device == "cpu" else 1  # classes, in a cell
    seconds, iterations, peaks, judged = 0.0, 0, [], 0
    for params, objective, space in settings.values():
        rendering, matching = meter.rendering(space, images), meter.matching(objective, 1)
        chain = rendering.seconds(params.spaces.ld3m.steps if space == "ld3m" else None)
        matched = matching.seconds() * (1 if objective == "mtt" else at_once)
        count = params.budget(objective, space).iterations
        iterations += count
        seconds += count * (images / rendering.wide.full * chain + matched)
        peaks.append(peak_of(rendering, matching, device=meter.params.on_device))
        judged += 1 if not params.ablations.select_on_test else params.distill.validations + 1
    tests = of_networks(
        meter,
        "tests",
        given.architecture,
        images=images,
        batch=meter.params.evaluate.recipe.batch,
        epochs=meter.params.evaluate.recipe.epochs,
        seeds=given.seeds,
        tested=meter.images("test"),
        lower=(),
    )
    turns = ceil(len(settings) / processes) / len(settings)
    yield Cost(
        f"ablation {name}",
        images=images,
        parameters=images * meter.rehearsal.learned("ld3m"),
        iterations=iterations,
        seconds=turns * seconds / iterations,
        peak=max(peaks) if processes == 1 else used_bytes(meter.params.on_device) + processes * max(peaks),
        lower=(*meter.params.lowers_memory("dm", "ld3m"), "processes"),
        checks=judged * tests.total,
        part=REPORT,
    )


def of_everything(meter: Meter, ablations: dict[str, dict[str, tuple[Params, str, str]]]) -> Iterator[Cost]:
    """Every stage and cell of the pipeline."""
    params = meter.params
    torch.set_num_threads(os.cpu_count())  # as the two stages that train priors have it
    yield from of_prior(meter)
    yield from of_gan(meter)
    torch.set_num_threads(1)
    everything, table = cells(params.with_more()), cells(params)
    largest = max(params.evaluate.full_data.batch, *(ipc * meter.classes for *_, ipc in everything))
    names = {*params.grid.architecture, *params.ablations.architecture, params.distill.network}
    meter.networks(sorted(names), min(largest, params.evaluate.recipe.batch))  # once, for all that follows
    if "mtt" in params.grid.objective:
        yield from of_trajectories(meter)
    for objective, space, ipc in everything:
        if objective != "none":
            yield from of_cell(meter, objective, space, ipc)
    for part, found in ((TABLE, table), (REPORT, [cell for cell in everything if cell not in table])):
        counted = [ipc for *_, ipc in found]
        for ipc in sorted(set(counted)):
            yield from of_judging(meter, ipc, sets=counted.count(ipc), part=part)
    yield from of_gradient_norms(meter)
    for name, settings in ablations.items():
        yield from of_ablation(meter, name, settings)


def announce(of: Callable[..., Iterator[Cost]], given: Experiment | Params, *what: Any) -> None:
    """Prints what a notebook is about to cost: `of` is one of the functions here, `what` its arguments after the meter.

    TooLittleMemory where it will not fit.
    """
    experiment = given if isinstance(given, Experiment) else Experiment(given)
    device = experiment.params.on_device
    for cost in of(Meter(Rehearsal.of(experiment)), *what):
        checks = f" and {duration(cost.checks)} of checks" if cost.checks else ""
        tried = f" (tried with {cost.tried})" if cost.tried else ""
        print(
            f"{cost.work}: {cost.images:,} images, {cost.parameters:,} learned parameters, {cost.iterations:,} "
            f"iterations of {duration(cost.seconds)}{checks}: {duration(cost.total)} and at most "
            f"{cost.peak / 2**30:.2f} GiB on {describe(device)}{tried}"
        )
        require(cost, device)


def require(cost: Cost, device: str) -> None:
    """Raises TooLittleMemory where a piece of work will not fit."""
    room = available_bytes(device) + used_bytes(device)
    if cost.peak > room:
        needed = f"{cost.work} needs about {cost.peak / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are there"
        raise too_little(needed, *cost.lower)


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


ROW = "{:<24} {:>8} {:>12} {:>11} {:>9} {:>9} {:>9}  {}"


def show(meter: Meter, ablations: dict[str, dict[str, tuple[Params, str, str]]]) -> None:
    """Prints a row for every piece of work as soon as it has been tried, and the sums."""
    params, device = meter.params, meter.params.on_device
    room = available_bytes(device) + used_bytes(device)
    print(f"{params.dataset} on {describe(device)}, {room / 2**30:.1f} GiB free; processes: {params.processes}")
    print(ROW.format("", "images", "learned", "iterations", "each", "in all", "memory", ""))
    costs = []
    for cost in of_everything(meter, ablations):
        numbers = f"{cost.images:,}", f"{cost.parameters:,}", f"{cost.iterations:,}"
        notes = [f"tried with {cost.tried}"] if cost.tried else []
        notes += [f"TOO LITTLE MEMORY: lower {' or '.join(cost.lower)}"] if cost.peak > room else []
        notes += [] if cost.part == TABLE else [cost.part]
        times = duration(cost.seconds), duration(cost.total)
        print(ROW.format(cost.work, *numbers, *times, f"{cost.peak / 2**30:.2f} GiB", "; ".join(notes)), flush=True)
        costs.append(cost)
    start = clock(lambda: subprocess.run([sys.executable, "-c", START], check=True, cwd=paths.ROOT))
    for part in (TABLE, REPORT):
        found = [cost for cost in costs if cost.part == part]
        starts = sum(cost.count for cost in found) * start
        print(f"{part}: {duration(sum(cost.total for cost in found))}, and {duration(starts)} in which stages start")
    experts = params.trajectories.experts * (params.trajectories.epochs + 1) * 4
    weights = experts * len(flat_parameters(meter.rehearsal.new_network(params.distill.network)(seed=0)))
    decoded = sum(map(meter.images, ("train", "validation", "test"))) * prod(meter.rehearsal.dataset.train.shape)
    print(f"disk: {weights / 2**30:.2f} GiB of trajectories, {decoded / 2**30:.2f} GiB of decoded images")
    print("\n".join(meter.rehearsal.absent))


def main(profiles: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / paths.PARAMS.name
        file.write_bytes(paths.PARAMS.read_bytes())
        for profile in profiles:
            apply_profile(Path(profile), path=file)
        params = load_params(path=file)
        ablations = {name: ablation_settings(name, path=file) for name in params.ablations.settings}
    show(Meter(Rehearsal(params)), ablations)


if __name__ == "__main__":
    if not ENVIRONMENT.items() <= os.environ.items():  # libraries read it when they are loaded, and they are by now
        os.execve(sys.executable, [sys.executable, "-m", "ld3m.cost", *sys.argv[1:]], os.environ | ENVIRONMENT)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
