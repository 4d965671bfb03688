"""Training against plain loops by hand, experts and evaluation networks against each trained alone."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import make_halves
from torch import nn

from ld3m.evaluation import evaluate, experts
from ld3m.evaluation.evaluate import EvaluationJob, evaluate_sets
from ld3m.evaluation.experts import open_experts, snapshot_bytes, train_experts
from ld3m.evaluation.training import accuracy, train, train_together
from ld3m.models.networks import build, flat_parameters, unflatten
from ld3m.runtime import storage
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.parallel import fan_out
from ld3m.runtime.seeds import derive, generator

RECIPE = {"epochs": 2, "batch": 4, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01, "warm_up": False}
RECIPE |= {"ema_decay": None}
NETWORK = partial(build, "convnet", channels=1, size_px=16, classes=2, width=4, depth=1)
SIZE = len(flat_parameters(NETWORK(seed=0)))


DATASET = make_halves(background=200, brightness=(15, 50))
LABELS = DATASET.train.labels
IMAGES = DATASET.normalization.normalize(DATASET.train.x())


def linear():
    network, rng = nn.Sequential(nn.Flatten(), nn.utils.skip_init(nn.Linear, 256, 2)).double(), generator(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 10)
    return network


def batches(seed, epoch, batch):
    return torch.randperm(64, generator=generator(seed, "epoch", epoch)).split(batch)


def plain_training(rates, *, batch, momentum=0.9, weight_decay=0.01, clip_norm=math.inf):
    """The weights (W, b) after every epoch of a linear network, with the gradient of the cross entropy by hand."""
    weight, bias = (parameter.detach().clone() for parameter in linear().parameters())
    velocities, after = [0, 0], []
    for epoch, rate in enumerate(rates):
        for index in batches(3, epoch, batch):
            x = IMAGES[index].flatten(1).double()
            error = ((x @ weight.T + bias).softmax(1) - nn.functional.one_hot(LABELS[index], 2)) / len(index)
            grads = [error.T @ x, error.sum(0)]
            scale = min(1.0, clip_norm / math.sqrt(sum(grad.square().sum() for grad in grads)))
            grads = [scale * grads[0] + weight_decay * weight, scale * grads[1] + weight_decay * bias]
            velocities = [momentum * velocity + grad for velocity, grad in zip(velocities, grads, strict=True)]
            weight, bias = weight - rate * velocities[0], bias - rate * velocities[1]
        after.append((weight, bias))
    return after


def trained_linear(**changes):
    """`linear()` trained in place, what is returned, and its weights after every epoch."""
    network, after = linear(), []

    def keep(networks):
        after.append(tuple(parameter.detach().clone() for parameter in networks[0].parameters()))

    settings = RECIPE | {"strategy": "none", "seed": 3} | changes
    returned = train(network, lambda index: IMAGES[index].double(), LABELS, after_epoch=keep, **settings)
    return network, returned, after


def scheduled(epoch, epochs, rate):
    half = max(1, epochs // 2)
    if epoch < half:
        return rate * (epoch + 1 - epoch / half) / half if half > 1 else rate
    return rate * (1 + math.cos(math.pi * (epoch - half) / (epochs - half))) / 2


@pytest.mark.parametrize(
    "changes", [{}, {"clip_norm": 0.5}, *({"warm_up": True, "epochs": n} for n in (1, 2, 3, 8, 9))]
)
def test_training_is_sgd_with_momentum_decay_a_schedule_and_clipped_gradients(changes):
    epochs, clip_norm = changes.get("epochs", 2), changes.get("clip_norm", math.inf)
    rates = [scheduled(epoch, epochs, 0.1) if "warm_up" in changes else 0.1 for epoch in range(epochs)]
    network, returned, after = trained_linear(batch=5, **changes)
    assert returned is network and not network.training
    torch.testing.assert_close(tuple(network.parameters()), after[-1])
    torch.testing.assert_close(after, plain_training(rates, batch=5, clip_norm=clip_norm), rtol=1e-9, atol=1e-12)
    unclipped = plain_training(rates, batch=5)
    assert ("clip_norm" in changes) != torch.allclose(after[0][0], unclipped[0][0], rtol=1e-2)


def test_the_moving_average_is_returned_and_the_network_is_trained_as_without():
    network, average, after = trained_linear(epochs=4, ema_decay=0.75)
    expected = after[0]
    for decay, weights in zip((1 / 2, 2 / 3, 0.75), after[1:], strict=True):
        expected = tuple(decay * mean + (1 - decay) * weight for mean, weight in zip(expected, weights, strict=True))
    torch.testing.assert_close(tuple(average.parameters()), expected)
    assert average is not network and not average.training
    torch.testing.assert_close(after, trained_linear(epochs=4)[2], rtol=0, atol=0)


def test_everything_random_follows_from_the_seed():
    def trained(seed, strategy="color_crop_cutout_scale_rotate"):
        network = nn.Sequential(nn.Dropout(0.5), linear().float())
        settings = RECIPE | {"ema_decay": 0.9, "strategy": strategy, "seed": seed}
        return flat_parameters(train(network, IMAGES.__getitem__, LABELS, **settings))

    before = torch.get_rng_state()
    one = trained(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(trained(seed=1), one)
    assert not torch.equal(trained(seed=2), one)
    assert not torch.equal(trained(seed=1, strategy="none"), one)


def test_a_training_that_diverges_stops_with_the_step_and_what_to_try():
    reason = r"step \d: the loss is (nan|inf); the training diverges in epoch \d: lower learning_rate=1e\+30"
    with pytest.raises(ValueError, match=reason):
        train(linear().float(), IMAGES.__getitem__, LABELS, **RECIPE | {"learning_rate": 1e30}, strategy="none", seed=0)


@pytest.mark.parametrize("changes", [{}, {"warm_up": True, "ema_decay": 0.9}, {"clip_norm": 0.5}])
def test_networks_trained_together_are_what_each_is_alone(changes):
    settings = RECIPE | {"epochs": 3, "batch": 5, "strategy": "color_crop_cutout_scale_rotate"} | changes
    networks, again = ([NETWORK(seed=k).double() for k in range(3)] for _ in range(2))
    epochs, images = [], IMAGES.double()
    keep = lambda networks: epochs.append([flat_parameters(network) for network in networks])  # noqa: E731
    together = train_together(networks, images.__getitem__, LABELS, seeds=[7, 8, 9], after_epoch=keep, **settings)
    assert len(epochs) == 3
    for k, network in enumerate(again):
        alone = train(network, images.__getitem__, LABELS, seed=7 + k, **settings)
        assert not together[k].training
        torch.testing.assert_close(flat_parameters(together[k]), flat_parameters(alone), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(epochs[-1][k], flat_parameters(network), rtol=1e-9, atol=1e-11)


def test_accuracy_counts_the_right_ones_in_evaluation_mode():
    scores = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 2, 1], [5, 0, 0], [0, 0, 1]])
    network, sizes = nn.Sequential(nn.Dropout(0.99)).train(), []
    network.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    assert accuracy(network, scores.__getitem__, torch.tensor([0, 2, 0, 0, 1]), batch=2) == 3 / 5
    assert sizes == [2, 2, 1] and not network.training


SETTINGS = dict(new_network=NETWORK, epochs=2, batch=8, learning_rate=0.1, strategy="color_crop", seed=0)


def trained_experts(folder, *, count, processes=1, **changes):
    """The records of experts and the snapshots (epochs + 1, P) of each."""
    checkpoint = Checkpoint(folder.with_name(f"{folder.name}-checkpoint.safetensors"))
    arguments = {"count": count, "processes": processes, "checkpoint": checkpoint} | SETTINGS | changes
    records = train_experts(folder, DATASET, **arguments)
    checkpoint.remove()
    files = sorted(folder.glob("expert-*"))
    assert [file.name for file in files] == [f"expert-000{k}.safetensors" for k in range(count)]
    return records, [storage.read_tensors(file)[0]["snapshots"] for file in files]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "three"
    return folder, *trained_experts(folder, count=3, processes=2)


def test_an_expert_does_not_depend_on_how_many_there_are_or_on_the_processes(three, tmp_path):
    folder, records, snapshots = three
    fewer, _ = trained_experts(tmp_path / "two", count=2)
    assert [record["expert"] for record in records] == [0, 1, 2] and fewer == records[:2]
    for file in (tmp_path / "two").glob("expert-*"):
        assert file.read_bytes() == (folder / file.name).read_bytes()
    assert len({one[-1].sum().item() for one in snapshots}) == 3


def test_experts_trained_in_groups_do_not_depend_on_how_many_there_are(three, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "network_chunk_size", lambda device, *, batch, size_px: 2)
    (five, snapshots), (fewer, same) = (trained_experts(tmp_path / str(count), count=count) for count in (5, 3))
    assert [record["expert"] for record in five] == [0, 1, 2, 3, 4] and five[:3] == fewer
    torch.testing.assert_close(snapshots[:3], same, rtol=0, atol=0)
    torch.testing.assert_close(snapshots[:3], three[2], rtol=1e-3, atol=1e-5)
    for one, other in zip(three[1], fewer, strict=True):
        assert one["validation_accuracy"] == pytest.approx(other["validation_accuracy"], abs=0.1)


def test_snapshots_are_those_of_plain_sgd_from_the_initialization(tmp_path):
    """One expert against a plain loop in float64: no momentum, no decay, a constant rate."""
    _, (stored,) = trained_experts(tmp_path / "one", count=1, strategy="none")
    seed = derive(0, "expert", 0)
    network = NETWORK(seed=seed)
    assert torch.equal(stored[0], flat_parameters(network))
    flat = stored[0].double()
    for epoch in range(2):
        for index in batches(seed, epoch, 8):
            flat.requires_grad_()
            logits = torch.func.functional_call(network, unflatten(flat, network), (IMAGES[index].double(),))
            picked = logits.log_softmax(1)[torch.arange(len(index)), LABELS[index]]
            (grad,) = torch.autograd.grad(-picked.mean(), flat)
            flat = (flat - 0.1 * grad).detach()
        torch.testing.assert_close(stored[epoch + 1].double(), flat, rtol=1e-4, atol=1e-5)


def test_chosen_snapshots_are_read_and_the_record_is_the_accuracy_of_the_last(three):
    folder, records, snapshots = three
    opened = open_experts(folder, count=3, last_epoch=2, parameters=SIZE)
    assert len(opened) == 3 and snapshot_bytes(NETWORK(seed=0), count=3, epochs=2) == 3 * snapshots[0].nbytes
    for expert, whole in enumerate(snapshots):
        assert whole.shape == (3, SIZE) and len(torch.unique(whole, dim=0)) == 3
        assert torch.equal(opened.snapshots(expert, [2, 0]), whole[[2, 0]])
        assert records[expert]["sha256"] == storage.tensors_hash({"snapshots": whole})
    network = NETWORK(seed=0)
    nn.utils.vector_to_parameters(snapshots[1][-1], network.parameters())
    images = DATASET.normalization.normalize(DATASET.validation.x())
    expected = (network(images).argmax(1) == DATASET.validation.labels).double().mean().item()
    assert records[1]["validation_accuracy"] == expected > 0.6


def test_files_of_experts_that_do_not_fit_are_refused(three):
    for changes, reason in (
        ({"count": 4}, "expert-0003.*No such file"),
        ({"last_epoch": 3}, f"expert-0000.* does not give 4 .* holds 3 snapshots of {SIZE} parameters.: train 3 exp"),
        ({"parameters": SIZE + 1}, f"expert-0000.* of {SIZE + 1} parameters .* holds 3 snapshots of {SIZE} "),
    ):
        with pytest.raises(ValueError, match=reason):
            open_experts(three[0], **{"count": 3, "last_epoch": 2, "parameters": SIZE} | changes)


RECIPES = {
    "convnet": RECIPE | {"epochs": 1, "strategy": "color_crop"},
    "other": RECIPE | {"epochs": 2, "strategy": "none"},
}


def job(images, *, names=("convnet", "other"), count=2, seed=0):
    recipes = {name: RECIPES[name] for name in names}
    return EvaluationJob(images.__getitem__, LABELS[: len(images)], recipes, range(count), seed)


def evaluated(*jobs, processes=1, networks=None):
    shared = {"normalization": DATASET.normalization, "networks": networks or dict.fromkeys(RECIPES, NETWORK)}
    return evaluate_sets(jobs, DATASET.test, processes=processes, **shared)


def seeds_of(*jobs):
    """What is asked for to evaluate sets: [(architecture, seed), ...]."""
    asked = []

    def new_network(name, seed):
        asked.append((name, seed))
        return NETWORK(seed=seed)

    evaluated(*jobs, networks={name: partial(new_network, name) for name in RECIPES})
    return asked


def test_networks_are_paired_over_sets_and_differ_otherwise():
    asked = seeds_of(job(IMAGES[:6], count=3))
    assert [name for name, _ in asked] == ["convnet"] * 3 + ["other"] * 3 and len(dict(map(reversed, asked))) == 6
    assert seeds_of(job(-IMAGES[:9], count=3)) == asked
    assert seeds_of(job(IMAGES[:6], names=("other",))) == asked[3:5]
    assert not set(seeds_of(job(IMAGES[:6], seed=1))) & set(asked)


def test_sets_are_scored_in_order_each_as_alone_whatever_the_processes(monkeypatch):
    jobs = [job(IMAGES[:6]), job(-IMAGES[:9], names=("convnet",), count=3, seed=1)]
    expected = []
    test = DATASET.normalization.normalize(DATASET.test.x())
    for given in jobs:
        expected.append({name: [] for name in given.recipes})
        for name, seed in seeds_of(given):
            network = train(NETWORK(seed=seed), given.fetch, given.labels, seed=seed, **RECIPES[name])
            expected[-1][name].append(accuracy(network, test.__getitem__, DATASET.test.labels))
    assert evaluated(*jobs) == evaluated(*jobs, processes=2) == expected
    assert list(expected[0]) == ["convnet", "other"] and expected[0] != expected[1]
    monkeypatch.setattr(evaluate, "network_chunk_size", lambda device, *, batch, size_px: 2)
    for grouped, alone in zip(evaluated(*jobs), expected, strict=True):
        assert grouped == {name: pytest.approx(scores, abs=0.1) for name, scores in alone.items()}


def threads_of(k):
    if k == 5:
        raise ValueError("the last task fails")
    return k, torch.get_num_threads()


@pytest.mark.parametrize("processes", [1, 2])
def test_tasks_keep_their_order_and_run_on_one_thread(processes):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    given = {"processes": processes, "label": "tasks"}
    assert fan_out(threads_of, [{"k": k} for k in range(5)], **given) == [(k, 1) for k in range(5)]
    with pytest.raises(ValueError, match="the last task fails"):
        fan_out(threads_of, [{"k": k} for k in range(6)], **given)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_training_loads_no_compiler():
    """It would take a second in every worker process."""
    program = """
import sys
import torch
from ld3m.evaluation.training import train
from ld3m.models.networks import build
network = build("convnet", channels=1, size_px=8, classes=2, width=2, seed=0)
recipe = dict(momentum=0.9, weight_decay=0.0, warm_up=True, ema_decay=0.9, strategy="flip", clip_norm=1.0)
recipe |= dict(epochs=2, batch=2, learning_rate=0.1, seed=0)
train(network, torch.randn(2, 1, 8, 8).__getitem__, torch.arange(2), **recipe)
print("torch._dynamo" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"
