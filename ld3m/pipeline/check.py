"""What can be known before any long work: parameters, data, priors and disk, checked in seconds once data are decoded;
a prior from elsewhere before they are.

python -m ld3m.pipeline.check
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ld3m.data.dataset import initial_indices
from ld3m.evaluation.experts import snapshot_bytes
from ld3m.method.sampler import timesteps
from ld3m.models.diffusion_prior import Prior
from ld3m.models.gan import load_generator
from ld3m.models.networks import flat_parameters
from ld3m.models.prior_io import fitted, load_prior
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.params import Params
from ld3m.pipeline.profiles import ablation_settings, load_params
from ld3m.runtime import paths
from ld3m.runtime.storage import require_space

SPARE_BYTES = 200 * 2**20  # executed notebooks, tables, figures, distilled sets
EMBEDDED = "mnist5k"  # the data set whose priors come with the repository
TRAINING_MINUTES = {"prior": 15, "gan": 6}


def check(params: Params) -> list[str]:
    """One line for each thing that is in order; the first that is not is an error which says what to change."""
    prior = _from_elsewhere(params) if params.prior.source else None
    experiment = Experiment(params)
    train = experiment.dataset.train
    counts = " + ".join(str(len(split)) for split in (train, experiment.dataset.validation, experiment.dataset.test))
    shape = " x ".join(map(str, train.shape))
    lines = [f"data    {params.dataset}: {counts} images of {len(train.classes)} classes, {shape}"]
    for key, ipc in _images_per_class(params):
        try:
            initial_indices(train, ipc=ipc, seed=params.seed)
        except ValueError as problem:
            raise ValueError(f"{key} in params.yaml: {problem}") from problem
    sizes = {name: len(flat_parameters(experiment.new_network(name)(seed=0))) for name in params.grid.architecture}
    lines.append("nets    " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()) + " parameters")
    if prior:
        lines.append(f"prior   {_source(params, prior, len(train.classes))}")
    else:
        lines.append(f"prior   {_trained(experiment, 'prior', paths.prior_folder(params.dataset), load_prior, _prior)}")
    lines.append(f"gan     {_trained(experiment, 'gan', paths.gan_folder(params.dataset), load_generator, _gan)}")
    given, network = params.trajectories, experiment.new_network(params.distill.network)(seed=0)
    needed = snapshot_bytes(network, count=given.experts, epochs=given.epochs)
    require_space(paths.ROOT, needed + SPARE_BYTES)
    snapshots = given.experts * (given.epochs + 1)
    if not (paths.ROOT / "data").exists():
        lines.append("dvc     data/ is missing, which its stages depend on, whatever the data set: `dvc pull data.dvc`")
    lines.append(f"disk    {needed / 2**20:.0f} MiB for {snapshots} snapshots of the experts, and room to spare")
    return lines


def _images_per_class(params: Params) -> list[tuple[str, int]]:
    """Every key that asks for real images of each class, and how many."""
    more = {f"more.cells.{key}": cell for key, cell in params.more.cells.items()}
    more |= {f"more.controls.{key}": control for key, control in params.more.controls.items()}
    return [
        *(("grid.ipc", ipc) for ipc in params.grid.ipc),
        ("gradient_norms.images_per_class", params.gradient_norms.images_per_class),
        *((key, entry.ipc) for key, entry in more.items()),
    ]


def _from_elsewhere(params: Params) -> Prior:
    """The prior that the stage `prior` links to, as far as it can be checked without the data."""
    prior = load_prior(params.prior.source)
    prior.check(size_px=params.data.size_px, channels=params.data.channels, classes=prior.classes)
    for steps in (params.spaces.ld3m.steps, params.prior.check.steps, *params.gradient_norms.steps):
        timesteps(steps, total=len(prior.alpha_bar), spacing=prior.spacing)
    return prior


def _source(params: Params, prior: Prior, labels: int) -> str:
    """That prior; one that does not fit the classes of the data is an error."""
    prior, classes = fitted(prior, labels=labels, **params.prior_source_arguments())
    latents = " x ".join(map(str, prior.latent_shape(params.data.size_px)))
    shown = ", ".join(map(str, classes[:10])) + (" ..." if classes[10:] else "")
    return f"{params.prior.source}: latents {latents}, classes {shown or 'none'}"


def _prior(experiment: Experiment) -> str:
    prior, size_px = experiment.prior, experiment.params.data.size_px
    return f"latents {' x '.join(map(str, prior.latent_shape(size_px)))}, {prior.classes} classes"


def _gan(experiment: Experiment) -> str:
    return f"{experiment.gan.layers} layers, {experiment.gan.classes} classes"


def _trained(
    experiment: Experiment,
    stage: str,
    folder: Path,
    load: Callable[[Path], Any],
    describe: Callable[[Experiment], str],
) -> str:
    """What is in the folder of a stage, or that the stage will fill it; files that cannot be read are an error."""
    again = f"the stage `{stage}` trains it first, about {TRAINING_MINUTES[stage]} minutes for the committed profile"
    if experiment.params.dataset == EMBEDDED:
        again += f"; `dvc pull --allow-missing {stage}` brings the embedded one"
    if not folder.exists():
        return f"none for {experiment.params.dataset} yet: {again}"
    try:
        load(folder)
    except (ValueError, OSError) as problem:
        raise ValueError(
            f"{folder} is broken ({problem.__cause__ or problem}). The embedded one comes back with "
            f"`dvc checkout -f {stage}` (where that finds no cache, `git checkout -- store && dvc pull -f {stage}`); "
            f"for one of your own delete {folder}, and the stage `{stage}` trains it again"
        ) from problem
    try:
        return describe(experiment)
    except ValueError as problem:  # the parameters changed since
        return f"of no use with these parameters ({problem}): {again}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    try:
        params = load_params()
        for ablation in params.ablations.settings:
            ablation_settings(ablation)  # raises for a setting that cannot be
        print("\n".join(check(params)))
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
