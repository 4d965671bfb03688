"""What the work of params.yaml will cost, before it is done: counted, and timed in a few iterations of the real code.

    python -m ld3m.pipeline.cost                       # params.yaml as it is
    python -m ld3m.pipeline.cost imagenet128           # with a profile applied, or several: names or files

Data and priors that are not there are replaced by random ones of the same shapes. What would take more than seconds, or
half of the free memory, is tried with fewer images or steps, and the table says with how many. A cell costs what its
space and its objective do: they take turns, and are tried apart. Left out are decoding, checks of the priors, the
images of controls, and figures.
"""

import argparse
import errno
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from ld3m.evaluation.experts import snapshot_bytes
from ld3m.method.objectives import DISTANCES
from ld3m.models.networks import flat_parameters
from ld3m.models.train_gan import GROUP
from ld3m.pipeline.cells import cells
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.measure import Line, Plane, available_bytes, clock, peak_of, used_bytes
from ld3m.pipeline.params import Params
from ld3m.pipeline.profiles import ablation_settings, apply_profile, load_params
from ld3m.pipeline.rehearsal import Rehearsal
from ld3m.runtime import paths
from ld3m.runtime.devices import describe
from ld3m.runtime.memory import OutOfMemory, explain_out_of_memory

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # as dvc.yaml has it for what trains on all threads
    "HF_HUB_OFFLINE": "1",  # nothing is fetched for an estimate
}
START = "import papermill, ld3m.pipeline.experiment, ld3m.reporting.figures"  # what every stage does first
TABLE, REPORT, THERE = "main table", "report", "there already"  # the report's are what `make report` adds
Settings = dict[str, tuple[Params, str, str]]  # of an ablation


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
    disk: int = 0  # bytes of what other stages read of it

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

    @property
    def classes(self) -> int:
        return len(self.rehearsal.dataset.train.classes)

    def images(self, split: str) -> int:
        return len(getattr(self.rehearsal.dataset, split))

    def rendering(self, space: str, ipc: int) -> Plane:
        images = ipc * self.classes
        width = min(images, getattr(getattr(self.params.spaces, space), "render_batch", images))
        with explain_out_of_memory(f"spaces.{space}.render_batch"):
            return self._once(("rendering", space, width), lambda: self.rehearsal.rendering(space, width=width))

    def matching(self, objective: str, ipc: int) -> Plane:
        with explain_out_of_memory(self.params.lowers_memory(objective, "pixel")[0]):
            return self._once(("matching", objective, ipc), lambda: self.rehearsal.matching(objective, ipc=ipc))

    def networks(self, architectures: Sequence[str], batch: int) -> dict[str, tuple[Line, Line]]:
        """Lines of training and of testing, tried up to the batch, or a larger one that was asked for before."""
        if lacking := [name for name in architectures if self.known.get(name, (0, None))[0] < batch]:
            with explain_out_of_memory("evaluate.recipe.batch", "trajectories.batch"):
                found = self.rehearsal.networks(lacking, batch=batch)
            self.known.update({name: (batch, lines) for name, lines in found.items()})
        return {name: self.known[name][1] for name in architectures}

    def _once(self, key: Any, measure: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

    def in_processes(self, peak: float, tasks: int) -> float:
        """The memory of all processes, where one has `peak`; a single one is this one itself."""
        processes = self.params.processes
        return peak if processes == 1 else used_bytes(self.params.on_device) + min(processes, tasks) * peak


# the stages


def of_prior(meter: Meter) -> Iterator[Cost]:
    """The two trainings of the stage `prior`; none where `prior.source` names one."""
    if meter.params.prior.source is not None:
        return
    prior = meter.rehearsal.new_prior()
    parts = {"autoencoder": (prior.autoencoder,), "denoiser": (prior.unet, prior.embedding)}
    with explain_out_of_memory("prior.autoencoder.batch", "prior.denoiser.batch"):
        lines = meter.rehearsal.prior_training()
    for (name, modules), line in zip(parts.items(), lines, strict=True):
        yield Cost(
            f"prior, {name}",
            images=meter.images("train"),
            parameters=sum(parameter.numel() for module in modules for parameter in module.parameters()),
            iterations=getattr(meter.params.prior, name).steps,
            seconds=line.seconds(),
            peak=line.peak(),
            lower=(f"prior.{name}.batch",),
            tried=line.tried("images"),
        )


def of_gan(meter: Meter) -> Iterator[Cost]:
    with explain_out_of_memory("gan.batch"):
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
        part=REPORT,
    )


def of_trajectories(meter: Meter) -> Iterator[Cost]:
    given, network = meter.params.trajectories, meter.params.distill.network
    recipes = {network: {"epochs": given.epochs, "batch": given.batch}}
    images, tested = meter.images("train"), meter.images("validation")
    trained = trainings(meter, recipes, images=images, tested=tested)
    lower = ("trajectories.batch", "processes")
    disk = snapshot_bytes(meter.rehearsal.new_network(network)(seed=0), count=given.experts, epochs=given.epochs)
    yield trained.cost(meter, "trajectories", {network: given.experts}, lower=lower, disk=disk)


def of_judging(
    meter: Meter, ipc: int, runs: range, *, count: int | None = None, sets: int = 1, part: str = TABLE
) -> Iterator[Cost]:
    """Training networks of every architecture on the sets of some runs of a cell, or of `sets` cells, with `ipc` images
    a class (0: the full data), `count` in all where that is another number."""
    params = meter.params
    counts = dict.fromkeys(params.grid.architecture, sum(map(params.networks_a_set, runs)))
    recipes = {name: params.recipe(name, ipc) for name in counts}
    images = count or ipc * meter.classes or meter.images("train")
    trained = trainings(meter, recipes, images=images, tested=meter.images("test"))
    work = f"evaluate ipc {ipc}{many(runs)}" + (f", {sets} cells" if sets > 1 else "") if ipc else "evaluate full data"
    lower = ("evaluate.recipe.batch" if ipc else "evaluate.changes.full_data.batch", "processes")
    yield trained.cost(meter, work, counts, lower=lower, count=sets, part=part)


def of_foreign(meter: Meter, count: int) -> Iterator[Cost]:
    """The same for anybody's set of so many images."""
    yield from of_judging(meter, max(1, round(count / meter.classes)), range(1), count=count)


def of_cell(meter: Meter, objective: str, space: str, ipc: int, runs: range, *, part: str = TABLE) -> Iterator[Cost]:
    """Distilling the set of one run, or those of several, which go side by side on one thread each."""
    params, network, alone = meter.params, meter.params.distill.network, len(runs) > 1
    turns = ceil(len(runs) / params.processes) if alone else 1
    recipes = {network: params.recipe(network, ipc)}
    check = trainings(meter, recipes, images=ipc * meter.classes, tested=meter.images("validation"))
    seeds = params.distill.validation_seeds
    asked = [seeds] * (params.distill.validation_checks + 1)
    checks = sum(ceil(count / (1 if alone else params.processes)) for count in asked) * check.seconds[network]
    seconds, peak, tried = iteration(meter, objective, space, ipc, alone=alone)
    iterations = params.budget(objective, space, ipc).iterations
    yield Cost(
        f"distill {objective}-{space}-{ipc}{many(runs)}",
        images=ipc * meter.classes,
        parameters=ipc * meter.classes * meter.rehearsal.learned(space) + (objective == "mtt"),
        iterations=len(runs) * iterations,
        seconds=turns / len(runs) * seconds,
        peak=meter.in_processes(peak, len(runs)) if alone else peak,
        lower=params.lowers_memory(objective, space),
        checks=turns * checks,
        tried=tried,
        part=part,
    )


def of_gradient_norms(meter: Meter) -> Iterator[Cost]:
    """Every skip with each latent at every number of steps: an iteration of DM."""
    given = meter.params.gradient_norms
    ipc = given.images_per_class
    chains = [iteration(meter, "dm", "ld3m", ipc, steps=steps) for steps in given.steps]
    yield Cost(
        "gradient norms",
        images=ipc * meter.classes,
        parameters=ipc * meter.classes * meter.rehearsal.learned("ld3m"),
        iterations=6 * len(chains),
        seconds=sum(seconds for seconds, *_ in chains) / len(chains),
        peak=chains[0][1],
        lower=meter.params.lowers_memory("dm", "ld3m"),
        tried=chains[0][2],
    )


def of_ablation(meter: Meter, name: str, settings: Settings) -> Iterator[Cost]:
    """Settings side by side on one thread each: an iteration is that of the cell of the same objective and space, with
    the setting's number of steps."""
    given = meter.params.ablations
    recipes = {name: meter.params.recipe(name, 1) for name in given.architecture}
    tests = trainings(meter, recipes, images=meter.classes, tested=meter.images("test"))
    turns = ceil(len(settings) / meter.params.processes) / len(settings)
    iterations, seconds, checks, peak = 0, 0.0, 0, 0.0
    for params, objective, space in settings.values():
        each, most, _ = iteration(meter, objective, space, 1, alone=True, steps=params.spaces.ld3m.steps)
        count = params.budget(objective, space).iterations
        iterations += count
        seconds += count * each
        peak = max(peak, most)
        checks += params.distill.validation_checks + 1 if params.ablations.select_on_test else 1
    yield Cost(
        f"ablation {name}",
        images=meter.classes,
        parameters=meter.classes * meter.rehearsal.learned("ld3m"),
        iterations=iterations,
        seconds=turns * seconds / iterations,
        peak=meter.in_processes(peak, len(settings)),
        lower=(*meter.params.lowers_memory("dm", "ld3m"), "processes"),
        checks=turns * checks * given.seeds * sum(tests.seconds.values()),
        part=REPORT,
    )


# their parts


@dataclass(frozen=True)
class Trainings:
    """Of one network of each architecture, in one process: seconds with its test, steps of training, parameters."""

    images: int
    seconds: dict[str, float]
    steps: dict[str, int]
    parameters: dict[str, int]
    peak: float
    tried: str

    def cost(self, meter: Meter, work: str, counts: dict[str, int], **labels: Any) -> Cost:
        """Of so many networks of each architecture, `processes` of them at once."""
        tasks, processes = sum(counts.values()), meter.params.processes
        seconds = sum(count * self.seconds[name] for name, count in counts.items())
        steps = sum(count * self.steps[name] for name, count in counts.items())
        return Cost(
            work,
            images=self.images,
            parameters=sum(self.parameters.values()),
            iterations=steps,
            seconds=seconds * ceil(tasks / processes) / tasks / steps,
            peak=meter.in_processes(self.peak, tasks),
            tried=self.tried,
            **labels,
        )


def trainings(meter: Meter, recipes: dict[str, dict[str, Any]], *, images: int, tested: int) -> Trainings:
    """Of networks that are trained on `images` as `recipes` say, and tested on `tested` of them."""
    batches = {name: min(recipe["batch"], images) for name, recipe in recipes.items()}
    lines = meter.networks(tuple(recipes), max(batches.values()))
    seconds, steps = {}, {}
    for name, (training, testing) in lines.items():
        whole, rest = divmod(images, batches[name])
        epoch = whole * training.seconds(batches[name]) + (training.seconds(rest) if rest else 0)
        seconds[name] = recipes[name]["epochs"] * epoch + tested / testing.largest * testing.seconds(testing.largest)
        steps[name] = recipes[name]["epochs"] * (whole + bool(rest))
    parameters = {name: len(flat_parameters(meter.rehearsal.new_network(name)(seed=0))) for name in recipes}
    peaks = [max(training.peak(batches[name]), testing.peak()) for name, (training, testing) in lines.items()]
    tried, batch = min((training.largest, batches[name]) for name, (training, _) in lines.items())
    return Trainings(
        images, seconds, steps, parameters, max(peaks), f"{tried} of {batch} images" if tried < batch else ""
    )


def iteration(
    meter: Meter, objective: str, space: str, ipc: int, *, alone: bool = False, steps: int | None = None
) -> tuple[float, float, str]:
    """Seconds, peak memory, and how much of it was tried; `alone` on one thread, and with other `steps` of the reverse
    process than the parameters say."""
    rendering, matching = meter.rendering(space, ipc), meter.matching(objective, ipc)
    parts = ipc * meter.classes / rendering.wide.full
    threads = 1 if alone else meter.params.threads
    at_once = min(threads, ceil(parts))  # rendering is tried in one thread, DC and DM in all
    held = ceil(parts) if space == "ld3m" and meter.params.spaces.ld3m.uncheckpointed_steps else at_once
    rendered = parts / at_once * rendering.seconds(steps if space == "ld3m" else None)
    seconds = rendered + (meter.params.threads / threads if objective in DISTANCES else 1) * matching.seconds()
    units = ("real images", "rounds of classes") if objective in DISTANCES else ("images", "steps of the student")
    tried = "; ".join(filter(None, (rendering.tried("images", "steps"), matching.tried(*units))))
    return seconds, peak_of(*held * [rendering], matching), tried


def many(runs: range) -> str:
    return f", {len(runs)} runs" if len(runs) > 1 else ""


# all of it


def of_everything(meter: Meter, ablations: dict[str, Settings]) -> Iterator[Cost]:
    """Every stage and cell of the pipeline."""
    params = meter.params
    torch.set_num_threads(os.cpu_count())  # as the two stages that train priors have it
    for name, of in (("prior", of_prior), ("gan", of_gan)):
        is_there = getattr(meter.rehearsal, name) and name not in meter.rehearsal.absent
        for cost in of(meter):
            yield replace(cost, part=THERE) if is_there else cost
    torch.set_num_threads(1)
    names = dict.fromkeys((*params.grid.architecture, *params.ablations.architecture, params.distill.network))
    most = max(ipc for *_, ipc in cells(params, more=True)) * meter.classes
    judged = [min(recipe["batch"], most) for name in names for recipe in (params.recipe(name, 1),)]
    meter.networks(tuple(names), max(*judged, *(params.recipe(name, 0)["batch"] for name in names)))  # once for all
    yield from of_trajectories(meter)
    for part, more in ((TABLE, False), (REPORT, True)):
        found = [(cell, params.runs(*cell, more=more)) for cell in cells(params, more=more)]
        for (objective, space, ipc), runs in found:
            if runs and objective != "none":
                yield from of_cell(meter, objective, space, ipc, runs, part=part)
        alike = Counter((ipc, runs) for (*_, ipc), runs in found if runs)
        for (ipc, runs), sets in alike.items():
            yield from of_judging(meter, ipc, runs, sets=sets, part=part)
    yield from of_gradient_norms(meter)
    for name, settings in ablations.items():
        yield from of_ablation(meter, name, settings)


def announce(of: Callable[..., Iterator[Cost]], given: Experiment | Params, *what: Any) -> None:
    """Prints what a notebook is about to cost: `of` is one of the functions here, `what` its arguments after the meter.

    OutOfMemory where it will not fit.
    """
    experiment = given if isinstance(given, Experiment) else Experiment(given)
    device = experiment.params.on_device
    for cost in of(Meter(Rehearsal.of(experiment)), *what):
        checks = f" and {duration(cost.checks)} of checks" if cost.checks else ""
        tried = f" (tried with {cost.tried})" if cost.tried else ""
        disk = f"; {cost.disk / 2**20:,.1f} MiB of the disk" if cost.disk else ""
        print(
            f"{cost.work}: {cost.images:,} images, {cost.parameters:,} learned parameters, {cost.iterations:,} "
            f"iterations of {duration(cost.seconds)}{checks}: {duration(cost.total)} and at most "
            f"{cost.peak / 2**30:.2f} GiB on {describe(device)}{tried}{disk}"
        )
        if cost.peak > (room := available_bytes(device) + used_bytes(device)):
            needed = f"{cost.work} needs about {cost.peak / 2**30:.2f} GiB, {room / 2**30:.2f} GiB are there"
            raise OutOfMemory(errno.ENOMEM, f"{needed}: lower {' or '.join(cost.lower)} in params.yaml")


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


ROW = "{:<31} {:>7} {:>12} {:>10} {:>9} {:>9} {:>9}  {}"


def show(meter: Meter, ablations: dict[str, Settings]) -> None:
    """Prints a row for every piece of work as soon as it has been tried, and the sums."""
    params, device = meter.params, meter.params.on_device
    room = available_bytes(device) + used_bytes(device)
    print(f"{params.dataset} on {describe(device)}, {room / 2**30:.1f} GiB free; processes: {params.processes}")
    print(ROW.format("", "images", "learned", "iterations", "each", "in all", "memory", "").rstrip())
    costs = []
    for cost in of_everything(meter, ablations):
        notes = [] if cost.part == TABLE else [cost.part]
        notes += [f"tried with {cost.tried}"] if cost.tried else []
        notes += [f"TOO LITTLE MEMORY: lower {' or '.join(cost.lower)}"] if cost.peak > room else []
        numbers = (f"{number:,}" for number in (cost.images, cost.parameters, cost.count * cost.iterations))
        times = duration(cost.seconds), duration(cost.total)
        print(ROW.format(cost.work, *numbers, *times, f"{cost.peak / 2**30:.2f} GiB", "; ".join(notes)), flush=True)
        costs.append(cost)
    start = clock(lambda: subprocess.run([sys.executable, "-c", START], check=True, cwd=paths.ROOT))
    for part in (TABLE, REPORT):
        found = [cost for cost in costs if cost.part == part]
        starts = sum(cost.count for cost in found) * start
        print(f"{part}: {duration(sum(cost.total for cost in found))}, and {duration(starts)} in which stages start")
    snapshots = sum(cost.disk for cost in costs)
    decoded = sum(map(meter.images, ("train", "validation", "test"))) * prod(meter.rehearsal.dataset.train.shape)
    print(f"disk: {snapshots / 2**20:,.0f} MiB of trajectories, {decoded / 2**20:,.0f} MiB of decoded images")
    for replaced in meter.rehearsal.absent.values():
        print(replaced)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", help="laid over params.yaml: names in profiles/, or files")
    given = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():  # libraries read it when they are loaded, and they are by now
        os.execve(sys.executable, [sys.executable, "-m", "ld3m.pipeline.cost", *sys.argv[1:]], os.environ | ENVIRONMENT)
    try:
        main(given.profiles)
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
