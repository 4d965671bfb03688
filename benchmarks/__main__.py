"""All benchmarks of the table, in one process: what `make bench` runs.

python -m benchmarks                # into benchmarks/benchmarks.csv
python -m benchmarks.iteration      # one of them: its own rows are replaced, the others stay
"""

from benchmarks import evaluation, experts, floor, iteration, memory, objectives, rendering, roofline
from benchmarks.table import main

ALL = [m.measure for m in (iteration, memory, rendering, objectives, evaluation, roofline, experts, floor)]

if __name__ == "__main__":
    main(*ALL)
