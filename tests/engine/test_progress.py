"""Schedules: the published values, the edges, and that they are pure functions."""

import math

import pytest

from hf_adapt.engine.progress import dann_ramp, linear_ramp, value_at


@pytest.mark.parametrize(
    ("progress", "value"),
    [(0.0, 0.0), (0.1, 0.462117), (0.25, 0.848284), (0.5, 0.986614), (1.0, 0.999909)],
)
def test_dann_ramp_is_the_papers(progress, value):
    assert dann_ramp()(progress) == pytest.approx(value, abs=1e-6)


def test_gamma_is_how_fast_it_rises():
    assert dann_ramp(5.0)(0.2) == pytest.approx(dann_ramp(10.0)(0.1))
    assert dann_ramp(2.0)(0.5) == pytest.approx(math.tanh(0.5))  # 2σ(x) - 1 = tanh(x/2)
    values = [dann_ramp(3.0)(step / 50) for step in range(51)]
    assert values == sorted(values) and values[0] == 0 and values[-1] < 1
    assert dann_ramp(1e4)(1.0) == 1  # and no overflow


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_dann_ramp_refuses_gamma(gamma):
    with pytest.raises(ValueError, match="gamma must be positive"):
        dann_ramp(gamma)


def test_linear_ramp_is_a_line_and_flat_outside():
    ramp = linear_ramp(start_progress=0.2, end_progress=0.6)
    given = [0.0, 0.2, 0.3, 0.4, 0.6, 0.9, 1.0]
    assert [ramp(p) for p in given] == pytest.approx([0, 0, 0.25, 0.5, 1, 1, 1])
    assert [linear_ramp()(p) for p in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]


@pytest.mark.parametrize(
    ("start", "end"), [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.1, math.nan), (0, 100)]
)
def test_linear_ramp_refuses_what_is_no_interval(start, end):
    with pytest.raises(ValueError, match="needs 0 <= start_progress < end_progress <= 1"):
        linear_ramp(start_progress=start, end_progress=end)


def test_linear_ramp_reaches_its_values_exactly():
    ramp = linear_ramp(start_value=0.3, end_value=0.1, end_progress=0.7)
    assert (ramp(0.0), ramp(0.7), ramp(1.0)) == (0.3, 0.1, 0.1)
    assert ramp(0.35) == pytest.approx(0.2)
    assert linear_ramp(end_value=0.5)(1.0) == 0.5


def test_schedules_hold_no_state():
    """The same progress gives the same value in any order: resuming needs nothing."""
    for ramp in (dann_ramp(), linear_ramp(start_progress=0.1, end_progress=0.9)):
        forth = [ramp(step / 10) for step in range(11)]
        back = [ramp(step / 10) for step in reversed(range(11))]
        assert forth == back[::-1]


def test_value_at_takes_a_constant_or_a_schedule():
    assert value_at(0.3, 0.9) == 0.3 and value_at(2, 0.0) == 2
    assert value_at(lambda progress: 4 * progress, 0.5) == 2.0
