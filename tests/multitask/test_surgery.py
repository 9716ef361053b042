"""Directions of several gradients: values by hand, and what defines each on random gradients."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_adapt.multitask import aligned_mtl, cagrad, imtl_g, mgda, nash_mtl, pcgrad
from hf_adapt.multitask.surgery import cagrad_weights, mgda_weights, nash_mtl_weights

TWO = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
FUNCTIONS = [aligned_mtl, cagrad, imtl_g, mgda, nash_mtl, pcgrad]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (pcgrad, (0.5, 1.5)),
        (mgda, (0.2, 0.4)),
        (imtl_g, (0.171573, 0.414214)),
        (nash_mtl, (0.541196, 1.306563)),
        (aligned_mtl, (0.276393, 0.829180)),
        (lambda g: cagrad(g, 0.5), (0.25, 0.5)),
        (lambda g: cagrad(g, 0.9), (0.374642, 0.749285)),
        (lambda g: cagrad(g, 1.0), (0.4, 0.8)),
        (lambda g: cagrad(g, 0.0), (0.0, 0.5)),
    ],
)
def test_two_tasks_by_hand(function: Callable[..., Any], wanted: tuple[float, float]) -> None:
    torch.testing.assert_close(
        function(TWO), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=2e-6
    )


def test_a_step_is_not_the_sum_of_its_micro_batches() -> None:
    parts = torch.tensor([[[1.0, 0.0], [-1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]])
    assert pcgrad(parts.mean(0)).tolist() == [1.0, 1.0]
    assert torch.stack([pcgrad(part) for part in parts]).mean(0).tolist() == [1.25, 1.25]


def random(seed: int, tasks: int, width: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, tasks)[:, None]
    return (torch.randn(tasks, width, generator=generator) * scales).double()


CASES = list(itertools.product(range(6), (2, 3, 5)))


@pytest.mark.parametrize(("seed", "tasks"), CASES)
def test_the_shortest_of_the_hull(seed: int, tasks: int) -> None:
    """Every gradient's product with it is at least its squared length."""
    gradients = random(seed, tasks)
    direction = mgda(gradients)
    products = gradients @ direction
    assert float(products.min()) >= float(direction @ direction) * (1 - 1e-7)
    weights = mgda_weights(gradients @ gradients.T)
    assert float(weights.min()) >= 0 and float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("seed", "tasks"), CASES)
def test_projections_are_equal(seed: int, tasks: int) -> None:
    gradients = random(seed, tasks)
    projections = gradients @ imtl_g(gradients) / gradients.norm(dim=1)
    torch.testing.assert_close(projections, projections[:1].expand(tasks), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("seed", "tasks"), CASES)
def test_a_bargain_gains_each_its_share(seed: int, tasks: int) -> None:
    gradients = random(seed, tasks)
    direction, weights = nash_mtl(gradients), nash_mtl_weights(gradients @ gradients.T)
    torch.testing.assert_close(gradients @ direction * weights, torch.ones(tasks).double())
    assert float(direction.square().sum()) == pytest.approx(tasks)


@pytest.mark.parametrize(("seed", "tasks"), CASES)
@pytest.mark.parametrize("c", [0.3, 0.8])
def test_no_direction_near_the_mean_helps_the_last_more(seed: int, tasks: int, c: float) -> None:
    """The value of the dual problem bounds what any direction in the ball reaches."""
    gradients = random(seed, tasks)
    mean, direction = gradients.mean(0), cagrad(gradients, c)
    assert float((direction - mean).norm()) == pytest.approx(c * float(mean.norm()))
    weights = cagrad_weights(gradients @ gradients.T, c) - 1 / tasks
    dual = weights / weights.sum() @ gradients
    bound = float(dual @ mean + c * mean.norm() * dual.norm())
    assert float((gradients @ direction).min()) == pytest.approx(bound, rel=1e-5)


def test_aligned_components_are_equally_long() -> None:
    gradients = random(0, 3)
    values = torch.linalg.eigvalsh(gradients @ gradients.T)
    weights = [torch.linalg.lstsq(gradients.T, aligned_mtl(gradients)[:, None]).solution[:, 0]]
    aligned = weights[0] @ gradients
    assert float(aligned.norm()) == pytest.approx(math.sqrt(3 * float(values.min())), rel=1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_without_a_conflict_each_task_is_helped(function: Callable[..., Any]) -> None:
    gradients = torch.tensor([[1.0, 0.2, 0.0], [0.8, 0.0, 0.3]])
    assert bool((gradients @ function(gradients) > 0).all())
    assert function(gradients).dtype == torch.float32


@pytest.mark.parametrize("function", FUNCTIONS)
def test_odd_gradients(function: Callable[..., Any]) -> None:
    """One task, one without a gradient, none with one, equal ones: a finite direction."""
    one = torch.tensor([[3.0, 4.0]])
    alone = function(one)
    assert float(torch.nn.functional.cosine_similarity(alone, one[0], dim=0)) == pytest.approx(1)
    for given in (
        torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        torch.zeros(2, 3),
        one.repeat(3, 1),
        torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
    ):
        assert bool(torch.isfinite(function(given)).all()), given
    with pytest.raises(ValueError, match=r"expected \(K, P\)"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        function(torch.full((2, 2), torch.nan))


def test_half_precision_is_computed_exactly() -> None:
    small = (TWO * 1e-4).half()
    found = mgda(small).double() / 1e-4
    torch.testing.assert_close(found, torch.tensor([0.2, 0.4]).double(), rtol=2e-2, atol=0)


def test_a_radius_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"must lie from 0 .the mean gradient"):
        cagrad(TWO, c=1.5)
