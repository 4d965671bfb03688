"""DC, DM and MTT against plain computations of the formulas, plain autograd and finite differences, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX, directional_derivative, relative_difference
from torch.func import functional_call, grad

from ld3m.data.augment import augment, draw
from ld3m.data.dataset import Split, class_batch
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
    (images, labels), train = learned, dataset.train
    loss, gradient = class_matching(train, name)(images, labels, step=5)
    network = new_network(seed=derive(0, "network", 5)).double()
    images.requires_grad_()
    total = 0.0
    for label in range(CLASSES):
        rng = generator(0, "real", 5, label)
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


def test_a_step_can_be_repeated_and_differs_from_others(dataset, learned):
    objective = class_matching(dataset.train, "dm")
    loss, gradient = objective(*learned, step=7)
    state = torch.random.get_rng_state()
    assert objective(*learned, step=8)[0] != loss
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    again, same = objective(*learned, step=7)
    assert again == loss and torch.equal(same, gradient)
    assert replace(objective, seed=1)(*learned, step=7)[0] != loss


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


def test_trajectory_gradient_equals_finite_differences(network, randn):
    images, labels, lr, *ends, plan = trajectory(network, randn)

    def loss(images, lr):
        with torch.enable_grad():
            return match_trajectory(network, images, labels, lr, *ends, plan=plan, first_order=False)[0]

    _, grad_images, grad_lr = match_trajectory(network, images, labels, lr, *ends, plan=plan, first_order=False)
    direction, one = randn(*images.shape), torch.ones_like(lr)
    along_images = directional_derivative(loss, [images, lr], [direction, 0 * one])
    along_lr = directional_derivative(loss, [images, lr], [0 * direction, one])
    assert (grad_images * direction).sum().item() == pytest.approx(along_images, rel=1e-5)
    assert grad_lr.item() == pytest.approx(along_lr, rel=1e-5)


def test_a_student_that_does_not_move_has_loss_one_and_one_at_its_target_zero(network, randn):
    images, labels, lr, start, target, plan = trajectory(network, randn, steps=1)
    given = {"plan": plan, "first_order": False}
    still, grad_images, _ = match_trajectory(network, images, labels, 0 * lr, start, target, **given)
    assert still == pytest.approx(1, rel=1e-12) and grad_images.norm() == 0
    index, augmentation = plan[0]
    gradients = weight_gradients(network, augment(images[index], augmentation), labels[index])
    reached = start - lr * torch.cat([gradients[name].flatten() for name, _ in network.named_parameters()])
    assert match_trajectory(network, images, labels, lr, start, reached, **given)[0] == pytest.approx(0, abs=1e-20)


class FakeExperts:
    """Three experts of five snapshots; what is asked for is kept."""

    def __init__(self, network):
        start, draw = flat_parameters(network).float(), torch.Generator().manual_seed(0)
        self.table = start + 0.1 * torch.randn(3, 5, len(start), generator=draw)
        self.asked = []

    def __len__(self):
        return 3

    def snapshots(self, expert, epochs):
        self.asked.append((expert, *epochs))
        return self.table[expert, epochs]


def trajectory_matching(network, **changes):
    experts, asked = FakeExperts(network), []
    options = {
        "normalization": NORMALIZATION,
        "new_network": lambda seed: network,
        "experts": lambda last_epoch: asked.append(last_epoch) or experts,
        "strategy": DSA,
        "threads": 1,
        "seed": 0,
        "student_steps": 2,
        "student_batch": 4,
        "expert_epochs": 2,
        "max_start_epoch": 3,
        "student_lr": 0.05,
        "first_order": False,
    }
    objective = OBJECTIVES["mtt"](None, **options | changes)
    assert asked == [4]  # before the first step, and up to the last epoch that is read
    return objective


@pytest.fixture
def students(monkeypatch):
    """Keeps what students are given, in place of training them."""
    calls = []

    def spy(network, images, labels, lr, theta_start, theta_target, *, plan, first_order):
        calls.append((theta_start, theta_target, lr, plan, first_order))
        return 1.0, images, lr

    monkeypatch.setattr(objectives, "match_trajectory", spy)
    return calls


def test_trajectory_matching_reads_the_right_snapshots(network, learned, students):
    objective = trajectory_matching(network)
    for step in range(60):
        objective(*learned, step=step)
    asked, table = objective.trajectories.asked, objective.trajectories.table
    draws = [generator(0, "trajectory", step) for step in range(60)]
    assert [expert for expert, _, _ in asked] == [int(torch.randint(3, (), generator=rng)) for rng in draws]
    assert {start for _, start, _ in asked} == {0, 1, 2} and all(end == start + 2 for _, start, end in asked)
    for (expert, start, end), (theta_start, theta_target, lr, _, first_order) in zip(asked, students, strict=True):
        assert torch.equal(theta_start, table[expert, start].double())
        assert torch.equal(theta_target, table[expert, end].double())
        assert lr.item() == pytest.approx(0.05) and not lr.requires_grad and first_order is False
    assert len({augmentation.operation for *_, plan, _ in students for _, augmentation in plan}) == 6


@pytest.mark.parametrize(("student_batch", "sizes"), [(None, [6] * 4), (1, [1] * 4), (4, [4, 2, 4, 2])])
def test_a_student_goes_through_the_set_without_replacement_and_augments_each_image(
    network, learned, students, student_batch, sizes
):
    objective = trajectory_matching(network, student_batch=student_batch, student_steps=4)
    drawn = []
    for step in range(9):
        objective(*learned, step=step)
        plan = students[-1][3]
        indices = [index for index, _ in plan]
        assert [len(index) for index in indices] == sizes
        for epoch in torch.cat(indices).split(6):
            assert len(epoch.unique()) == len(epoch)
        for index, augmentation in plan:  # one operation, and a value for each image
            assert all(len(values) == len(index) for values in augmentation.parameters.values())
            drawn += [tuple(values) for values in augmentation.parameters.values()]
    assert len(set(drawn)) > 4 and (sizes[0] == 1 or any(len(set(values)) > 1 for values in drawn))


def test_trajectory_matching_sets_the_gradient_of_the_rate_and_can_be_repeated(network, learned):
    objective = trajectory_matching(network)

    def call(step, objective=objective):
        loss, gradient = objective(*learned, step=step)
        return loss, gradient, objective.learnables["student_lr"].grad.clone()

    loss, gradient, grad_lr = call(3)
    assert list(objective.learnables) == ["student_lr"] and grad_lr.shape == ()
    state = torch.random.get_rng_state()
    assert call(4)[0] != loss
    assert torch.equal(torch.random.get_rng_state(), state)
    again, same, same_lr = call(3)
    assert again == loss and torch.equal(same, gradient) and torch.equal(same_lr, grad_lr)
    assert call(3, replace(objective, seed=1))[0] != loss

    def at(lr):
        with torch.no_grad():
            objective.learnables["student_lr"].fill_(lr)
        return call(3)[0]

    assert grad_lr.item() == pytest.approx((at(0.0505) - at(0.0495)) / 0.001, rel=1e-3)
