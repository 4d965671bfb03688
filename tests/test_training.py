import math
from functools import partial
from unittest.mock import MagicMock, call

import pytest
import torch
from torch import nn

from ld3m.data.dataset import Dataset, Normalization, Split
from ld3m.evaluation import experts
from ld3m.evaluation.evaluate import EvaluationJob, evaluate_networks, evaluate_sets
from ld3m.evaluation.experts import open_experts, train_experts
from ld3m.evaluation.training import accuracy, train, train_together
from ld3m.models.networks import build, flat_parameters, unflatten
from ld3m.runtime import storage
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.devices import network_chunk_size
from ld3m.runtime.parallel import fan_out

RECIPE = dict(
    epochs=2, batch=4, learning_rate=0.1, momentum=0.9, weight_decay=0.01, warm_up=False, ema_decay=None
)  # fmt: skip
NETWORK = partial(build, "convnet", channels=1, size_px=8, classes=3, width=4, depth=1)


def split(count, seed):
    """Blurry blobs, bright in a third of the image that depends on the class."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    uint8 = torch.randint(0, 60, (count, 1, 8, 8), generator=rng, dtype=torch.uint8)
    for k, label in enumerate(labels):
        uint8[k, :, 2 * label : 2 * label + 3] += 150
    return Split(uint8, labels, ("a", "b", "c"))


DATASET = Dataset("toy", split(24, 0), split(12, 1), split(12, 2), Normalization((0.3,), (0.25,)))
LABELS = DATASET.train.labels
IMAGES = DATASET.normalization.normalize(DATASET.train.x())


def linear():
    network = nn.Sequential(nn.Flatten(), nn.utils.skip_init(nn.Linear, 64, 3)).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 10)
    return network


def plain_training(batches, rates, *, momentum=0.9, weight_decay=0.01, clip_norm=math.inf):
    """The weights (W, b) after every epoch of a linear network, with the gradient of the cross entropy by hand."""
    weight, bias = (parameter.detach().clone() for parameter in linear().parameters())
    velocities, after = [0, 0], []
    for epoch, rate in enumerate(rates):
        for index in batches[epoch]:
            x = IMAGES[index].flatten(1).double()
            error = ((x @ weight.T + bias).softmax(1) - nn.functional.one_hot(LABELS[index], 3)) / len(index)
            grads = [error.T @ x, error.sum(0)]
            scale = min(1.0, clip_norm / math.sqrt(sum(grad.square().sum() for grad in grads)))
            grads = [scale * grads[0] + weight_decay * weight, scale * grads[1] + weight_decay * bias]
            velocities = [momentum * velocity + grad for velocity, grad in zip(velocities, grads, strict=True)]
            weight, bias = weight - rate * velocities[0], bias - rate * velocities[1]
        after.append((weight, bias))
    return after


@pytest.fixture
def recorded():
    """Trains `linear()` and gives (network, returned network, batches by epoch, weights after every epoch)."""

    def run(**changes):
        network, batches, after = linear(), [[]], []

        def fetch(index):
            batches[-1].append(index)
            return IMAGES[index].double()

        def after_epoch(trained):
            assert trained is network
            after.append(tuple(parameter.detach().clone() for parameter in trained.parameters()))
            batches.append([])

        settings = RECIPE | {"strategy": "none", "seed": 3} | changes
        returned = train(network, fetch, LABELS, after_epoch=after_epoch, **settings)
        return network, returned, batches[:-1], after

    return run


def test_training_is_sgd_with_momentum_and_decay(recorded):
    network, returned, batches, after = recorded(batch=5)
    assert returned is network and not network.training
    torch.testing.assert_close(after, plain_training(batches, [0.1, 0.1]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(network.parameters()), after[-1])


def test_a_longer_gradient_is_scaled_down_to_the_norm_given(recorded):
    batches, after = recorded(batch=5, clip_norm=0.5)[2:]
    clipped, plain = plain_training(batches, [0.1, 0.1], clip_norm=0.5), plain_training(batches, [0.1, 0.1])
    assert not torch.allclose(clipped[0][0], plain[0][0], rtol=1e-2)
    torch.testing.assert_close(after, clipped, rtol=1e-12, atol=1e-12)


def test_every_epoch_sees_every_image_once_in_another_order(recorded):
    _, _, batches, _ = recorded(batch=5, epochs=3)
    orders = [torch.cat(epoch).tolist() for epoch in batches]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len(set(map(tuple, orders))) == 3 and list(range(24)) not in orders
    assert [[len(index) for index in epoch] for epoch in batches] == [[5, 5, 5, 5, 4]] * 3


def scheduled(epoch, epochs, rate):
    half = max(1, epochs // 2)
    if epoch < half:
        return rate * (epoch + 1 - epoch / half) / half if half > 1 else rate
    return rate * (1 + math.cos(math.pi * (epoch - half) / (epochs - half))) / 2


@pytest.mark.parametrize("epochs", [1, 2, 3, 8, 9])
def test_the_rate_rises_over_half_of_the_epochs_and_falls_as_a_cosine(recorded, epochs):
    _, _, batches, after = recorded(epochs=epochs, warm_up=True)
    rates = [scheduled(epoch, epochs, 0.1) for epoch in range(epochs)]
    assert max(rates) == rates[epochs // 2] == pytest.approx(0.1)
    torch.testing.assert_close(after, plain_training(batches, rates), rtol=1e-9, atol=1e-12)


def test_the_moving_average_is_returned_and_the_network_is_trained_as_without(recorded):
    network, average, _, after = recorded(epochs=4, ema_decay=0.75)
    expected = after[0]
    for weights in after[1:]:
        expected = tuple(0.75 * mean + 0.25 * weight for mean, weight in zip(expected, weights, strict=True))
    torch.testing.assert_close(tuple(average.parameters()), expected)
    assert average is not network and not average.training
    torch.testing.assert_close(after, recorded(epochs=4)[3], rtol=0, atol=0)


def trained(seed, strategy="color_crop_cutout_scale_rotate"):
    network = nn.Sequential(nn.Dropout(0.5), linear().float())
    return flat_parameters(
        train(network, IMAGES.__getitem__, LABELS, **RECIPE | {"ema_decay": 0.9}, strategy=strategy, seed=seed)
    )


def test_everything_random_follows_from_the_seed():
    torch.manual_seed(0)
    one = trained(seed=1)
    torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(trained(seed=1), one)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(trained(seed=2), one)
    assert not torch.equal(trained(seed=1, strategy="none"), one)


def test_a_training_that_diverges_stops_with_the_step_and_what_to_try():
    with pytest.raises(
        ValueError, match=r"step \d: the loss is (nan|inf); .*lower its learning_rate, 1e\+30.*epoch \d"
    ):
        train(linear().float(), IMAGES.__getitem__, LABELS, **RECIPE | {"learning_rate": 1e30}, strategy="none", seed=0)


@pytest.mark.parametrize("changes", [{}, {"warm_up": True, "ema_decay": 0.9}, {"clip_norm": 0.5}])
def test_networks_trained_together_are_what_each_is_alone(changes):
    settings = RECIPE | {"epochs": 3, "batch": 5, "strategy": "color_crop_cutout_scale_rotate"} | changes
    build_double = lambda k: NETWORK(seed=k).double()  # noqa: E731
    fetch = lambda index: IMAGES[index].double()  # noqa: E731
    epochs = []
    keep = lambda networks: epochs.append([flat_parameters(network) for network in networks])  # noqa: E731
    networks = [build_double(k) for k in range(3)]
    trained = train_together(networks, fetch, LABELS, seeds=[7, 8, 9], after_epoch=keep, **settings)
    for k, seed in enumerate([7, 8, 9]):
        network = build_double(k)
        alone = train(network, fetch, LABELS, seed=seed, **settings)
        assert len(epochs) == 3 and not trained[k].training
        torch.testing.assert_close(flat_parameters(trained[k]), flat_parameters(alone), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(epochs[-1][k], flat_parameters(network), rtol=1e-9, atol=1e-11)


def test_accuracy_counts_the_right_ones_in_evaluation_mode():
    scores = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 2, 1], [5, 0, 0], [0, 0, 1]])
    network = nn.Sequential(nn.Dropout(0.99))
    network.train()
    sizes = []

    def fetch(index):
        sizes.append(len(index))
        return scores[index]

    assert accuracy(network, fetch, torch.tensor([0, 2, 0, 0, 1]), batch=2) == 3 / 5
    assert sizes == [2, 2, 1] and not network.training


SETTINGS = dict(new_network=NETWORK, epochs=2, batch=8, learning_rate=0.1, strategy="color_crop", seed=0)


def trained_experts(folder, *, count, processes, **changes):
    checkpoint = Checkpoint(folder.with_name(f"{folder.name}-checkpoint.safetensors"))
    arguments = {"count": count, "processes": processes, "checkpoint": checkpoint} | SETTINGS | changes
    records = train_experts(folder, DATASET, **arguments)
    checkpoint.remove()
    return records


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "three"
    return folder, trained_experts(folder, count=3, processes=2)


def test_an_expert_does_not_depend_on_how_many_there_are_or_on_the_processes(three, tmp_path):
    folder, records = three
    fewer = trained_experts(tmp_path / "two", count=2, processes=1)
    assert [record["expert"] for record in records] == [0, 1, 2] and fewer == records[:2]
    files = sorted(file.name for file in folder.glob("expert-*"))
    assert files == [f"expert-000{k}.safetensors" for k in range(3)]
    for name in files[:2]:
        assert (tmp_path / "two" / name).read_bytes() == (folder / name).read_bytes()
    assert len({(folder / name).read_bytes() for name in files}) == 3


def test_experts_trained_in_groups_do_not_depend_on_how_many_there_are(three, tmp_path, monkeypatch):
    folder, records = three
    monkeypatch.setattr(experts, "network_chunk_size", lambda device, *, batch, size_px: 2)
    five, four = (trained_experts(tmp_path / str(count), count=count, processes=1) for count in (5, 4))
    assert [record["expert"] for record in five] == [0, 1, 2, 3, 4] and five[:4] == four
    names = sorted(file.name for file in (tmp_path / "5").glob("expert-*"))
    assert names == [f"expert-000{k}.safetensors" for k in range(5)]
    for k, name in enumerate(names):
        snapshots = storage.read_tensors(tmp_path / "5" / name)[0]["snapshots"]
        if k < 4:
            assert torch.equal(storage.read_tensors(tmp_path / "4" / name)[0]["snapshots"], snapshots)
        if k < 3:
            alone = storage.read_tensors(folder / name)[0]["snapshots"]
            torch.testing.assert_close(snapshots, alone, rtol=1e-3, atol=1e-5)
            assert records[k]["validation_accuracy"] == pytest.approx(five[k]["validation_accuracy"], abs=0.1)


@pytest.mark.parametrize(
    ("device", "batch", "size_px", "count"),
    [("cpu", 10, 32, 1), ("cuda", 10, 32, 8), ("cuda", 256, 32, 4), ("cuda", 256, 128, 1)],
)
def test_networks_at_once(device, batch, size_px, count):
    assert network_chunk_size(device, batch=batch, size_px=size_px) == count


def test_snapshots_are_those_of_plain_sgd_from_the_initialisation(three, tmp_path, monkeypatch):
    """One expert against a plain loop in float64: no momentum, no decay, a constant rate."""
    seeds, batches = [], [[]]

    def new_network(seed):
        seeds.append(seed)
        return NETWORK(seed=seed)

    def recorded_train(networks, fetch, labels, *, after_epoch, **settings):
        def recorded_fetch(index):
            batches[-1].append(index)
            return fetch(index)

        def recorded_epoch(trained):
            after_epoch(trained)
            batches.append([])

        return train_together(networks, recorded_fetch, labels, after_epoch=recorded_epoch, **settings)

    monkeypatch.setattr(experts, "train_together", recorded_train)
    trained_experts(tmp_path / "one", count=1, processes=1, new_network=new_network, strategy="none")
    network = NETWORK(seed=seeds[-1])
    stored = open_experts(tmp_path / "one", count=1, last_epoch=2, parameters=len(flat_parameters(network))).snapshots(
        0, [0, 1, 2]
    )
    assert torch.equal(stored[0], flat_parameters(network))
    flat = stored[0].double()
    for epoch in range(2):
        for index in batches[epoch]:
            flat.requires_grad_()
            logits = torch.func.functional_call(network, unflatten(flat, network), (IMAGES[index].double(),))
            picked = logits.log_softmax(1)[torch.arange(len(index)), LABELS[index]]
            (grad,) = torch.autograd.grad(-picked.mean(), flat)
            flat = (flat - 0.1 * grad).detach()
        torch.testing.assert_close(stored[epoch + 1].double(), flat, rtol=1e-4, atol=1e-5)


def test_snapshots_are_read_row_by_row(three, monkeypatch):
    folder, records = three
    size = len(flat_parameters(NETWORK(seed=0)))
    opened = open_experts(folder, count=3, last_epoch=2, parameters=size)
    assert len(opened) == 3
    for expert, file in enumerate(opened.files):
        whole = storage.read_tensors(file)[0]["snapshots"]
        assert whole.shape == (3, size) and len(torch.unique(whole, dim=0)) == 3
        assert torch.equal(opened.snapshots(expert, [2, 0]), whole[[2, 0]])
    file = MagicMock()
    rows = file.__enter__.return_value.get_slice.return_value
    rows.__getitem__.return_value = torch.zeros(size)
    monkeypatch.setattr(experts, "safe_open", lambda *arguments, **options: file)
    opened.snapshots(1, [1])
    assert rows.mock_calls == [call.__getitem__(1)]


def test_the_record_is_the_accuracy_of_the_last_snapshot(three):
    folder, records = three
    network = NETWORK(seed=0)
    stored = storage.read_tensors(folder / "expert-0001.safetensors")[0]["snapshots"]
    nn.utils.vector_to_parameters(stored[-1], network.parameters())
    images = DATASET.normalization.normalize(DATASET.validation.x())
    expected = (network(images).argmax(1) == DATASET.validation.labels).double().mean().item()
    assert records[1]["validation_accuracy"] == expected > 0.5


def test_files_of_experts_that_do_not_fit_are_refused(three, tmp_path):
    folder, _ = three
    size = len(flat_parameters(NETWORK(seed=0)))
    open_experts(folder, count=3, last_epoch=2, parameters=size)
    with pytest.raises(FileNotFoundError, match="expert-0003.safetensors is missing; `dvc repro traj"):
        open_experts(folder, count=4, last_epoch=2, parameters=size)
    with pytest.raises(ValueError, match=f"expert-0000.* holds 3 snapshots of {size} .*needed are 4 of {size}"):
        open_experts(folder, count=3, last_epoch=3, parameters=size)
    with pytest.raises(ValueError, match=f"3 snapshots of {size} .*needed are 3 of {size + 1}.*dvc repro"):
        open_experts(folder, count=3, last_epoch=2, parameters=size + 1)
    whole = (folder / "expert-0000.safetensors").read_bytes()
    file = tmp_path / "expert-0000.safetensors"
    for broken in (b"", whole[:20], whole[:-1], b"hello, world" * 9):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="expert-0000.safetensors is not a file of snapshots"):
            open_experts(tmp_path, count=1, last_epoch=2, parameters=size)
    for tensors in ({"other": torch.zeros(3, size)}, {"snapshots": torch.zeros(size)}):
        storage.write_tensors(file, tensors, {})
        with pytest.raises(ValueError, match="expert-0000.safetensors is not a file of snapshots"):
            open_experts(tmp_path, count=1, last_epoch=2, parameters=size)


def test_experts_ask_for_the_space_they_need(tmp_path, monkeypatch):
    asked = []

    def require_space(folder, needed_bytes):
        asked.append(needed_bytes)
        raise OSError("full")

    monkeypatch.setattr(experts, "require_space", require_space)
    with pytest.raises(OSError, match="full"):
        trained_experts(tmp_path / "experts", count=5, processes=1)
    assert asked == [5 * 3 * 4 * len(flat_parameters(NETWORK(seed=0)))] and not list(tmp_path.iterdir())


def evaluated(images, *, processes=1, seeds=2, new_network=NETWORK, seed=0, names=("convnet", "other")):
    recipes = {name: RECIPE | {"epochs": 1 + k, "strategy": "color_crop"} for k, name in enumerate(names)}
    (scores,) = evaluate_sets(
        [EvaluationJob(images.__getitem__, LABELS[: len(images)], recipes, range(seeds), seed)],
        DATASET.test,
        normalization=DATASET.normalization,
        networks={name: partial(new_network, name) if new_network is not NETWORK else NETWORK for name in names},
        processes=processes,
    )
    return scores


def test_networks_are_paired_over_sets_and_differ_otherwise():
    asked = []

    def new_network(name, seed):
        asked.append((name, seed))
        return NETWORK(seed=seed)

    evaluated(IMAGES[:6], new_network=new_network, seeds=3)
    first, asked[:] = list(asked), []
    evaluated(-IMAGES[:9], new_network=new_network, seeds=3)
    assert asked == first and len({seed for _, seed in first}) == 6
    asked.clear()
    evaluated(IMAGES[:6], new_network=new_network, seeds=2, names=("other",))
    assert asked == [pair for pair in first if pair[0] == "other"][:2]
    asked.clear()
    evaluated(IMAGES[:6], new_network=new_network, seeds=3, seed=1)
    assert not set(asked) & set(first)


def test_scores_are_in_order_and_do_not_depend_on_the_processes():
    asked = []

    def new_network(name, seed):
        asked.append((name, seed))
        return NETWORK(seed=seed)

    scores = evaluated(IMAGES[:6], new_network=new_network)
    assert [name for name, _ in asked] == ["convnet", "convnet", "other", "other"]
    expected = {"convnet": [], "other": []}
    for name, seed in list(asked):
        expected[name] += evaluate_networks(
            IMAGES[:6].__getitem__,
            LABELS[:6],
            DATASET.test,
            normalization=DATASET.normalization,
            new_network=NETWORK,
            recipe=RECIPE | {"epochs": 1 if name == "convnet" else 2, "strategy": "color_crop"},
            seeds=[seed],
        )
    assert scores == expected and list(scores) == ["convnet", "other"]
    assert evaluated(IMAGES[:6], processes=2) == scores


def test_sets_evaluated_at_once_score_as_each_alone_with_its_own_recipe_and_networks():
    one = {"convnet": RECIPE | {"epochs": 1, "strategy": "none"}}
    two = {"convnet": RECIPE | {"epochs": 2, "strategy": "none"}, "other": RECIPE | {"epochs": 1, "strategy": "none"}}
    sets = [
        EvaluationJob(IMAGES[:6].__getitem__, LABELS[:6], one, range(2), 0),
        EvaluationJob((-IMAGES[:9]).__getitem__, LABELS[:9], two, range(1), 1),
    ]
    shared = dict(normalization=DATASET.normalization, networks={"convnet": NETWORK, "other": NETWORK}, processes=1)
    together = evaluate_sets(sets, DATASET.test, **shared)
    assert together == [evaluate_sets([given], DATASET.test, **shared)[0] for given in sets]
    assert [{name: len(values) for name, values in scores.items()} for scores in together] == [
        {"convnet": 2},
        {"convnet": 1, "other": 1},
    ]


def test_an_evaluation_network_is_trained_on_the_set_and_tested_on_normalised_real_images():
    """A network whose weights do not move (rate next to 0) is evaluated by its initialisation."""
    recipe = RECIPE | {"learning_rate": 1e-12, "strategy": "none"}
    (score,) = evaluate_networks(
        IMAGES[:3].__getitem__,
        LABELS[:3],
        DATASET.test,
        normalization=DATASET.normalization,
        new_network=NETWORK,
        recipe=recipe,
        seeds=[5],
    )
    images = DATASET.test.uint8.double() / 255
    logits = NETWORK(seed=5).double()((images - 0.3) / 0.25)
    assert score == (logits.argmax(1) == DATASET.test.labels).double().mean().item()


def threads_of(k):
    return k, torch.get_num_threads()


def fail_at(k):
    if k == 1:
        raise ValueError("the second task fails")
    return k


@pytest.mark.parametrize("processes", [1, 2])
def test_tasks_keep_their_order_and_run_on_one_thread(processes):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        results = fan_out(threads_of, [{"k": k} for k in range(5)], processes=processes, label="tasks")
        assert results == [(k, 1) for k in range(5)] and torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="the second task fails"):
            fan_out(fail_at, [{"k": k} for k in range(3)], processes=processes, label="tasks")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
