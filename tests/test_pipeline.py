"""The pipeline as users run it: stages list the code they use, the smoke profile runs whole, a rerun does nothing."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from ruamel.yaml import YAML

from ld3m.evaluation.scores import read_scores
from ld3m.pipeline.profiles import apply_profiles, load_params
from ld3m.runtime.paths import ROOT
from ld3m.runtime.storage import read_tensors

STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
USER = "somebody-special"
DM = "{objective: dm, space: ld3m, ipc: 1, runs: [0], table: main, prior: prior, experts: data}"
PACKAGES = ("runtime", "data", "models", "method", "evaluation", "pipeline", "reporting")


def test_packages_import_in_one_direction():
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_depends_on_its_notebook_and_on_the_packages_that_it_uses(name):
    stage = STAGES[name].get("do", STAGES[name])
    notebook = next(word for word in stage["cmd"].split() if word.startswith("notebooks/"))
    used = set(re.findall(r"from ld3m\.(\w+)", (ROOT / notebook).read_text())) - {"reporting"}
    last = max(map(PACKAGES.index, used))  # without figures, which are shown in the notebook and read by no other stage
    packages = ["ld3m"] if name in ("tables", "report") else [f"ld3m/{package}" for package in PACKAGES[: last + 1]]
    assert [dep for dep in stage["deps"] if dep.startswith(("notebooks", "ld3m"))] == [notebook, *packages]


def depends_on(index, stage, output):
    """Whether DVC would run the stage of an output before another stage."""
    import networkx

    (target,) = [one for one in index.stages if one.addressing == stage]
    (source,) = [one for one in index.stages if one.addressing == output]
    return source in networkx.descendants(index.graph, target)


def test_a_stage_depends_on_what_it_reads_and_on_nothing_more():
    from dvc.repo import Repo

    with Repo(ROOT) as repo:
        index = repo.index
        for key, cell in load_params().cells.items():
            wanted = {
                "prior": cell.space == "ld3m",
                "gan": cell.space == "glad",
                "trajectories": cell.objective == "mtt",
            }
            for stage, is_read in wanted.items():
                assert depends_on(index, f"distill@{key}", stage) == is_read, key
        assert not depends_on(index, "tables", "gan") and not depends_on(index, "ablation@steps", "gan")
        assert depends_on(index, "report", "gan") and depends_on(index, "tables", "evaluate@dc-pixel-1")
        assert not depends_on(index, "control@random_real-1", "prior") and depends_on(index, "report", "ablation@prior")
    assert "runs_path" not in (ROOT / "notebooks/04_ablations.ipynb").read_text()  # an ablation reads no other's file


def new_clone(folder: Path, *profiles: str | Path) -> Path:
    """What Git tracks, in a new repository with some profiles and the embedded data."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("store/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "data", folder / "data", dirs_exist_ok=True)
    (folder / "dvc.lock").unlink(missing_ok=True)
    apply_profiles(*profiles, path=folder / "params.yaml")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return new_clone(tmp_path_factory.mktemp("clone"), "smoke")


def start_dvc(clone: Path, *arguments: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(clone)}  # the clone's library, not the installed one
    environment |= {"USER": USER, "LOGNAME": USER}
    command = [sys.executable, "-m", "dvc", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=clone, env=environment, text=True, start_new_session=True, **streams)


def dvc(clone: Path, *arguments: str) -> str:
    process = start_dvc(clone, *arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, said[-5000:]
    return said


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.timeout(3600)
def test_the_smoke_profile_runs_whole_a_second_run_does_nothing_and_tables_repeat(clone):
    dvc(clone, "repro")
    reports = clone / "reports/smoke"
    main, report = written(reports / "tables/main"), written(reports / "tables/report")
    figures, page = written(reports / "figures/main"), (reports / "index.html").read_bytes()
    assert {"prior", "distilled-ipc1", "accuracy-ipc1", "curves-ipc1", "gradient-norms"} < {
        Path(k).stem for k in figures
    }
    for table, rows in (
        (main["scores.csv"], 2 * (1 + 1 + 1)),  # architectures x (cells, control, full data)
        (report["scores.csv"], 2 * (2 + 2 + 1)),
        (report["runs.csv"], 3 * (2 + 1)),  # LD3M, GLaD and random real images
        (report["ablations.csv"], 2 * 3),  # settings x architectures and unseen mean
    ):
        assert len(table.decode().splitlines()) == 1 + rows
    assert "up to date" in dvc(clone, "repro")
    for stage in ("tables", "report"):
        dvc(clone, "repro", "--single-item", "--force", stage)
    assert (written(reports / "tables/main"), written(reports / "tables/report")) == (main, report)
    assert written(reports / "figures/main") == figures and (reports / "index.html").read_bytes() == page
    assert not list((clone / "checkpoints").rglob("*.*"))


def test_a_stage_that_was_killed_goes_on_from_its_checkpoint_and_ends_with_the_same_bytes(clone):
    """After the test above; every step writes its state under the smoke profile."""
    again = ("repro", "--single-item", "--force", "--no-run-cache", "distill@mtt-ld3m-1")
    artefact = clone / "runs/smoke/main/distilled/mtt-ld3m-1/run-0/distilled.safetensors"
    before, checkpoint = artefact.read_bytes(), clone / "checkpoints/smoke/mtt-ld3m-1-run-0.safetensors"
    process = start_dvc(clone, *again)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0][-5000:]
        time.sleep(0.01)
    for kernel in psutil.process_iter(["cmdline", "cwd"]):
        if "ipykernel_launcher" in (kernel.info["cmdline"] or ()) and kernel.info["cwd"].startswith(str(clone)):
            kernel.kill()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkpoint.exists() and not artefact.exists()  # DVC has removed the output, and nothing else
    assert "resumes an interrupted run" in dvc(clone, *again)
    assert artefact.read_bytes() == before
    assert not list((clone / "checkpoints").rglob("*.*"))


def test_nothing_of_the_environment_is_written(clone):
    """After the tests above."""
    secrets = [str(clone), str(ROOT), sys.prefix, f"{Path.home()}/", USER, socket.gethostname()]
    secrets = [secret.encode() for secret in secrets if len(secret) > 5]  # a short one is found anywhere
    files = [file for place in ("runs", "costs", "reports") for file in (clone / place).rglob("*") if file.is_file()]
    assert len(files) > 100
    found = [(secret, str(file)) for file in files for secret in secrets if secret in file.read_bytes()]
    assert not found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_scratch_twice_gives_the_same_bytes(tmp_path):
    clones = [new_clone(tmp_path / name, "smoke") for name in "ab"]
    for each in clones:
        dvc(each, "repro")
    for place in ("runs", "reports/smoke/tables/main", "reports/smoke/tables/report"):
        one, other = (
            {str(file.relative_to(each)): file.read_bytes() for file in (each / place).rglob("*") if file.is_file()}
            for each in clones
        )
        assert one == other and len(one) > 10


def test_dvc_reports_nothing_to_anybody():
    config = (ROOT / ".dvc/config").read_text()
    assert re.search(r"analytics = false", config) and re.search(r"check_update = false", config)
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY


def test_explore_runs_on_the_cells_of_the_clone(clone):
    """After the test above, with its cells."""
    command = [sys.executable, "-m", "papermill", "-k", "python3", "notebooks/explore.ipynb", "explored.ipynb"]
    environment = os.environ | {"PYTHONPATH": str(clone)}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((clone / "explored.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4


def photographs(folder: Path) -> None:
    """As people have them: of any size and mode, in folders that bear the names of their classes."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 20, "test": 5}.items():
        for name, mode in {"my cat": "RGB", "naïve dog": "L", "owl": "RGBA"}.items():
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                picture = Image.effect_noise(rng.integers(20, 90, 2).tolist(), 60).convert(mode)
                picture.save(folder / split / name / f"{k}.{'jpg' if mode == 'RGB' else 'png'}")


def parquet_files(folder: Path) -> None:
    """Laid out as the hub's of CIFAR-10."""
    import datasets

    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=names))
    folder.mkdir()
    for split, count in {"train": 100, "test": 20}.items():
        pictures = [Image.effect_noise((32, 32), 60).convert("RGB") for _ in range(count)]
        columns = {"img": pictures, "label": [k % 10 for k in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name, write, classes",
    [("folder", photographs, 3), pytest.param("cifar10", parquet_files, 10, marks=pytest.mark.slow)],
)
def test_images_of_the_user_s_are_distilled_and_evaluated(tmp_path, name, write, classes):
    overlay, source = tmp_path / "dm.yaml", tmp_path / "images"  # of so few images, experts hardly move: MTT refuses
    overlay.write_text(f"dataset: {name}\ncells: {{dm-ld3m-1: {DM}}}\ndatasets: {{{name}: {{source: {source}}}}}\n")
    clone = new_clone(tmp_path / "clone", name, "smoke", overlay)
    write(source)
    dvc(clone, "repro", "evaluate@dm-ld3m-1")
    results = clone / "runs" / name / "main"
    assert len(list((results / "distilled/dm-ld3m-1/run-0/images").rglob("*.png"))) == classes
    scores = read_scores(results / "scores/dm-ld3m-1/scores.json").runs[0]
    assert list(scores) == ["convnet", "vit"] and all(0 <= value <= 1 for values in scores.values() for value in values)
    assert len(list((clone / "cache/decoded").glob("*.npy"))) == 2  # made by the first stage, read by the others


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_experiment_has_the_parameters_that_it_is_given(tmp_path):
    clone = new_clone(tmp_path / "clone", "smoke")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("add", "-A"), (*author, "commit", "-q", "-m", "start")):
        subprocess.run(["git", *command], cwd=clone, check=True)
    dvc(clone, "exp", "run", "-S", "distill.mtt.ld3m.iterations=3", "distill@mtt-ld3m-1")
    _, metadata = read_tensors(clone / "runs/smoke/main/distilled/mtt-ld3m-1/run-0/distilled.safetensors")
    assert len(metadata["history"]) == 3
