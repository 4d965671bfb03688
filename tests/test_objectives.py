"""DC, DM and MTT against plain computations of the formulas, plain autograd and finite differences, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX, directional_derivative, relative_difference
from torch.func import functional_call, grad

from ld3m.data.augment import augment, draw
from ld3m.data.dataset import Split, class_batch
from ld3m.evaluation.experts import Experts
from ld3m.method import objectives
from ld3m.method.objectives import OBJECTIVES, feature_distance, gradient_distance, match_trajectory
from ld3m.models.networks import build, flat_parameters, unflatten
from ld3m.runtime.seeds import derive, generator

DSA = "color_crop_cutout_flip_scale_rotate"
DISTANCES = {"dc": gradient_distance, "dm": feature_distance}


def new_network(*, seed):
    return build("convnet", channels=1, size_px=SIZE_PX, classes=CLASSES, width=4, seed=seed)


@pytest.fixture
def network():
    return new_network(seed=3).to(torch.float64)


@pytest.fixture
def batch(randn):
    """Real images and synthetic ones of two classes, with their labels."""
    real, synthetic = randn(5, 1, SIZE_PX, SIZE_PX), randn(2, 1, SIZE_PX, SIZE_PX)
    return real, torch.tensor([0, 0, 1, 1, 0]), synthetic, torch.tensor([0, 1])


@pytest.fixture
def learned(randn):
    """Synthetic images of three classes and their labels."""
    return randn(6, 1, SIZE_PX, SIZE_PX), torch.tensor([2, 0, 0, 1, 2, 1])


def mean_cross_entropy(logits, labels):
    return sum(row.exp().sum().log() - row[label] for row, label in zip(logits, labels, strict=True)) / len(labels)


def weight_gradients(network, images, labels):
    """By name, of every parameter."""
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return grad(lambda p: mean_cross_entropy(functional_call(network, p, (images,)), labels))(parameters)


def test_gradient_distance(network, batch):
    real, real_labels, synthetic, labels = batch
    g_real, g = weight_gradients(network, real, real_labels), weight_gradients(network, synthetic, labels)
    layers = ["body.0.weight", "body.4.weight", "classifier.weight"]  # neither biases nor norms
    assert {name for name in g if g[name].dim() > 1} == set(layers)
    expected = 0.0
    for name in layers:
        for row_real, row in zip(g_real[name].numpy(), g[name].numpy(), strict=True):
            a, b = row_real.ravel(), row.ravel()
            expected += 1 - a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b) + 1e-6)
    assert gradient_distance(network, *batch).item() == pytest.approx(expected, rel=1e-10)


def test_feature_distance(network, batch):
    real, real_labels, synthetic, labels = batch
    with torch.no_grad():
        of_real, of_synthetic = (network.body(images).flatten(1).numpy() for images in (real, synthetic))
    means = [of_real[real_labels == label].mean(axis=0) for label in labels]
    expected = float(np.sum((np.stack(means) - of_synthetic) ** 2))
    assert feature_distance(network, *batch).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["dc", "dm"])
@pytest.mark.parametrize("count", [1, 3])
def test_real_images_go_through_the_network_a_few_at_once(network, batch, monkeypatch, name, count):
    together = DISTANCES[name](network, *batch).item()
    monkeypatch.setattr(objectives, "AT_ONCE_PX", count * SIZE_PX**2)
    sizes = []
    network.body.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    assert DISTANCES[name](network, *batch).item() == pytest.approx(together, rel=1e-10)
    assert sizes == [*{1: [1] * 5, 3: [3, 2]}[count], 2]  # the synthetic images last


def class_matching(split, name, *, most_classes=1, **options):
    shared = dict(normalization=NORMALIZATION, new_network=new_network, experts=None, threads=1, strategy=DSA, seed=0)
    objective = OBJECTIVES[name](split, **shared | {"real_batch": 4} | options)
    return replace(objective, most_classes=most_classes or objective.most_classes)


@pytest.mark.parametrize("name", ["dc", "dm"])
def test_class_matching_is_the_sum_over_classes_with_the_draws_of_the_step(dataset, learned, name):
    (images, labels), train, state = learned, dataset.train, torch.random.get_rng_state()
    loss, gradient = class_matching(train, name, seed=1)(images, labels, step=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    network = new_network(seed=derive(1, "network", 5)).double()
    images.requires_grad_()
    total = 0.0
    for label in range(CLASSES):
        rng = generator(1, "real", 5, label)
        index = class_batch(train, label, count=4, generator=rng)
        augmentation = draw(DSA, count=1, generator=rng)
        real, own = (
            augment(x, augmentation) for x in (train.normalized(NORMALIZATION, index).double(), images[labels == label])
        )
        distance = DISTANCES[name](network, real, train.labels[index], own, labels[labels == label])
        assert distance > 0
        total = total + distance
    assert loss == pytest.approx(total.item(), rel=1e-12)
    assert relative_difference(gradient, torch.autograd.grad(total, images)[0]) < 1e-12


@pytest.mark.parametrize("name", ["dc", "dm"])
def test_class_matching_gradient_equals_finite_differences(dataset, learned, randn, name):
    objective = class_matching(dataset.train, name)
    (images, labels), direction = learned, randn(6, 1, SIZE_PX, SIZE_PX)

    def loss(images):
        with torch.enable_grad():
            return objective(images, labels, step=1)[0]

    _, gradient = objective(images, labels, step=1)
    expected = directional_derivative(loss, [images], [direction])
    assert abs(expected) > 1e-3
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "tolerance"),
    [("dc", {"threads": 3}, 0), ("dm", {"threads": 3}, 0), ("dm", {"most_classes": 2}, 1e-12)],
)
def test_threads_change_no_bit_and_classes_in_one_pass_only_the_rounding(dataset, learned, name, changes, tolerance):
    one, several = (class_matching(dataset.train, name, **given)(*learned, step=5) for given in ({}, changes))
    assert several[0] == pytest.approx(one[0], rel=tolerance, abs=0)
    assert relative_difference(several[1], one[1]) <= tolerance


@pytest.mark.parametrize(
    ("name", "real_batch", "size_px", "count"),
    [("dm", 64, 32, 5), ("dm", 256, 32, 4), ("dm", 64, 256, 1), ("dc", 64, 32, 1)],
)
def test_classes_at_once(name, real_batch, size_px, count):
    split = Split(torch.zeros(1, 1, size_px, size_px, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))
    assert class_matching(split, name, most_classes=None, real_batch=real_batch).class_chunk_size == count


def trajectory(network, randn, *, steps=3, batch=4, strategy=DSA):
    images, labels = randn(6, 1, SIZE_PX, SIZE_PX), torch.tensor([0, 0, 1, 1, 2, 2])
    theta_start = flat_parameters(network)
    theta_target = theta_start + 0.05 * randn(len(theta_start))
    rng = torch.Generator().manual_seed(0)
    indices = [torch.randperm(6, generator=rng)[:batch] for _ in range(steps)]
    plan = [(index, draw(strategy, count=batch, generator=rng)) for index in indices]
    return images, labels, torch.tensor(0.3, dtype=torch.float64), theta_start, theta_target, plan


def unrolled_loss(network, images, labels, lr, theta_start, theta_target, plan, *, first_order=False):
    """The whole training in one graph."""
    theta = theta_start.clone().requires_grad_()
    for index, augmentation in plan:
        at = theta.detach().requires_grad_() if first_order else theta
        logits = functional_call(network, unflatten(at, network), (augment(images[index], augmentation),))
        loss = mean_cross_entropy(logits, labels[index])
        theta = theta - lr * torch.autograd.grad(loss, at, create_graph=True)[0]
    return (theta - theta_target).square().sum() / (theta_start - theta_target).square().sum()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("batch", "strategy"), [(6, "none"), (4, DSA)])
def test_trajectory_gradient_equals_plain_autograd(network, randn, first_order, batch, strategy):
    images, labels, lr, *ends, plan = trajectory(network, randn, batch=batch, strategy=strategy)
    loss, grad_images, grad_lr = match_trajectory(
        network, images, labels, lr, *ends, plan=plan, first_order=first_order
    )
    images.requires_grad_()
    lr.requires_grad_()
    plain = unrolled_loss(network, images, labels, lr, *ends, plan, first_order=first_order)
    expected_images, expected_lr = torch.autograd.grad(plain, [images, lr])
    assert loss == pytest.approx(plain.item(), rel=1e-12)
    assert expected_images.norm() > 1e-4 and expected_lr.abs() > 1e-4
    assert relative_difference(grad_images, expected_images) < 1e-9
    assert relative_difference(grad_lr, expected_lr) < 1e-9


class FakeExperts(Experts):
    """Three experts of five snapshots."""

    def __init__(self, network):
        start, draw = flat_parameters(network).float(), torch.Generator().manual_seed(0)
        self.table = start + 0.1 * torch.randn(3, 5, len(start), generator=draw)

    def __len__(self):
        return 3

    def snapshots(self, expert, epochs):
        return self.table[expert, epochs]


@pytest.mark.parametrize("name", ["dc", "dm"])
def test_trained_networks_lie_between_a_random_one_and_an_expert(dataset, learned, name):
    experts, asked, seen = FakeExperts(new_network(seed=0)), [], []
    options = {"experts": lambda last_epoch: asked.append(last_epoch) or experts, "trained_epochs": 2}
    objective = class_matching(dataset.train, name, **options)

    def distance(network, *batch):
        seen.append(flat_parameters(network))
        return DISTANCES[name](network, *batch)

    for step in range(4):
        replace(objective, distance=distance)(*learned, step=step)
        start, share = new_network(seed=derive(0, "network", step)), generator(0, "trained", step)
        theta, change = flat_parameters(start).double(), []
        for expert in range(3):
            toward, moved = experts.table[expert, 2].double() - theta, seen[-1] - theta
            change.append((moved @ toward / (toward @ toward), (moved @ toward / (moved.norm() * toward.norm()))))
        k = int(torch.randint(3, (), generator=share))
        assert change[k][1] > 1 - 1e-6 and 0 < change[k][0] < 1
    assert set(asked) == {2}
    assert objective(*learned, step=2)[0] == objective(*learned, step=2)[0]


@pytest.mark.parametrize(("student_batch", "first_order"), [(None, False), (1, False), (4, True)])
def test_trajectory_matching_is_that_of_a_student_between_two_snapshots_with_the_draws_of_the_step(
    network, learned, student_batch, first_order
):
    experts, asked, state = FakeExperts(network), [], torch.random.get_rng_state()
    student = dict(student_steps=4, student_batch=student_batch, student_lr=0.05, first_order=first_order)
    objective = OBJECTIVES["mtt"](
        None, normalization=NORMALIZATION, new_network=lambda seed: network, threads=1, strategy=DSA, seed=1,
        experts=lambda last_epoch: asked.append(last_epoch) or experts, expert_epochs=2, max_start_epoch=3, **student,
    )  # fmt: skip
    assert asked == [4] and list(objective.learnables) == ["student_lr"]  # known before the first step
    for step in range(6):
        loss, gradient = objective(*learned, step=step)
        rng, plan = generator(1, "trajectory", step), []
        expert, epoch = (int(torch.randint(3, (), generator=rng)) for _ in range(2))
        while len(plan) < 4:  # through all images without replacement, and a value of the augmentation for each
            for index in torch.randperm(6, generator=rng).split(student_batch or 6):
                plan.append((index, draw(DSA, count=len(index), generator=rng)))
        ends, lr = experts.table[expert, [epoch, epoch + 2]].double(), torch.tensor(0.05)
        expected = match_trajectory(network, *learned, lr, *ends, plan=plan[:4], first_order=first_order)
        assert loss == expected[0] and torch.equal(gradient, expected[1]) and not gradient.requires_grad
        assert torch.equal(objective.learnables["student_lr"].grad, expected[2])
    assert torch.equal(torch.random.get_rng_state(), state)
