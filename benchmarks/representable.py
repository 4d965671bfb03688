"""How near LD3M's images can come to a set distilled in pixel space, and what is left of that set's accuracy there: is
it the prior that limits LD3M, or the search?

    python -m benchmarks.representable --objective dc --out reports/cifar10/representable.csv

Run 0 of the pixel cell with one image a class, which has to be there under runs/, as it is; through the prior's
autoencoder; the nearest images that its decoder draws from any latents; the nearest that LD3M draws, from `z` and `c`
through all reverse steps. Nearest is by squares, with Adam. Each is evaluated on test images like a cell. `missed` is
the share of the set's variance that is not reproduced.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ld3m.evaluation.statistics import interval
from ld3m.pipeline.cells import UNSEEN, first_runs
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime.progress import progress
from ld3m.runtime.storage import write_bytes

RATE = 0.03  # of Adam, falling to 0; latents have about unit variance


def nearest(render: Callable[[], Tensor], learned: list[Tensor], target: Tensor, *, iterations: int) -> Tensor:
    """The images (N, C, H, W) nearest to `target` that `render` gives while `learned`, in place, are fitted."""
    optimizer = torch.optim.Adam(learned, lr=RATE)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=iterations)
    best, least = target, float("inf")
    for _ in progress(iterations, label="nearest images"):
        images = render()
        if (missed := missed_share(images.detach(), target)) < least:
            best, least = images.detach().clone(), missed
        optimizer.zero_grad()
        (images - target).square().mean().backward()
        optimizer.step()
        falling.step()
    return best


def missed_share(images: Tensor, target: Tensor) -> float:
    return ((images - target).square().sum() / (target - target.mean()).square().sum()).item()


def measure(experiment: Experiment, objective: str, *, iterations: int) -> pd.DataFrame:
    """Columns objective, images, missed, architecture, n, mean, ci_low, ci_high, and change, change_low, change_high
    from the set as it is, paired by network."""
    cell = next(cell for cell in first_runs(experiment.params) if cell.row == (objective, "pixel", 1))
    target, labels = experiment.images_of(cell)
    target, prior, normalization = target.detach(), experiment.prior, experiment.dataset.normalization
    with torch.no_grad():
        z = prior.encode(normalization.denormalize(target))
        sets = {"as distilled": target, "through the autoencoder": normalization.normalize(prior.decode(z))}
    z.requires_grad_()
    decoded = nearest(lambda: normalization.normalize(prior.decode(z)), [z], target, iterations=iterations)
    synthetic = experiment.synthetic("ld3m", 1)
    with torch.no_grad():
        synthetic.learnables["z"].copy_(z)
    rendered = nearest(synthetic.render, list(synthetic.learnables.values()), target, iterations=iterations)
    sets |= {"nearest of the decoder": decoded, "nearest of LD3M": rendered}
    jobs = [experiment.evaluation_job(images, labels) for images in sets.values()]
    scores = [pd.DataFrame(given) for given in experiment.evaluate(jobs, experiment.dataset.test)]
    for accuracy in scores:
        accuracy[UNSEEN] = accuracy.drop(columns=experiment.params.distill.network).mean(axis=1)
    rows = []
    for (name, images), accuracy in zip(sets.items(), scores, strict=True):
        for architecture, values in accuracy.items():
            key = (objective, name, missed_share(images, target), architecture, len(values))
            rows.append((*key, *interval(values), *interval(values - scores[0][architecture])))
    columns = ["objective", "images", "missed", "architecture", "n", "mean", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=[*columns, "change", "change_low", "change_high"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", nargs="+", default=["dc"], choices=["dc", "dm", "mtt"])
    parser.add_argument("--iterations", type=int, default=300, help="of fitting (300)")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    experiment = Experiment(load_params())
    found = pd.concat([measure(experiment, name, iterations=given.iterations) for name in given.objective])
    write_bytes(given.out, found.to_csv(index=False, float_format="%.6f").encode())
    print(found.to_string(index=False))


if __name__ == "__main__":
    main()
