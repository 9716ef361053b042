"""Weights of losses and shares of data sets: values by hand, optima, and what is refused."""

import math

import pytest
import torch

from hf_adapt.multitask import (
    annealed_temperature,
    dwa_weights,
    famo_weights,
    gradnorm_loss,
    mixing_probabilities,
    quotas,
    random_weights,
    uncertainty_loss,
)

LOSSES = torch.tensor([1.0, 2.0], dtype=torch.float64)


def test_uncertainty_and_its_optimum() -> None:
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    both = torch.tensor([True, True])
    loss = uncertainty_loss(LOSSES, s, both)
    (slope,) = torch.autograd.grad(loss, s)
    assert loss.item() == 1.5 and slope.tolist() == [0.0, -0.5]
    best = LOSSES.log().requires_grad_()
    least = uncertainty_loss(LOSSES, best, both)
    assert least.item() == pytest.approx(1.346574, abs=1e-6)
    assert torch.autograd.grad(least, best)[0].tolist() == pytest.approx([0, 0], abs=1e-12)
    mixed = uncertainty_loss(LOSSES, torch.zeros(2).double(), torch.tensor([True, False]))
    assert mixed.item() == 0.5 + 2.0
    with pytest.raises(ValueError, match=r"expected \(K,\) of K tasks"):
        uncertainty_loss(LOSSES, torch.zeros(3), both)


def test_dynamic_weight_average() -> None:
    found = dwa_weights(torch.tensor([0.8, 0.9]), torch.ones(2))
    assert found.tolist() == pytest.approx([0.975005, 1.024995], abs=1e-6)
    with pytest.raises(ValueError, match="needs positive ones"):
        dwa_weights(LOSSES, torch.zeros(2))
    with pytest.raises(ValueError, match="temperature=0"):
        dwa_weights(LOSSES, LOSSES, temperature=0)


def test_famo() -> None:
    assert famo_weights(LOSSES, torch.zeros(2)).tolist() == pytest.approx([2 / 3, 1 / 3])
    scores = torch.tensor([-0.025, 0.025])
    assert torch.softmax(scores, 0).tolist() == pytest.approx([0.4875, 0.5125], abs=1e-4)
    with pytest.raises(ValueError, match="need positive ones"):
        famo_weights(torch.tensor([0.0, 1.0]), scores)


def test_gradnorm() -> None:
    """The gradients (1, 0) and (-1, 1); the targets get no gradient."""
    norms, ratios = torch.tensor([1.0, math.sqrt(2)]).double(), torch.tensor([0.8, 0.9]).double()
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = gradnorm_loss(norms, ratios, weights)
    targets = torch.tensor([1.102179, 1.315167])
    assert loss.item() == pytest.approx(0.201225, abs=2e-6)
    assert loss.item() == pytest.approx(float((norms - targets).abs().sum()), abs=2e-6)
    (slope,) = torch.autograd.grad(loss, weights)
    assert slope.tolist() == pytest.approx([-1, math.sqrt(2)])
    assert gradnorm_loss(norms, ratios, 1 / norms, alpha=0).item() == pytest.approx(0)
    for arguments, message in [
        ((norms, ratios, torch.ones(3)), r"\(2,\), \(2,\) and \(3,\); expected \(K,\)"),
        ((-norms, ratios, weights), "norms of 0 or more"),
        ((norms, 0 * ratios, weights), "ratios above 0"),
        ((norms, ratios, weights, -1.0), "alpha=-1.0 must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            gradnorm_loss(*arguments)


def test_random_weights() -> None:
    """Other ones at each step and seed; in the mean all alike; no draw of the run is used up."""
    state = torch.get_rng_state()
    drawn = torch.stack([random_weights(3, seed, step) for seed in (0, 1) for step in range(1000)])
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(each.tolist()) for each in drawn}) == 2000
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.sum(1), torch.ones(2000))
    variance = (drawn.log() - drawn.log().mean(1, keepdim=True)).square().sum(1).mean() / 2
    assert variance.item() == pytest.approx(1, abs=0.1), "of a standard normal"
    with pytest.raises(ValueError, match="num_tasks=0"):
        random_weights(0, 0, 0)


@pytest.mark.parametrize(
    ("temperature", "small"), [(1, 0.0099), (2, 0.0909), (4, 0.2403), (math.inf, 0.5)]
)
def test_temperatures(temperature: float, small: float) -> None:
    found = mixing_probabilities([100, 10_000], temperature)
    assert found[0] == pytest.approx(small, abs=5e-5) and sum(found) == pytest.approx(1)


def test_annealing_ends_where_it_says() -> None:
    assert [1 / annealed_temperature(e, 3) for e in (1, 2, 3)] == pytest.approx([1, 0.6, 0.2])
    assert annealed_temperature(2, 2, least=0) == math.inf
    assert annealed_temperature(1, 1) == 1


def test_quotas_add_up() -> None:
    for total in range(40):
        found = quotas(mixing_probabilities([3, 50, 7], 2), total)
        assert sum(found) == total
        shares = [p * total for p in mixing_probabilities([3, 50, 7], 2)]
        assert all(abs(a - b) < 1 for a, b in zip(found, shares, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixing_probabilities([3, 0]), "each data set needs rows"),
        (lambda: mixing_probabilities([3, 4], 0), "temperature=0 must be positive"),
        (lambda: annealed_temperature(4, 3), "epoch=4 must lie from 1 to epochs=3"),
        (lambda: annealed_temperature(1, 3, least=2), "least=2 must lie"),
        (lambda: quotas([0.5, 0.6], 3), "add up to 1.1"),
        (lambda: quotas([1.5, -0.5], 3), "must be 0 or more"),
    ],
)
def test_what_does_not_add_up(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
