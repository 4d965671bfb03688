"""Checks parameters, data, priors and disk space before any long work, in seconds once the data are decoded.

python -m ld3m.pipeline.check
"""

import argparse
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ld3m.data.dataset import Dataset, initial_indices
from ld3m.evaluation.experts import snapshot_bytes
from ld3m.method.objectives import OBJECTIVES
from ld3m.method.sampler import timesteps
from ld3m.method.spaces import SPACES
from ld3m.models.gan import load_generator
from ld3m.models.networks import flat_parameters
from ld3m.models.prior_io import fitted, linked_source, load_prior
from ld3m.pipeline.cells import cells, runs_path
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.params import Params
from ld3m.pipeline.profiles import ablation_settings, load_params
from ld3m.runtime import paths
from ld3m.runtime.storage import require_space

SPARE_BYTES = 200 * 2**20  # executed notebooks, tables, figures, distilled sets
EMBEDDED = "mnist5k"  # the data set whose priors come with the repository


def check(params: Params) -> Iterator[str]:
    """Yield one line for each thing that is in order; raise ValueError or OSError for the first that is not."""
    if params.prior.source:  # before the images are decoded
        prior = load_prior(params.prior.source)
        prior.check(size_px=params.data.size_px, channels=params.data.channels, classes=prior.classes)
        for steps in (params.spaces.ld3m.steps, params.prior.check.steps, *params.gradient_norms.steps):
            timesteps(steps, total=len(prior.alpha_bar), spacing=prior.spacing)
    experiment = Experiment(params)
    try:
        dataset = experiment.dataset
    except FileNotFoundError as problem:
        embedded = ", or restore the embedded images with `dvc pull -f data.dvc`" if params.dataset == EMBEDDED else ""
        raise FileNotFoundError(f"{problem}; change datasets.{params.dataset}.source{embedded}") from problem
    train = dataset.train
    counts = " + ".join(str(len(split)) for split in (train, dataset.validation, dataset.test))
    yield f"data    {params.dataset}: {counts} images of {len(train.classes)} classes, {tuple(train.shape)}"
    yield from _shared_images(dataset, is_share=not isinstance(params.data.splits.validation, str))
    entries = (("cells", params.cells), ("controls", params.controls))
    asked = {f"{kind}.{key}.ipc": entry.ipc for kind, of in entries for key, entry in of.items() if entry.ipc}
    for key, ipc in {"gradient_norms.images_per_class": params.gradient_norms.images_per_class, **asked}.items():
        try:
            initial_indices(train, ipc=ipc, seed=params.seed)
        except ValueError as problem:
            raise ValueError(f"{key} in params.yaml: {problem}") from problem
    sizes = {}
    for name in params.architectures:
        try:
            sizes[name] = len(flat_parameters(experiment.new_network(name)(seed=0)))
        except ValueError as problem:
            raise ValueError(f"networks.{name} in params.yaml: {problem}") from problem
    yield "nets    " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()) + " parameters"
    for cell in cells(params):
        if cell.prior == "data" and cell.space not in SPACES and cell.objective != "none":
            experiment.synthetic(cell.space, 1)
        matched = getattr(params.objectives, cell.objective, None)
        if cell.experts == "data" and getattr(matched, "trained_epochs", 0):
            raise ValueError(f"cells.{cell.key}.experts in params.yaml: trained_epochs needs trajectories")
        if cell.experts == "data" and cell.objective not in (*OBJECTIVES, "none"):
            experiment.objective(cell.objective)(*experiment.control("random_real", 1), step=0)
    if params.prior.source:
        _, classes = fitted(prior, names=train.classes, **params.prior_source_arguments())
        pairs = [f"{name} = {index}" for name, index in zip(train.classes, classes, strict=False)]
        yield f"prior   {params.prior.source}, its class of each class: {', '.join(pairs) or 'it has none'}"
    else:
        yield f"prior   {_trained(experiment, 'prior', load_prior, experiment.new_prior)}"
    if any(cell.prior == "gan" for cell in params.cells.values()):
        yield f"gan     {_trained(experiment, 'gan', load_generator, experiment.new_gan)}"
    if not (paths.ROOT / "data").exists():
        yield "dvc     data/ is missing, on which its stages depend whatever the data set: `dvc pull data.dvc`"
    given, network = params.trajectories, experiment.new_network(params.distill.network)(seed=0)
    needed = snapshot_bytes(network, count=given.experts, epochs=given.epochs)
    require_space(paths.ROOT, needed + SPARE_BYTES)
    yield f"disk    {needed / 2**20:.0f} MiB for the trajectories, and room to spare"


def _shared_images(dataset: Dataset, *, is_share: bool) -> Iterator[str]:
    """Yield a line for each two splits that have images in common: accuracy on these says nothing.

    Validation that is a share of train counts as train, for so it is to whoever has the images.
    """
    train, validation, test = (
        {hashlib.sha256(image.numpy()).digest() for chunk in split.chunks() for image in chunk}
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    splits = {"train": train, "validation": validation, "test": test}
    if is_share:
        if copies := len(train & validation):
            yield f"data    {copies} images are in train more than once, and so in validation too: remove the copies"
        splits = {"train": train | validation, "test": test}
    for one, other in itertools.combinations(splits, 2):
        if count := len(splits[one] & splits[other]):
            yield f"data    {count} images of {other} are in {one} too: remove them from one of the two"


def _trained(experiment: Experiment, stage: str, load: Callable[[Path], Any], new: Callable[[], Any]) -> str:
    """Say whether a stage will train its model, which is made by `new`, where an error names sizes that do not fit.

    Files that cannot be read are an error too, for the stage would not run again.
    """
    dataset, folder = experiment.params.dataset, runs_path(experiment.params.dataset, stage)
    embedded = f" (`dvc pull --allow-missing {stage}` brings the embedded one)" if dataset == EMBEDDED else ""
    if not folder.exists():
        new()
        return f"none for {dataset} yet: the stage `{stage}` trains it{embedded}"
    try:
        model = load(folder)
    except (ValueError, OSError) as problem:
        raise ValueError(
            f"{folder} is broken ({problem}). `dvc checkout -f {stage}` restores the embedded one "
            f"(without a cache: `git checkout -- store && dvc pull -f {stage}`); if it is your own, delete {folder}: "
            f"the stage `{stage}` trains it again"
        ) from problem
    try:
        experiment.check_fit(model)
    except ValueError as problem:
        new()
        return f"does not fit the parameters ({problem}): the stage `{stage}` trains it again"
    if stage == "prior" and (source := linked_source(folder)):
        return f"is {source}, and prior.source is null: the stage `prior` trains one{embedded}"
    return f"trained on {model.classes} classes"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    try:
        params = load_params()
        for ablation in params.ablations.settings:
            ablation_settings(ablation)  # raises for an invalid setting
        for line in check(params):
            print(line, flush=True)
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
