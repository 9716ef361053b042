"""MCD: the discrepancy against numpy, and who is trained by which part."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_adapt.alignment import MCD, classifier_discrepancy
from tests.helpers.fake_batch import FakeBatch


def test_discrepancy_is_the_mean_absolute_difference():
    torch.manual_seed(0)
    one, other = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    scores = np.exp(np.stack([one.numpy(), other.numpy()]))
    p, q = scores / scores.sum(-1, keepdims=True)
    np.testing.assert_allclose(classifier_discrepancy(one, other), np.abs(p - q).mean(1))
    leaf = one.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: classifier_discrepancy(x, other), (leaf,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_discrepancy_is_finite_at_equal_and_extreme_scores(dtype):
    scores = torch.tensor([[3e4, -3e4], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    value = classifier_discrepancy(scores, scores.detach())
    value.sum().backward()
    assert value.tolist() == [0, 0] and torch.isfinite(scores.grad).all()
    assert value.dtype == torch.float32


def test_discrepancy_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"expects two tensors of scores \(N, C\), got"):
        classifier_discrepancy(torch.zeros(2, 3), torch.zeros(2, 4))


def test_objective_trains_classifiers_apart_and_features_together():
    torch.manual_seed(0)
    features, domain = torch.randn(7, 4, requires_grad=True), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    labels = torch.tensor([0, 2, 1, -100, -100, -100, -100])
    batch = FakeBatch(features, domain, torch.zeros(7, 3), labels)
    mcd = MCD(weight=0.5, ramp=None, hidden_sizes=(5,))
    mcd.module = mcd.build_modules(batch)
    terms = mcd.loss(batch)
    sum(total for total, _ in terms.values()).backward()

    own = features.detach().requires_grad_()
    discrepancy = classifier_discrepancy(*(c(own[4:]) for c in mcd.module)).sum()
    errors = sum(F.cross_entropy(c(own[:3]), labels[:3], reduction="sum") for c in mcd.module)
    found = {name: (total.item(), int(count)) for name, (total, count) in terms.items()}
    assert found["source"] == pytest.approx((errors.item(), 4))
    assert found["target"] == pytest.approx((-discrepancy.item(), 3))
    # The classifiers maximise their discrepancy, the features minimise λ times it.
    theirs = torch.autograd.grad(errors - discrepancy, list(mcd.module.parameters()))
    for parameter, gradient in zip(mcd.module.parameters(), theirs, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    discrepancy = classifier_discrepancy(*(c(own[4:]) for c in mcd.module)).sum()
    (expected,) = torch.autograd.grad(0.5 * discrepancy, own)
    torch.testing.assert_close(features.grad, expected)
    assert (features.grad[:4] == 0).all() and features.grad[4:].abs().max() > 0
