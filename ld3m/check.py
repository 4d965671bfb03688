"""What can be known before any long work: parameters, data, prior and disk, checked in seconds.

python -m ld3m.check
"""

import sys

from ld3m import paths
from ld3m.config import Params, load_params
from ld3m.data import initial_indices
from ld3m.experiment import Experiment
from ld3m.networks import flat_parameters
from ld3m.storage import require_space

SPARE_BYTES = 200 * 2**20  # executed notebooks, tables, figures, distilled sets


def check(params: Params) -> list[str]:
    """One line for each thing that is in order; the first that is not is an error which says what to change."""
    experiment = Experiment(params)
    train = experiment.dataset.train
    counts = " + ".join(str(len(split)) for split in (train, experiment.dataset.validation, experiment.dataset.test))
    shape = " x ".join(map(str, train.uint8.shape[1:]))
    lines = [f"data    {params.dataset}: {counts} images of {len(train.classes)} classes, {shape}"]
    for ipc in params.grid.ipc:
        initial_indices(train, ipc=ipc, seed=params.seed)
    sizes = {name: len(flat_parameters(experiment.new_network(name)(seed=0))) for name in params.grid.architecture}
    lines.append("judges  " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()) + " parameters")
    if paths.prior_folder(params.dataset).exists():
        shape = experiment.prior.latent_shape(params.data.size_px)
        lines.append(f"prior   latents {' x '.join(map(str, shape))}, {experiment.prior.classes} classes")
    else:
        lines.append(f"prior   none for {params.dataset} yet: the stage `prior` trains it first")
    snapshots = params.trajectories.experts * (params.trajectories.epochs + 1)
    weights = flat_parameters(experiment.new_network(params.distill.network)(seed=0))
    needed = snapshots * weights.nbytes
    require_space(paths.ROOT, needed + SPARE_BYTES)
    lines.append(f"disk    {needed / 2**20:.0f} MiB for {snapshots} snapshots of the experts, and room to spare")
    return lines


if __name__ == "__main__":
    try:
        print("\n".join(check(load_params())))
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
