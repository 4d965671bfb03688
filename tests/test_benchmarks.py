"""The benchmarks of the table, everything tiny: they run, compare equals, and keep each other's rows."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import __main__ as everything
from benchmarks import evaluation, iteration, memory, representable, reproduce, table
from benchmarks.experts import textbook
from benchmarks.table import Row, less_is_better, require_same
from ld3m.evaluation.training import accuracy, train
from ld3m.models.networks import build
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import load_params
from ld3m.runtime.devices import describe
from ld3m.runtime.parallel import end_workers

NAMES = "ld3m_iteration ld3m_iteration_kept ld3m_memory_in_steps rendering dc_step dm_step mtt_step mtt_memory experts"


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set how many there are."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_benchmarks_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "FILE", tmp_path / "reproduce.csv")
    rows = [("trajectories", 30.0), ("evaluate@a", 100.0), ("control@b", 50.0), ("tables", 5.0), ("all", 200.0)]
    measured = pd.DataFrame(rows, columns=["stage", "cpu_s"]).assign(machine=describe("cpu"), version="new")
    pd.concat([measured, measured.assign(version="old")]).to_csv(reproduce.FILE)
    table.main(*everything.ALL, arguments=["--smoke", "--out", str(tmp_path / "benchmarks.csv")])
    found = table.read(tmp_path / "benchmarks.csv")
    assert {row.benchmark for row in found} == {*NAMES.split(), "evaluation", "roofline", "reproduce"}
    assert len({(row.benchmark, row.compared_with) for row in found}) == len(found)
    for row in found:
        expected = row.ours / row.other if row.benchmark == "roofline" else row.other / row.ours
        assert row.ratio == pytest.approx(expected, rel=2e-3) and expected > 0 and row.unit and row.device
    flat = [row.ratio for row in found if row.compared_with.startswith("one step with gradient")]
    assert len(flat) == 2 and min(flat) > 1 / 1.1
    whole = {row.compared_with: row.ours for row in found if row.benchmark == "reproduce"}
    assert whole == {"matrix products; all": 200, "matrix products; trajectories": 30}  # of few stages in smoke
    whole = {row.compared_with: row.ours for row in found if row.benchmark == "reproduce"}
    assert whole == {"matrix products; all": 200, "matrix products; trajectories": 30}  # of few stages in smoke
    said = capsys.readouterr().out
    assert "[1 of 8, 0 s] benchmarks.iteration" in said and "4T floor" in said


def test_one_script_replaces_its_own_rows_alone(tmp_path):
    file = tmp_path / "benchmarks.csv"
    given = dict(ours=1.0, unit="s", device="cpu")
    other = less_is_better("zebra", "horse, striped", other=2.0, **given)
    table.write([other, less_is_better("ld3m_memory_in_steps", "of before", other=3.0, **given)], file)
    table.main(memory.measure, arguments=["--smoke", "--out", str(file)])
    found = table.read(file)
    assert [row for row in found if row.benchmark != "ld3m_memory_in_steps"] == [other]
    assert len(found) == 4 and all(row.compared_with != "of before" for row in found)
    table.write([Row(**vars(other) | {"ratio": 9.0})], file)
    assert table.read(file)[-1].ratio == 9.0 and len(table.read(file)) == 4


def test_ways_that_compute_something_else_are_not_compared(monkeypatch):
    for ours, difference in ((0.5, "0.5"), (torch.nan, "nan")):
        with pytest.raises(ValueError, match=f"differ by {difference}"):
            require_same([torch.full((2,), ours)], [torch.ones(2)], what="two", within=0.1)
    monkeypatch.setattr(iteration, "plain", lambda prior, z, c, **given: z + 0 * c.sum())
    with pytest.raises(ValueError, match="the gradients of ours and of plain autograd"):
        iteration.measure(smoke=True)


@pytest.mark.parametrize(
    "name, size", [("convnet", {"width": 8, "depth": 2}), ("vgg11", {"width": 4}), ("vit", {"width": 32, "depth": 1})]
)
def test_ours_and_the_plain_loop_end_with_the_same_network_and_accuracy_in_float64(randn, name, size):
    """Over a whole training, in batches, with augmentation, dropout, clipping, warm-up and a moving average."""
    images, labels = randn(12, 3, 32, 32), torch.arange(12) % 3
    recipe = dict(epochs=40, batch=5, learning_rate=0.05, momentum=0.9, weight_decay=5e-4, warm_up=True, ema_decay=0.9)
    recipe |= {"strategy": "color_crop_cutout_flip_scale_rotate", "clip_norm": 1.0}

    def new():
        return build(name, channels=3, size_px=32, classes=3, seed=0, **size).double()

    ours = train(new(), images.__getitem__, labels, seed=4, **recipe)
    plain = evaluation._train(textbook(new()), TensorDataset(images, labels), seed=4, **recipe)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    test = TensorDataset(randn(70, 3, 32, 32), torch.arange(70) % 3)
    assert accuracy(ours, test.tensors[0].__getitem__, test.tensors[1]) == evaluation._accuracy(plain, test)


def test_the_nearest_images_are_least_squares_and_what_they_miss_is_a_share_of_the_variance():
    rng = torch.Generator().manual_seed(0)
    basis, target = torch.randn(12, 4, generator=rng), torch.randn(12, generator=rng)
    weights = torch.zeros(4, requires_grad=True)
    found = representable.nearest(lambda: basis @ weights, [weights], target, iterations=600)
    solved = basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
    assert found == pytest.approx(solved, abs=0.01)
    missed = ((solved - target) ** 2).sum() / ((target - target.mean()) ** 2).sum()
    assert representable.missed_share(found, target) == pytest.approx(missed.item(), rel=0.01)
    assert representable.missed_share(target.mean().expand(12), target) == pytest.approx(1)


def test_what_ld3m_can_draw_of_a_set_lies_between_its_start_and_the_set(monkeypatch):
    few = {name: 1 for name in ("convnet", "alexnet", "vgg11", "resnet18", "vit")}
    given = {"architectures": ["convnet", "alexnet"], "evaluate.recipe.epochs": few, "spaces.ld3m.steps": 2}
    experiment = Experiment(load_params(given))
    pixels, labels = experiment.initial(1)
    target = experiment.dataset.normalization.normalize(pixels)
    monkeypatch.setattr(Experiment, "images_of", lambda *cell: (target, labels))
    found = representable.measure(experiment, "dc", iterations=10)
    missed = found.groupby("images").missed.first()
    assert missed["as distilled"] == 0 < missed["nearest of the decoder"] < missed["through the autoencoder"] < 0.5
    assert 0 < missed["nearest of LD3M"] < 0.5
    assert set(found.architecture) == {"convnet", "alexnet", "unseen"} and set(found.n) == {3}
    assert (found[found.images == "as distilled"][["change", "change_low", "change_high"]] == 0).all(axis=None)


BURN = """
import os, sys, time
print("Running stage 'burn@1':", flush=True)
ended, writes = os.pipe()
if os.fork() == 0:  # its parent does not collect it
    os.setsid()
    held, began = bytearray(os.urandom(2**20) * 80), time.process_time()
    while time.process_time() - began < 0.7:
        pass
    os._exit(0)
os.close(writes)
os.read(ended, 1)
print("Running stage 'rest':", flush=True)
time.sleep(0.3)
"""


def test_what_make_uses_is_measured_over_all_processes_in_a_new_clone(tmp_path):
    end_workers()  # those of other tests
    clone = tmp_path / "clone"
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/.installed").touch()
    (clone / "burn.py").write_text(BURN)
    lines = ["$(VENV)/.installed: burn.py", "\tfalse", "reproduce: $(VENV)/.installed", f"\t{sys.executable} burn.py"]
    (clone / "Makefile").write_text("\n".join([*lines, "broken:", "\tfalse", ""]))
    git = ["git", "-C", str(clone), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "Makefile", "burn.py"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    (clone / "burn.py").write_text("uncommitted: not run")
    reproduce.main([str(clone), str(clone), "--out", str(tmp_path / "found/reproduce.csv")])
    found = pd.read_csv(tmp_path / "found/reproduce.csv", dtype={"commit": str})
    assert list(found) == ["machine", "version", "commit", "stage", "wall_s", "cpu_s", "peak_mib"]
    assert found.version.tolist() == ["old"] * 3 + ["new"] * 3 and found.commit.str.fullmatch("[0-9a-f]{7}").all()
    for _, rows in found.groupby("version"):
        burn, rest, everything = rows.set_index("stage").loc[["burn@1", "rest", "all"]].itertuples()
        assert 0.6 <= burn.cpu_s <= everything.cpu_s and burn.wall_s > 0.6 and burn.peak_mib > 75
        assert everything.peak_mib >= burn.peak_mib and everything.wall_s >= burn.wall_s + rest.wall_s - 0.2
    with pytest.raises(RuntimeError, match="make broken .* ended with status 2"):
        reproduce.main([str(clone), "--target", "broken"])
    with pytest.raises(FileNotFoundError, match="make install"):
        reproduce.main([str(tmp_path)])
