"""Averages weighted by their counts, and the guard that names the term that broke."""

import math

import pytest
import torch
from accelerate import Accelerator

from hf_adapt.engine.metrics import FiniteGuard, MetricAverager


@pytest.fixture
def averager():
    return MetricAverager(Accelerator(cpu=True))


def test_averages_are_weighted_by_their_counts(averager):
    averager.add("accuracy", 1.0, 3)
    averager.add("accuracy", torch.tensor(0.0), torch.tensor(1))
    averager.add("loss", 2.0)
    averager.add("loss", 4.0)
    assert averager.drain() == pytest.approx({"accuracy": 0.75, "loss": 3.0})


def test_drain_empties(averager):
    assert averager.drain() == {}
    averager.add("loss", 1.0)
    assert averager.drain() == {"loss": 1.0}
    assert averager.drain() == {}
    averager.add("loss", 5.0)
    assert averager.drain() == {"loss": 5.0}


def test_a_value_over_no_items_is_left_out(averager):
    averager.add("nothing", 0.0, 0)
    averager.add("accuracy", 0.5, 0)
    averager.add("accuracy", 0.8, 2)
    assert averager.drain() == pytest.approx({"accuracy": 0.8})


def test_the_nan_mean_of_no_items_does_not_spoil_the_average(averager):
    """The mean over a micro-batch without target rows is NaN, over 0 items."""
    averager.add("target_accuracy", torch.zeros(0).mean(), 0)
    averager.add("target_accuracy", 0.8, 2)
    assert averager.drain() == pytest.approx({"target_accuracy": 0.8})


def test_a_nan_that_counts_is_shown(averager):
    averager.add("loss", float("nan"))
    averager.add("loss", 1.0)
    assert math.isnan(averager.drain()["loss"])


def test_values_are_taken_as_they_were_and_keep_no_graph(averager):
    value, weight = torch.ones((), requires_grad=True), torch.tensor(1.0)
    averager.add("loss", value * 2, weight)
    first = torch.tensor(3.0)
    averager.add("other", first, weight)
    first.fill_(100.0)
    weight.fill_(100.0)
    averager.add("loss", value.to(torch.bfloat16) * 4, 1)
    assert averager.drain() == {"loss": 3.0, "other": 3.0}
    assert value.grad is None


# ---- FiniteGuard ----


def test_guard_accepts_finite_values():
    guard = FiniteGuard()
    guard.check()
    for step in range(3):
        guard.add("dann", torch.tensor(1e30))
        guard.add("dann", torch.tensor(-1e30))
        guard.add("mmd", torch.zeros((), dtype=torch.bfloat16))
        guard.end_step(step)
    guard.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_guard_names_the_term_and_the_step(bad):
    guard = FiniteGuard()
    guard.add("dann", torch.tensor(1.0))
    guard.add("mmd", torch.tensor(bad))
    guard.add("mmd", torch.tensor(1.0))  # of a later micro-batch
    with pytest.raises(FloatingPointError, match="The term mmd is NaN or infinite at step 7"):
        guard.end_step(7)
        guard.check()
    guard.check()  # told once


def test_guard_names_all_terms():
    guard = FiniteGuard()
    guard.add("dann", torch.tensor(float("inf")))
    guard.add("dann", torch.tensor(-float("inf")))
    guard.add("mmd", torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="The term dann, mmd is"):
        guard.end_step(0)
        guard.check()


def test_guard_forgets_the_step_before():
    guard = FiniteGuard()
    guard.add("dann", torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError):
        guard.end_step(0)
        guard.check()
    guard.add("dann", torch.tensor(1.0))
    guard.end_step(1)
    guard.end_step(2)  # a step without terms
    guard.check()


def test_guard_keeps_no_graph():
    value = torch.ones((), requires_grad=True)
    guard = FiniteGuard()
    guard.add("dann", value * 2)
    assert not any(kept.requires_grad for kept in guard._values.values())
