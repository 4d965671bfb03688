"""The estimate counts what the stages do, times the real code, and never refuses work."""

import re
import time

import pytest
import torch

from ld3m.pipeline import estimate
from ld3m.pipeline.estimate import StandIns
from ld3m.pipeline.profiles import PARAMS, ablation_settings, load_params
from ld3m.runtime import paths


@pytest.fixture
def shown(monkeypatch, capsys):
    """What is printed where an iteration takes what is given, a network 1000 s, a step of a prior half a second."""

    def show_with(iteration_seconds):
        calls = []
        given = {"network_seconds": lambda experiment, *size: calls.append(size) or 1000.0}
        given |= {"iteration_seconds": iteration_seconds, "prior_seconds": lambda experiment, part: 0.5}
        for name, function in given.items():
            monkeypatch.setattr(estimate, name, function)
        estimate.estimate(StandIns(load_params()))
        assert len(calls) == len(set(calls))  # every size of network is timed once
        return capsys.readouterr().out

    return show_with


def test_every_stage_is_counted_as_often_as_it_works(shown):
    printed, params = shown(lambda *arguments: 1.0), load_params()
    found = re.findall(r"(?m)^(.+?)  +([\d,]+) s +\d+\.\d\d GiB  (prior|main|report)$", printed)
    rows = {name: (int(seconds.replace(",", "")), table) for name, seconds, table in found}
    assert len(rows) == len(found) == len(printed.splitlines()) - 2
    iterations = params.budget("dm", "ld3m", 1).iterations
    checks = (1 + params.distill.validation_checks) * params.distill.validation_seeds
    assert rows["prior.denoiser"] == (params.prior.denoiser.steps / 2, "prior")
    assert rows["trajectories"] == (1000 * params.trajectories.experts, "main")
    assert rows["distill dm-ld3m-1"] == (iterations + 1000 * checks, "main")
    assert rows["distill dm-ld3m-1-runs"] == (2 * (iterations + 1000 * checks), "report")  # runs 1 and 2
    assert rows["evaluate full_data"] == (1000 * params.evaluate.seeds * len(params.architectures), "main")
    settings = sum(len(ablation_settings(name)) for name in params.ablations.settings)
    networks = params.ablations.seeds * len(params.ablations.architecture)
    assert rows["ablations"] == (settings * (params.ablations.iterations + 1000 * networks), "report")


def test_memory_that_runs_out_is_a_row_that_names_what_to_lower_and_the_others_follow(shown):
    printed = shown(lambda *arguments: torch.empty(2**50))
    assert re.search(r"(?m)^distill dc-pixel-1 +memory ran out .*: lower objectives\.dc\.real_batch", printed)
    assert re.search(r"(?m)^evaluate dm-ld3m-10 +[\d,]+ s", printed) and re.search(r"main: [\d,]+ min", printed)


def test_the_seconds_of_an_iteration_a_training_and_a_network_are_those_of_the_real_code(monkeypatch):
    """More steps of the reverse process, more images and more epochs take longer."""
    monkeypatch.setattr(estimate.time, "perf_counter", time.process_time)  # which other work does not change
    experiment = StandIns(load_params({"processes": 1}))
    short, long = (
        estimate.iteration_seconds(StandIns(load_params({"spaces.ld3m.steps": steps})), "dm", "ld3m", 1, "prior")
        for steps in (1, 10)
    )
    assert 0 < short < long
    few, many = (estimate.network_seconds(experiment, "convnet", images, 2, 32) for images in (32, 3200))
    assert 0 < few < many
    halved = StandIns(load_params({"processes": 2}))
    assert estimate.network_seconds(halved, "convnet", 3200, 2, 32) < many


@pytest.mark.parametrize("part", ["prior.autoencoder", "prior.denoiser", "gan"])
def test_a_step_of_training_a_prior_is_timed(part, monkeypatch):
    monkeypatch.setattr(estimate.os, "cpu_count", lambda: 1)
    small = {"prior.autoencoder.batch": 4, "prior.denoiser.batch": 4, "gan.batch": 4}
    assert estimate.prior_seconds(StandIns(load_params(small)), part) > 0


def test_what_is_missing_is_replaced_by_random_data_weights_and_experts(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", tmp_path)  # no prior, no GAN, no trajectories
    experiment = StandIns(load_params({"datasets.mnist5k.source": "data/nowhere", "spaces.ld3m.steps": 1}))
    assert len(experiment.dataset.train.labels) == 11_700 and experiment.dataset.train.stored.numel() < 10**6
    for objective, space, prior in (("mtt", "pixel", "data"), ("dm", "glad", "gan"), ("dc", "ld3m", "prior")):
        assert estimate.iteration_seconds(experiment, objective, space, 1, prior) > 0


def test_the_command_applies_a_profile_and_leaves_params_yaml_as_it_is(monkeypatch):
    shown = []
    monkeypatch.setattr(estimate, "estimate", lambda experiment: shown.append(experiment.params))
    before = PARAMS.read_bytes()
    estimate.main(["smoke"])
    assert PARAMS.read_bytes() == before
    assert shown[0].budget("dm", "ld3m").iterations < load_params().budget("dm", "ld3m").iterations
