"""The cost of the work before it is done: what is counted, what is tried, and what will not fit."""

import re
import shutil
from math import ceil

import pytest
import torch

from ld3m.models.networks import flat_parameters
from ld3m.pipeline import cost, measure
from ld3m.pipeline.cost import Meter, announce, duration
from ld3m.pipeline.measure import Line, Plane, Taken
from ld3m.pipeline.profiles import ablation_settings, load_params
from ld3m.pipeline.rehearsal import Rehearsal
from ld3m.runtime import paths
from ld3m.runtime.memory import OutOfMemory
from ld3m.runtime.storage import write_tensors

GIB = 2**30


# What the expectations below are worked out from, whatever params.yaml comes to say.
GIVEN = {"distill.validation_seeds": 3, "spaces.ld3m.render_batch": 25, "spaces.glad.render_batch": 25}
GIVEN |= {"spaces.ld3m.uncheckpointed_steps": 0}


def line(a, b, full, *, peak=GIB):
    """a + b n seconds at size n."""
    return Line(tuple(Taken(n, a + b * n, peak) for n in (1, full + 1)), full, base=0.5 * GIB)


class Known(Rehearsal):
    """Every part takes what is written here."""

    def rendering(self, space, *, width):
        chain = {"pixel": (0, 0, 1), "glad": (0.5, 0, 1), "ld3m": (1, 0.2, 5)}[space]
        return Plane(line(1, 0, width, peak=1.5 * GIB), line(*chain, peak=1.5 * GIB), width)

    def matching(self, name, *, ipc):
        return Plane(line(1, 0, 10), line({"dc": 2, "dm": 1, "mtt": 3}[name], 0, 5), 10)

    def networks(self, architectures, *, batch):
        return {name: (line(0.1, 0.01, batch), line(0, 0.001, 100)) for name in architectures}

    def prior_training(self):
        return line(0, 0.02, 64), line(0, 0.01, 64)

    def gan_training(self):
        return line(0, 0.1, 8)


@pytest.fixture(scope="module")
def meter():
    return Meter(Known(load_params(GIVEN)))


@pytest.mark.parametrize(
    "cell, seconds, learned",
    [
        (("dm", "pixel", 1), 1, 10 * 3072),
        (("dc", "ld3m", 1), 2 + 2, 10 * (256 + 64)),
        (("dm", "ld3m", 10), 2 * 2 + 1, 100 * (256 + 64)),  # a hundred images, twice 25 at once
        (("mtt", "glad", 1), 0.5 + 3, 10 * (4 * 16 * 64 + 5 * 96) + 1),
    ],
)
def test_a_cell_takes_what_its_space_and_its_objective_take(meter, cell, seconds, learned):
    params, ipc = meter.params, cell[2]
    (found,) = cost.of_cell(meter, *cell, range(1))
    budget = params.budget(*cell)
    assert (found.images, found.parameters, found.iterations) == (10 * ipc, learned, budget.iterations)
    assert found.seconds == pytest.approx(seconds)
    recipe = params.recipe("convnet", ipc)
    network = recipe["epochs"] * (0.1 * ceil(10 * ipc / recipe["batch"]) + 0.01 * 10 * ipc) + 500 * 0.001
    assert found.checks == pytest.approx(2 * 2 * network)  # two checks, of three networks in two turns
    assert found.total == pytest.approx(found.iterations * found.seconds + found.checks)
    rendering = 2 if cell[1:] == ("ld3m", 10) else 1  # at once, a part on each core
    assert found.peak == pytest.approx((0.5 + rendering * 1 + 0.5) * GIB)  # of both, above what was there before


def test_graphs_that_are_kept_are_those_of_every_part_of_the_set():
    given = Meter(Known(load_params(GIVEN | {"spaces.ld3m.uncheckpointed_steps": 5})))
    (found,) = cost.of_cell(given, "dm", "ld3m", 10, range(1))  # a hundred images in four parts, two at once
    assert found.seconds == pytest.approx(2 * 2 + 1)
    assert found.peak == pytest.approx((0.5 + 4 * 1 + 0.5) * GIB)


def test_several_runs_go_side_by_side_on_one_thread_each(meter):
    (one,), (four,) = (cost.of_cell(meter, "dc", "ld3m", 1, runs) for runs in (range(1), range(1, 5)))
    assert four.iterations == 4 * one.iterations
    assert four.seconds * four.iterations == pytest.approx(
        2 * one.iterations * (2 + 2 * 2)
    )  # two threads did DC before
    assert four.checks == pytest.approx(2 * one.checks * 6 / 4)  # three networks one after another, not in two turns
    assert four.peak > 2 * one.peak


def test_judges_experts_and_the_full_data(meter):
    params = meter.params
    (found,) = cost.of_judging(meter, 1, range(1), sets=9)
    epochs = {name: params.recipe(name, 1)["epochs"] for name in params.grid.architecture}
    networks = dict.fromkeys(epochs, 3)
    assert found.iterations == sum(networks[name] * epochs[name] for name in epochs)
    seconds = sum(networks[name] * (epochs[name] * 0.2 + 1000 * 0.001) for name in epochs)
    assert found.total == pytest.approx(9 * seconds / 15 * 8)  # 15 networks by two are 8 rounds
    (found,) = cost.of_judging(meter, 0, range(1))
    assert found.iterations == 3 * (3 * 3 + 8 + 12) * 55  # epochs of 3500 images in batches of 64
    (found,) = cost.of_trajectories(meter)
    assert (found.iterations, found.images, found.parameters) == (4 * 3 * 55, 3500, 50890)
    whole = 4 * (3 * (54 * (0.1 + 0.64) + 0.1 + 0.01 * 44) + 500 * 0.001)
    assert found.total == pytest.approx(whole / 2)


def test_the_priors_and_the_gan(meter):
    autoencoder, denoiser = cost.of_prior(meter)
    assert (autoencoder.iterations, denoiser.iterations) == (600, 2500)
    assert autoencoder.total == pytest.approx(600 * 1.28) and autoencoder.lower == ("prior.autoencoder.batch",)
    parts = meter.rehearsal.prior
    assert denoiser.parameters == sum(p.numel() for m in (parts.unet, parts.embedding) for p in m.parameters())
    (gan,) = cost.of_gan(meter)
    assert gan.total == pytest.approx(2500 * 0.8)
    assert {gan.lower, denoiser.lower} == {("gan.batch",), ("prior.denoiser.batch",)}


def test_an_ablation_counts_the_steps_of_its_settings(meter):
    settings = ablation_settings("steps", GIVEN)
    (found,) = cost.of_ablation(meter, "steps", settings)
    chains = sum(1 + 0.2 * steps for steps in (2, 5, 10, 20))
    count = meter.params.ablations.iterations
    assert found.iterations == 4 * count
    # in two turns; DM on one thread
    assert found.seconds * 4 * count == pytest.approx(2 / 4 * count * (chains + 4 * 2 * 1))
    epochs = sum(meter.params.recipe(name, 1)["epochs"] for name in ("convnet", "vgg11", "vit"))
    assert found.checks == pytest.approx(2 / 4 * 4 * 3 * (epochs * 0.2 + 3 * 1.0))


def test_every_cell_of_the_grid_and_of_more_is_counted_once(meter):
    rows = list(cost.of_everything(meter, {name: ablation_settings(name) for name in ("steps", "learned")}))
    names = [row.work for row in rows]
    assert len(set(names)) == len(names)
    assert {row.work for row in rows if row.part == "there already"} == {*names[:3]} == {
        "prior, autoencoder", "prior, denoiser", "gan",
    }  # embedded  # fmt: skip
    assert [name for name in names if name.startswith("ablation")] == ["ablation steps", "ablation learned"]
    cells = {f"distill {o}-{s}-1" for o in ("dc", "dm", "mtt") for s in ("pixel", "ld3m")}
    assert {row.work for row in rows if row.part == "main table" and row.work.startswith("distill")} == cells
    assert {"distill dc-glad-1", "distill dm-glad-1, 3 runs", "distill mtt-glad-1"} <= set(names)
    judged = [row.count for row in rows if row.part == "main table" and row.work.startswith("evaluate")]
    assert sorted(judged) == [1, 9]  # the full data; six cells and three controls


def test_the_command_answers_for_the_smoke_profile(monkeypatch, capsys):
    monkeypatch.setattr(cost, "START", "pass")
    monkeypatch.setattr(cost.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(measure, "BUDGET_S", 0.01)
    before = paths.PARAMS.read_bytes()
    cost.main(["smoke"])
    printed = capsys.readouterr().out
    assert paths.PARAMS.read_bytes() == before
    row = re.search(r"(?m)^distill mtt-ld3m-1 +2 +545 +4 +([\d.]+) s +([\d.]+) s +(0|1)\.\d\d GiB", printed)
    assert row and float(row[2]) > 4 * float(row[1]) > 0, printed  # four iterations, and checks
    assert "evaluate ipc 1, 2 cells" in printed and "TOO LITTLE" not in printed and "there already" not in printed
    assert (
        "random weights in the place of the prior: the data set has 2 classes, the prior was trained on 10\n" in printed
    )
    assert re.search(r"main table: .*\nreport: .*\ndisk: \d+ MiB of trajectories, \d+ MiB of decoded images", printed)


def test_what_is_not_there_is_replaced_and_said(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET_S", 0.01)
    params = load_params({"datasets.mnist5k.source": "data/nowhere", "datasets.mnist5k.classes": ["0", "1", "2"]})
    rehearsal = Rehearsal(params)
    assert [len(split) for split in (rehearsal.dataset.train, rehearsal.dataset.test)] == [3 * 1170, 3 * 50]
    assert rehearsal.dataset.train.stored.numel() < 10**6  # many are the same
    assert rehearsal.prior.classes == 3
    assert rehearsal.absent.keys() == {"data", "prior"}
    state = torch.get_rng_state()
    assert rehearsal.rendering("ld3m", width=3).seconds() > 0
    assert rehearsal.matching("mtt", ipc=1).seconds() > 0  # without experts
    assert torch.equal(torch.get_rng_state(), state)


def test_a_broken_prior_is_not_replaced_by_a_stand_in(monkeypatch, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"cut short")
    params = load_params({"prior.source": str(tmp_path / "model.ckpt"), "more.cells": {}})
    with pytest.raises(ValueError, match="model.ckpt is no checkpoint of PyTorch, or a broken one"):
        _ = Rehearsal(params).prior
    folder = tmp_path / paths.prior_folder("mnist5k").relative_to(paths.ROOT)
    shutil.copytree(paths.prior_folder("mnist5k"), folder)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    given = {"prior.source": str(folder), "more.cells": {}}
    rehearsal = Rehearsal(load_params(given))
    assert rehearsal.prior.classes == 10 and rehearsal.absent["prior"].startswith(f"{folder} in the place of the prior")
    with pytest.raises(ValueError, match="size_px = 36 does not fit this prior"):
        _ = Rehearsal(
            load_params({"prior.source": str(folder), "datasets.mnist5k.size_px": 36, "more.cells": {}})
        ).prior
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="prior cannot be read .*dvc checkout -f prior"):
        _ = Rehearsal(load_params()).prior


def test_a_notebook_says_what_it_costs_and_refuses_what_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(cost, "Rehearsal", Known)
    params = load_params(GIVEN)
    announce(cost.of_cell, params, "dm", "ld3m", 1, range(1))
    printed = capsys.readouterr().out
    assert "distill dm-ld3m-1: 10 images, 3,200 learned parameters, 80 iterations of 3 s and" in printed
    assert "at most 2.00 GiB on" in printed
    monkeypatch.setattr(cost, "available_bytes", lambda device: GIB)
    monkeypatch.setattr(cost, "used_bytes", lambda device: GIB / 2)
    lower = r"spaces\.ld3m\.render_batch or objectives\.dm\.real_batch"
    with pytest.raises(
        OutOfMemory, match=rf"dm-ld3m-1 needs about 2\.00 GiB, 1\.50 GiB are there: lower {lower} in"
    ):
        announce(cost.of_cell, params, "dm", "ld3m", 1, range(1))


def test_trajectories_say_what_they_take_on_the_disk(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cost, "Rehearsal", Known)
    params = load_params({"trajectories.experts": 2, "networks.convnet": {"width": 8, "depth": 3}})
    announce(cost.of_trajectories, params)
    printed = capsys.readouterr().out
    network = Known(params).new_network("convnet")(seed=0)
    (found,) = cost.of_trajectories(Meter(Known(params)))
    assert re.search(rf"^trajectories: .* GiB on .*; {found.disk / 2**20:,.1f} MiB of the disk\n$", printed)
    draw = {"snapshots": flat_parameters(network).detach().expand(params.trajectories.epochs + 1, -1)}
    write_tensors(tmp_path / "expert", draw, {"expert": 0})
    assert 2 * (tmp_path / "expert").stat().st_size == pytest.approx(found.disk, rel=0.01)


def test_anybodys_set_costs_what_ours_of_as_many_images_does(meter):
    for count, ipc in ((10, 1), (100, 10)):
        assert list(cost.of_foreign(meter, count)) == list(cost.of_judging(meter, ipc, range(1)))
    (few,), (more,) = cost.of_foreign(meter, 12), cost.of_foreign(meter, 14)
    assert (few.images, more.images) == (12, 14) and few.total < more.total


def test_durations_are_read_easily():
    found = [duration(seconds) for seconds in (0.01234, 119.0, 125.0, 7100.0, 7300.0, 3 * 86400.0)]
    assert found == ["0.0123 s", "119 s", "2.1 min", "118.3 min", "2.0 h", "3.0 days"]
