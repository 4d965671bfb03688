"""DC, DM and MTT against plain computations of the formulas, plain autograd and finite differences, in float64."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX, directional_derivative, make_split, relative_difference
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


def mean_cross_entropy(logits, labels):
    return sum(row.exp().sum().log() - row[label] for row, label in zip(logits, labels, strict=True)) / len(labels)


def weight_gradients(network, images, labels):
    """By name, of every parameter."""
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return grad(lambda p: mean_cross_entropy(functional_call(network, p, (images,)), labels))(parameters)


def test_gradient_distance(network, randn):
    real, synthetic = randn(5, 1, SIZE_PX, SIZE_PX), randn(2, 1, SIZE_PX, SIZE_PX)
    real_labels, labels = torch.tensor([0, 0, 1, 2, 0]), torch.tensor([0, 1])
    g_real, g = weight_gradients(network, real, real_labels), weight_gradients(network, synthetic, labels)
    layers = ["body.0.weight", "body.4.weight", "classifier.weight"]  # neither biases nor norms
    assert {name for name in g if g[name].dim() > 1} == set(layers)
    expected = 0.0
    for name in layers:
        for row_real, row in zip(g_real[name].numpy(), g[name].numpy(), strict=True):
            a, b = row_real.ravel(), row.ravel()
            expected += 1 - a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b) + 1e-6)
    given = gradient_distance(network, real, real_labels, synthetic, labels)
    assert given.item() == pytest.approx(expected, rel=1e-10)


def test_feature_distance(network, randn):
    real, synthetic = randn(5, 1, SIZE_PX, SIZE_PX), randn(2, 1, SIZE_PX, SIZE_PX)
    labels = torch.zeros(5, dtype=torch.long)
    with torch.no_grad():
        means = [network.body(images).flatten(1).numpy().mean(axis=0) for images in (real, synthetic)]
    expected = float(np.sum((means[0] - means[1]) ** 2))
    given = feature_distance(network, real, labels, synthetic, labels[:2]).item()
    assert given == pytest.approx(expected, rel=1e-10) and given > 0.1


@pytest.mark.parametrize("name", ["dc", "dm"])
@pytest.mark.parametrize("count", [1, 3])
def test_real_images_go_through_the_network_a_few_at_once(network, randn, monkeypatch, name, count):
    real, synthetic = randn(5, 1, SIZE_PX, SIZE_PX), randn(1, 1, SIZE_PX, SIZE_PX)
    labels = torch.tensor([0, 0, 1, 2, 0])
    together = DISTANCES[name](network, real, labels, synthetic, labels[:1]).item()
    monkeypatch.setattr(objectives, "AT_ONCE_PX", count * SIZE_PX**2)
    batches = []
    network.body.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    assert DISTANCES[name](network, real, labels, synthetic, labels[:1]).item() == pytest.approx(together, rel=1e-10)
    assert batches == [*{1: [1] * 5, 3: [3, 2]}[count], 1]  # the synthetic image last


@pytest.mark.parametrize("name", ["dc", "dm"])
def test_gradient_of_the_distance_equals_finite_differences(network, randn, name):
    real, synthetic = randn(5, 1, SIZE_PX, SIZE_PX), randn(2, 1, SIZE_PX, SIZE_PX).requires_grad_()
    labels = torch.zeros(5, dtype=torch.long)

    def loss(synthetic):
        with torch.enable_grad():  # the distance of gradients needs it
            return DISTANCES[name](network, real, labels, synthetic, labels[:2]).detach()

    distance = DISTANCES[name](network, real, labels, synthetic, labels[:2])
    gradient = torch.autograd.grad(distance, synthetic)[0]
    direction = randn(*synthetic.shape)
    expected = directional_derivative(loss, [synthetic], [direction])
    assert abs(expected) > 1e-3
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5)


def class_matching(split, name="dm", *, distance=None, chunk=None, **options):
    shared = dict(normalization=NORMALIZATION, new_network=new_network, experts=None, threads=2, strategy=DSA, seed=0)
    objective = OBJECTIVES[name](split, **shared | {"real_batch": 4} | options)
    objective = replace(objective, most_classes=chunk or 1)
    return replace(objective, distance=distance) if distance else objective


def test_threads_are_started_once_and_not_in_every_step(dataset, randn):
    seen = set()

    def spy(network, real, real_labels, synthetic, labels):
        seen.add(threading.current_thread())
        return synthetic.sum()

    objective = class_matching(dataset.train, distance=spy, threads=1)
    for step in range(3):
        objective(randn(3, 1, SIZE_PX, SIZE_PX), torch.tensor([0, 1, 2]), step=step)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["dc", "dm"])
def test_the_number_of_threads_changes_no_bit(dataset, randn, name):
    images, labels = randn(6, 1, SIZE_PX, SIZE_PX), torch.tensor([2, 0, 0, 1, 2, 1])
    one, three = (class_matching(dataset.train, name, threads=threads)(images, labels, step=5) for threads in (1, 3))
    assert one[0] == three[0] and torch.equal(one[1], three[1])


def test_classes_in_one_pass_are_those_one_by_one(dataset, randn):
    images, labels = randn(6, 1, SIZE_PX, SIZE_PX), torch.tensor([2, 0, 0, 1, 2, 1])
    single, joint = (class_matching(dataset.train, chunk=count)(images, labels, step=5) for count in (1, 2))
    assert joint[0] == pytest.approx(single[0], rel=1e-12)
    assert relative_difference(joint[1], single[1]) < 1e-12


@pytest.mark.parametrize(
    ("name", "real_batch", "size_px", "count"),
    [("dm", 64, 32, 5), ("dm", 256, 32, 4), ("dm", 64, 256, 1), ("dc", 64, 32, 1)],
)
def test_classes_at_once(name, real_batch, size_px, count):
    split = Split(torch.zeros(1, 1, size_px, size_px, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))
    shared = dict(normalization=NORMALIZATION, new_network=new_network, experts=None, threads=2, strategy=DSA, seed=0)
    assert OBJECTIVES[name](split, real_batch=real_batch, **shared).class_chunk_size == count


@pytest.mark.parametrize("name", ["dc", "dm"])
def test_class_matching_is_the_sum_over_classes_with_the_draws_of_the_step(dataset, randn, name):
    images, labels, train = randn(6, 1, SIZE_PX, SIZE_PX), torch.tensor([2, 0, 0, 1, 2, 1]), dataset.train
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
def test_class_matching_gradient_equals_finite_differences(dataset, randn, name):
    objective = class_matching(dataset.train, name)
    labels, images, direction = torch.tensor([0, 1, 2]), randn(3, 1, SIZE_PX, SIZE_PX), randn(3, 1, SIZE_PX, SIZE_PX)

    def loss(images):
        with torch.enable_grad():
            return objective(images, labels, step=1)[0]

    _, gradient = objective(images, labels, step=1)
    expected = directional_derivative(loss, [images], [direction])
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5)


def test_a_step_can_be_repeated_and_differs_from_others(dataset, randn):
    labels, images = torch.tensor([0, 1, 2]), randn(3, 1, SIZE_PX, SIZE_PX)
    objective = class_matching(dataset.train)
    loss, gradient = objective(images, labels, step=7)
    state = torch.random.get_rng_state()
    objective(images, labels, step=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    again, same = objective(images, labels, step=7)
    assert again == loss and torch.equal(same, gradient)
    assert objective(images, labels, step=8)[0] != loss
    assert replace(objective, seed=1)(images, labels, step=7)[0] != loss


def test_what_the_distance_is_given(dataset, randn):
    calls = []

    def spy(network, real, real_labels, synthetic, labels):
        calls.append((network, real, real_labels, synthetic, labels))
        return synthetic.sum()

    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    images = randn(6, 1, SIZE_PX, SIZE_PX)
    objective = class_matching(dataset.train, distance=spy, strategy="none", threads=1)
    for step in (0, 1):
        objective(images, labels, step=step)
    known = {image.numpy().tobytes(): k for k, image in enumerate(dataset.train.uint8)}
    chosen = []
    for call, (network, real, real_labels, synthetic, given_labels) in enumerate(calls):
        label = call % CLASSES
        assert set(real_labels.tolist()) == set(given_labels.tolist()) == {label}
        assert torch.equal(synthetic, images[labels == label])
        uint8 = ((real * 0.3 + 0.4) * 255).round().to(torch.uint8)  # normalized as the data set says
        indices = [known[image.numpy().tobytes()] for image in uint8]
        assert len(set(indices)) == 4 and set(dataset.train.labels[indices].tolist()) == {label}
        assert all(parameter.dtype == torch.float64 for parameter in network.parameters())
        chosen.append(sorted(indices))
    first, second = calls[:CLASSES], calls[CLASSES:]
    assert len({id(call[0]) for call in first}) == 1  # one network a step, and another in the next
    assert not torch.equal(flat_parameters(first[0][0]), flat_parameters(second[0][0]))
    assert chosen[:CLASSES] != chosen[CLASSES:]


def test_real_and_synthetic_images_share_one_augmentation(randn):
    # every real image of a class is the class's synthetic one: after one shared augmentation they are the same
    uint8 = make_split(1, seed=0).uint8
    labels = torch.arange(CLASSES)
    split = Split(uint8.repeat(3, 1, 1, 1), labels.repeat(3), ("a", "b", "c"))
    images = NORMALIZATION.normalize(split.x(labels))
    augmented = []

    def spy(network, real, real_labels, synthetic, labels):
        assert len(real) == 3
        for image in real:
            torch.testing.assert_close(image[None], synthetic.detach(), rtol=0, atol=1e-6)
        augmented.append(synthetic.detach().clone())
        return synthetic.sum()

    objective = class_matching(split, distance=spy, real_batch=3)
    for step in range(15):
        objective(images, labels, step=step)
    changed = [not torch.allclose(after[0], images[k % CLASSES]) for k, after in enumerate(augmented)]
    assert sum(changed) > 30  # of 45; a flip or a crop may leave an image as it is


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
    direction, none = randn(*images.shape), torch.zeros_like(images)
    one, zero = torch.ones_like(lr), torch.zeros_like(lr)
    along_images = directional_derivative(loss, [images, lr], [direction, zero])
    along_lr = directional_derivative(loss, [images, lr], [none, one])
    assert (grad_images * direction).sum().item() == pytest.approx(along_images, rel=1e-5)
    assert grad_lr.item() == pytest.approx(along_lr, rel=1e-5)


def test_a_student_that_does_not_move_has_loss_one_and_one_at_its_target_zero(network, randn):
    images, labels, lr, theta_start, theta_target, plan = trajectory(network, randn, steps=1)
    still, grad_images, _ = match_trajectory(
        network, images, labels, 0 * lr, theta_start, theta_target, plan=plan, first_order=False
    )
    assert still == pytest.approx(1, rel=1e-12) and grad_images.norm() == 0
    index, augmentation = plan[0]
    gradients = weight_gradients(network, augment(images[index], augmentation), labels[index])
    reached = theta_start - lr * torch.cat([gradients[name].flatten() for name, _ in network.named_parameters()])
    there, _, _ = match_trajectory(network, images, labels, lr, theta_start, reached, plan=plan, first_order=False)
    assert there == pytest.approx(0, abs=1e-20)


class FakeExperts:
    """Three experts of five snapshots; what is asked for is kept."""

    def __init__(self, network):
        draw = torch.Generator().manual_seed(0)
        self.table = flat_parameters(network).float() + 0.1 * torch.randn(
            3, 5, len(flat_parameters(network)), generator=draw
        )
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


def test_trajectory_matching_reads_the_right_snapshots(network, randn, monkeypatch):
    calls = []

    def spy(network, images, labels, lr, theta_start, theta_target, *, plan, first_order):
        calls.append((theta_start, theta_target, lr, plan, first_order))
        return 1.0, images, lr

    monkeypatch.setattr(objectives, "match_trajectory", spy)
    objective = trajectory_matching(network)
    images, labels = randn(6, 1, SIZE_PX, SIZE_PX), torch.tensor([0, 0, 1, 1, 2, 2])
    for step in range(60):
        objective(images, labels, step=step)
    asked = objective.trajectories.asked
    draws = [generator(0, "trajectory", step) for step in range(60)]
    assert [expert for expert, _, _ in asked] == [int(torch.randint(3, (), generator=rng)) for rng in draws]
    assert {expert for expert, _, _ in asked} == {0, 1, 2} and {start for _, start, _ in asked} == {0, 1, 2}
    assert all(end == start + 2 for _, start, end in asked)
    for (expert, start, end), (theta_start, theta_target, lr, _, first_order) in zip(asked, calls, strict=True):
        assert torch.equal(theta_start, objective.trajectories.table[expert, start].double())
        assert torch.equal(theta_target, objective.trajectories.table[expert, end].double())
        assert lr.item() == pytest.approx(0.05) and not lr.requires_grad and first_order is False
    assert {k for *_, plan, _ in calls for index, _ in plan for k in index.tolist()} == set(range(6))
    assert len({augmentation.operation for *_, plan, _ in calls for _, augmentation in plan}) == 6


@pytest.mark.parametrize(
    ("student_batch", "sizes"), [(None, [6] * 4), (100, [6] * 4), (1, [1] * 4), (4, [4, 2, 4, 2]), (3, [3] * 4)]
)
def test_a_student_goes_through_the_set_without_replacement_and_augments_each_image(
    network, randn, monkeypatch, student_batch, sizes
):
    plans = []
    spy = lambda *args, plan, **options: plans.append(plan) or (1, 1, None)  # noqa: E731
    monkeypatch.setattr(objectives, "match_trajectory", spy)
    objective = trajectory_matching(network, student_batch=student_batch, student_steps=4)
    for step in range(9):
        objective(randn(6, 1, SIZE_PX, SIZE_PX), torch.zeros(6, dtype=torch.long), step=step)
        indices, augmentations = zip(*plans[-1], strict=True)
        assert [len(index) for index in indices] == sizes
        for epoch in torch.cat(indices).split(6):
            assert len(epoch.unique()) == len(epoch)
        for index, augmentation in plans[-1]:  # one operation, and a value for each image
            assert all(len(values) == len(index) for values in augmentation.parameters.values())
    drawn = [tuple(value) for plan in plans for _, augmentation in plan for value in augmentation.parameters.values()]
    assert len(set(drawn)) > 4 and (sizes[0] == 1 or any(len(set(values)) > 1 for values in drawn))


def test_trajectory_matching_sets_the_gradient_of_the_rate_and_can_be_repeated(network, randn):
    objective = trajectory_matching(network)
    images, labels = randn(6, 1, SIZE_PX, SIZE_PX), torch.tensor([0, 0, 1, 1, 2, 2])

    def call(step, objective=objective):
        loss, gradient = objective(images, labels, step=step)
        return loss, gradient, objective.learnables["student_lr"].grad.clone()

    loss, gradient, grad_lr = call(3)
    assert list(objective.learnables) == ["student_lr"] and objective.learnables["student_lr"].grad.shape == ()
    state = torch.random.get_rng_state()
    other, _, _ = call(4)
    assert torch.equal(torch.random.get_rng_state(), state)
    again, same, same_lr = call(3)
    assert again == loss != other and torch.equal(same, gradient) and torch.equal(same_lr, grad_lr)
    assert call(3, replace(objective, seed=1))[0] != loss

    def at(lr):
        with torch.no_grad():
            objective.learnables["student_lr"].fill_(lr)
        return call(3)[0]

    slope = (at(0.0505) - at(0.0495)) / 0.001
    assert grad_lr.item() == pytest.approx(slope, rel=1e-3)
