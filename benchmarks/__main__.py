"""All benchmarks of the table, in one process: what `make bench` runs.

python -m benchmarks                # into benchmarks/benchmarks.csv
python -m benchmarks.iteration      # one of them: its own rows are replaced, the others stay
"""

import argparse
import time
from pathlib import Path

from benchmarks import evaluation, experts, floor, iteration, memory, objectives, rendering, roofline
from benchmarks.table import FILE, show, write
from ld3m.runtime.parallel import end_workers
from ld3m.runtime.progress import silent

ALL = (iteration, memory, rendering, objectives, evaluation, roofline, experts, floor)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds: the numbers say nothing")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    for k, module in enumerate(ALL, 1):
        name = module.__name__.removeprefix("benchmarks.")
        print(f"[{k} of {len(ALL)}, {time.monotonic() - began:.0f} s] {name}", flush=True)
        with silent():
            measured = module.measure(smoke=given.smoke)
        end_workers()  # or those that wait for more work are timed with the next
        show(measured)
        write(measured, given.out)
    print(f"{given.out}, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
