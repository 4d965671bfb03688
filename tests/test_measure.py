"""Lines through what was measured, and sizes that grow no further than time and memory allow."""

import mmap

import numpy as np
import pytest

from ld3m.pipeline import measure
from ld3m.pipeline.measure import Line, Plane, Taken, grow, grow_plane, peak_of
from ld3m.runtime.memory import forget_peak

MIB = 2**20


def line(*points, full, base=0.0):
    return Line(tuple(Taken(*point) for point in points), full, base)


def test_a_line_is_straight_between_what_was_measured_and_on_from_the_two_largest():
    found = line((1, 1.0, 10.0), (4, 7.0, 16.0), (8, 9.0, 20.0), full=20)
    assert [found.seconds(size) for size in (1, 2, 4, 6, 8)] == [1.0, 3.0, 7.0, 8.0, 9.0]
    assert (found.seconds(), found.peak()) == (9.0 + 12 * 0.5, 20.0 + 12)
    assert found.tried("images") == "8 of 20 images" and line((4, 1.0, 1.0), full=4).tried("images") == ""


def test_noise_does_not_make_more_of_it_cheaper():
    assert line((1, 2.0, 10.0), (8, 1.5, 9.0), full=100).seconds() == 1.5


def test_of_one_measurement_so_many_times_as_much():
    assert line((1, 2.0, 10.0), full=5).seconds() == 10.0


@pytest.fixture(autouse=True)
def budget(monkeypatch):
    """What the expectations below are worked out from, whatever a measurement aims at."""
    monkeypatch.setattr(measure, "BUDGET_S", 1.0)


@pytest.fixture
def sizes(monkeypatch):
    """The sizes that work was done at, once each, by `grow` and `grow_plane` with these seconds and bytes; no clock."""
    done, memory = [], {"used": 100 * MIB, "left": 10_000 * MIB}
    monkeypatch.setattr(measure, "used_bytes", lambda device: memory["used"])
    monkeypatch.setattr(measure, "available_bytes", lambda device: memory["left"])

    def take(seconds, peak, left=10_000 * MIB):
        memory["left"] = left

        def measured(work, size, device):
            work(size)
            return Taken(size, seconds(*done[-1]), peak(*done[-1]))

        monkeypatch.setattr(measure, "_measure", measured)
        return lambda *size: done.append(size)

    take.done = done
    return take


def sizes_of(done, axis=0):
    return [size[axis] for size in done]


@pytest.mark.parametrize(
    "a_second, expected",
    [(1e-4, [1, 100]), (0.05, [1, 20]), (0.5, [1, 2]), (30.0, [1, 2])],  # at least two, for the slope
)
def test_what_is_cheap_is_measured_whole_and_what_is_dear_at_two_sizes(sizes, a_second, expected):
    work = sizes(lambda n: a_second * n, lambda n: (100 + n) * MIB)
    found = grow(work, full=100, device="cpu")
    assert sizes_of(sizes.done) == expected
    assert found.seconds() == pytest.approx(100 * a_second) and found.peak() == pytest.approx(200 * MIB)


def test_what_would_take_more_than_half_of_the_memory_is_not_tried(sizes):
    work = sizes(lambda n: 1e-3 * n, lambda n: (100 + 50 * n) * MIB, left=1000 * MIB)
    found = grow(work, full=100, device="cpu")
    assert sizes_of(sizes.done) == [1, 10] and found.peak() == pytest.approx(5100 * MIB)
    work = sizes(lambda n: 1e-3 * n, lambda n: (100 + 50 * n) * MIB, left=60 * MIB)
    assert grow(work, full=100, device="cpu").largest == 1


def test_a_plane_is_as_wide_and_as_deep_as_it_may_and_goes_on_from_there(sizes):
    work = sizes(lambda n, deep: 0.01 * n * (2 + 3 * deep), lambda n, deep: (100 + 7 * n) * MIB)
    found = grow_plane(work, width=50, depth=20, at_once=40, device="cpu")
    assert max(sizes_of(sizes.done, 0)) == 20 and max(sizes_of(sizes.done, 1)) == 2
    assert found.seconds() == pytest.approx(0.01 * 50 * 62) and found.seconds(1) == pytest.approx(0.01 * 50 * 5)
    assert found.peak() == pytest.approx((100 + 7 * 40) * MIB)  # flat in the depth, and beyond what is done at once
    assert found.tried("images", "steps") == "20 of 50 images, 2 of 20 steps"


def test_what_takes_turns_shares_the_memory_of_a_device_alone():
    one, other = (
        Plane(line((4, 1.0, peak), full=4, base=100.0), line((1, 1.0, peak), full=1, base=100.0), 4)
        for peak in (150.0, 130.0)
    )
    assert peak_of(one, other) == 180.0


def test_time_and_memory_are_those_of_the_work():
    if not forget_peak():
        pytest.skip("the system cannot")
    calls = []

    def work(size):
        with mmap.mmap(-1, 64 * MIB * size) as pages:  # the allocator, which may keep it, is not asked
            np.frombuffer(pages, np.uint8).sum()
        calls.append(size)
        return {1: [0.3, 0.2], 3: [0.7]}[size][calls.count(size) - 1]

    found = grow(work, full=3, device="cpu")
    assert calls == [1, 1, 3]  # the first of what is quick does more than the others
    assert [point.seconds for point in found.points] == [0.2, 0.7]
    assert found.peak() - found.peak(1) == pytest.approx(128 * MIB, rel=0.1)
