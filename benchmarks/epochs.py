"""Accuracy on validation images against the epochs of evaluation networks, on sets of one image a class.

    python -m benchmarks.epochs      # after `make reproduce`, ten minutes; into reports/mnist5k/epochs.csv

The networks have other seeds than those of the tables.
"""

import pandas as pd

from ld3m.evaluation.evaluate import EvaluationJob
from ld3m.evaluation.statistics import interval
from ld3m.pipeline.cells import cell_of
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime.paths import ROOT
from ld3m.runtime.storage import write_bytes

FILE = ROOT / "reports/mnist5k/epochs.csv"
SETS = ("dm-ld3m-1", "mtt-pixel-1")  # keys of cells
EPOCHS = (50, 100, 200, 400, 800)
SEEDS = range(100, 104)
COLUMNS = ["set", "architecture", "epochs", "n", "mean", "ci_low", "ci_high"]


def main() -> None:
    experiment, rows = Experiment(load_params()), []
    for key in SETS:
        images, labels = experiment.images_of(cell_of(experiment.params, key))
        for epochs in EPOCHS:
            recipes = {name: recipe | {"epochs": epochs} for name, recipe in experiment.recipes(ipc=1).items()}
            job = EvaluationJob(images.__getitem__, labels, recipes, SEEDS, experiment.seed)
            [found] = experiment.evaluate([job], experiment.dataset.validation)
            rows += [(key, name, epochs, len(SEEDS), *interval(values)) for name, values in found.items()]
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_bytes(FILE, table.to_csv(index=False, float_format="%.6f").encode())


if __name__ == "__main__":
    main()
