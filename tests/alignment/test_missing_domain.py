"""Micro-batches without a row of one domain, and extreme inputs: finite terms and gradients."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_adapt.alignment import CDAN, DANN, MCD, MDD, PADA, ImportanceWeighting
from tests.helpers.fake_batch import FakeBatch

TRAINER = SimpleNamespace(
    args=SimpleNamespace(label_smoothing_factor=0.0),
    accelerator=SimpleNamespace(reduce=lambda tensor, reduction: tensor),
)
METHODS: list[Callable[[], Any]] = [DANN, CDAN, MDD, MCD, PADA, ImportanceWeighting]


def batch(domains: list[int], scale: float = 1.0) -> FakeBatch:
    """Random features and predictions of these domains, with labels of the source."""
    torch.manual_seed(0)
    domain, size = torch.tensor(domains), len(domains)
    labels = torch.where(domain == 0, torch.arange(size) % 3, -100)
    features = (scale * torch.randn(size, 4)).requires_grad_()
    made = FakeBatch(features, domain, (scale * torch.randn(size, 3)).requires_grad_(), labels)
    made.num_domains = 2
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("domains", "scale"), [([0, 0, 0], 1), ([1, 1], 1), ([0, 1], 1), ([0, 1, 0, 1], 1e4)]
)
def test_terms_and_gradients_are_finite(
    method: Callable[[], Any], domains: list[int], scale: float
) -> None:
    objective = method()
    objective._trainer = TRAINER
    objective.module = objective.build_modules(batch([0, 0, 1, 1]))
    given = batch(domains, scale)
    terms = objective.loss(given)
    terms = terms if isinstance(terms, dict) else {"": terms}
    sum(total for total, _ in terms.values()).backward()
    assert all(torch.isfinite(total) for total, _ in terms.values())
    leaves = [given.features()[0], given.logits()[0], *objective.module.parameters()]
    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves)
    if method is PADA:
        objective.before_step(1)
        assert torch.isfinite(objective.class_weights).all()
