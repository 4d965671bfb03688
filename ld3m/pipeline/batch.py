"""Runs the stages of dvc.yaml as `dvc repro` does, but several at a time.

    python -m ld3m.pipeline.batch --jobs 4                 # all stages
    python -m ld3m.pipeline.batch --jobs 4 tables          # a stage and those that it depends on
    python -m ld3m.pipeline.batch --jobs 12 --minutes 9    # stops after nine minutes; the same command resumes

Each stage is a `dvc repro --single-item STAGE` as soon as the stages that it depends on are done: DVC skips it if it is
up to date by dvc.lock, and records its outputs there. So the result is that of `dvc repro`, and all that is left to do
is to commit dvc.lock and reports/ to Git.

A stage works with `processes` (params.yaml) processes: more jobs than cores / processes share cores. On a GPU the jobs
share its memory: `python -m ld3m.pipeline.estimate` prints how much a stage needs.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import networkx
from dvc.exceptions import DvcException
from dvc.repo import Repo

from ld3m.runtime import paths

REPRO = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item")


def stages(targets: list[str]) -> dict[str, set[str]]:
    """Read {stage: the stages that it depends on} from dvc.yaml, in its order: of the targets, or of all stages."""
    with Repo() as repo:
        graph = repo.index.graph
        chosen = [stage for target in targets for stage in repo.stage.collect(target)] or list(graph)
        needed = set(chosen).union(*(networkx.descendants(graph, stage) for stage in chosen))
        found = {stage.name: graph.successors(stage) for stage in graph if stage in needed and stage.cmd}
        return {name: {stage.name for stage in others if stage.cmd} for name, others in found.items()}


def run(needs: dict[str, set[str]], *, jobs: int, minutes: float = float("inf"), logs: Path) -> list[str]:
    """Runs every stage after those that it needs, `jobs` at a time, and prints how each ends.

    Returns the stages that failed, were stopped (after `minutes`, or by SIGINT or SIGTERM) or lack what they need. The
    output of a stage is in `logs`/STAGE.log.
    """
    waiting, running, done, left = dict(needs), {}, set(), []
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    try:
        while time.monotonic() < deadline:
            ready = [stage for stage, needed in waiting.items() if needed <= done]
            for stage in ready[: jobs - len(running)]:
                del waiting[stage]
                running[stage] = _start(stage, logs / f"{stage}.log")
            if not running:
                break
            time.sleep(0.1)
            for stage in [stage for stage, process in running.items() if process.poll() is not None]:
                if running.pop(stage).returncode == 0:
                    done.add(stage)
                    print(f"{stage}: done ({len(done)} of {len(needs)})", flush=True)
                else:
                    left.append(stage)
                    print(f"{stage}: failed, see {logs / stage}.log", flush=True)
    except KeyboardInterrupt:
        print("stopping: what is running finishes its step and writes a checkpoint", flush=True)
    for process in running.values():
        os.killpg(process.pid, signal.SIGINT)  # DVC waits for papermill, which interrupts the notebook
    for process in running.values():
        process.wait()
    return [*left, *running, *waiting]


def _start(stage: str, log: Path) -> subprocess.Popen:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # stages call `python`
    with log.open("w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen([*REPRO, stage], env=os.environ | {"PATH": path}, **options)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="stages of dvc.yaml (all)")
    parser.add_argument("--jobs", type=int, default=2, help="stages at a time (2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many (never)")
    given = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # a job in the background, and its children, would ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    os.chdir(paths.ROOT)  # where DVC looks for targets
    try:
        needs = stages(given.targets)
    except DvcException as problem:
        sys.exit(str(problem))
    if left := run(needs, jobs=given.jobs, minutes=given.minutes, logs=paths.ROOT / "runs" / "logs"):
        print(f"not done: {', '.join(left)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
