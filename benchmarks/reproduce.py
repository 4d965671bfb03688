"""Times `make reproduce` of two commits on this machine, one after the other: whole, and stage by stage.

    python -m benchmarks.reproduce OLD NEW                     # into reports/benchmarks/reproduce.csv
    python -m benchmarks.reproduce NEW --target report --out report.csv

OLD and NEW are clones of this repository, each with its environment (`make install`) in .venv. The commit that is
checked out is cloned anew into a temporary folder, so every stage is executed. A row is a stage, or "all" of a clone;
what make does before the first stage and after the last is in "all" alone. Linux only. Columns:

wall_s    seconds
cpu_s     CPU-seconds of all processes, those that have ended too
peak_mib  the most memory of all processes together at one time: proportional set size, so that shared pages count once
"""

import argparse
import ctypes
import os
import re
import resource
import subprocess
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock

import pandas as pd
import psutil

from ld3m.runtime.devices import describe
from ld3m.runtime.paths import ROOT
from ld3m.runtime.storage import write_bytes

FILE = ROOT / "reports/benchmarks/reproduce.csv"
STAGE = re.compile(r"Running stage '(.+)':")  # what DVC prints
PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>
Use = namedtuple("Use", "wall_s cpu_s peak_mib")  # the clock, CPU-seconds so far, memory now


def use() -> Use:
    """Of all processes below this one. A process that has ended is in the times of the parent that waited for it."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s, pss = ended.ru_utime + ended.ru_stime, 0
    for process in psutil.Process().children(recursive=True):
        try:
            cpu_s += sum(process.cpu_times()[:4])  # user, system, and both of its children that have ended
            pss += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess, ProcessLookupError):
            continue
    return Use(time.monotonic(), cpu_s, pss / 2**20)


def measure(command: list[str], folder: Path, environment: dict[str, str], *, every_s: float = 0.5) -> pd.DataFrame:
    """Run a command that prints DVC's output; a row a stage, then that of everything. RuntimeError where it fails."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # processes whose parent has ended become children of this one
    uses, starts, lock, ended = [use()], [], Lock(), Event()

    def look() -> int:
        with lock:
            uses.append(use())
            return len(uses) - 1

    def watch() -> None:
        while not ended.wait(every_s):
            look()

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with ThreadPoolExecutor(1) as pool, subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        watching = pool.submit(watch)
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                starts += [(name, look()) for name in STAGE.findall(line)]
            process.wait()
        finally:
            ended.set()
            prctl(PR_SET_CHILD_SUBREAPER, 0)
    watching.result()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} in {folder} ended with status {process.returncode}")
    rows, end = [], look()
    for name, a, b in [*((*start, after) for start, (_, after) in pairwise([*starts, ("", end)])), ("all", 0, end)]:
        first, last, peak_mib = uses[a], uses[b], max(one.peak_mib for one in uses[a : b + 1])
        rows.append((name, last.wall_s - first.wall_s, last.cpu_s - first.cpu_s, peak_mib))
    return pd.DataFrame(rows, columns=["stage", *Use._fields])


def in_new_clone(given: Path, target: str) -> pd.DataFrame:
    """`make TARGET` of the commit of a clone, in a new clone with the environment of the first."""
    venv = given.resolve() / ".venv"
    if not (venv / ".installed").is_file():
        raise FileNotFoundError(f"{venv}/.installed is missing: run `make install` in {given}")
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        subprocess.run(["git", "clone", "--quiet", given.resolve(), folder], check=True)
        told = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=folder, stdout=subprocess.PIPE, check=True)
        own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_", "PYTHON"))}
        own |= {"PATH": f"{venv}/bin:{own['PATH']}", "PYTHONPATH": folder, "PYTHONUNBUFFERED": "1"}
        command = ["make", target, f"VENV={venv}", f"--old-file={venv}/.installed"]  # nothing is installed
        return measure(command, Path(folder), own).assign(commit=told.stdout.decode().strip())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, nargs="+", help="OLD NEW, or NEW alone")
    parser.add_argument("--target", default="reproduce", help="of the Makefile (reproduce)")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args(arguments)
    versions = ["old", "new"][-len(given.clones) :]
    frames = [
        in_new_clone(clone, given.target).assign(machine=describe("cpu"), version=version)
        for version, clone in zip(versions, given.clones, strict=True)
    ]
    table = pd.concat(frames)[["machine", "version", "commit", "stage", "wall_s", "cpu_s", "peak_mib"]]
    write_bytes(given.out, table.to_csv(index=False, float_format="%.1f").encode())
    print(table[table.stage == "all"].to_string(index=False))


if __name__ == "__main__":
    main()
