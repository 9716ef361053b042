"""MDD: both losses against numpy, finite where the textbook form is not."""

import numpy as np
import pytest
import torch

from hf_adapt.alignment import MDD, disagreement_loss, mdd_loss
from tests.helpers.fake_batch import FakeBatch


def probabilities(logits):
    scores = np.exp(logits.detach().double().numpy())
    return scores / scores.sum(1, keepdims=True)


def test_disagreement_is_minus_the_log_of_one_minus_the_probability():
    torch.manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 2, 1, 1, 0])
    losses = disagreement_loss(logits, classes)
    p = probabilities(logits)[np.arange(5), classes]
    np.testing.assert_allclose(losses.detach().numpy(), -np.log(1 - p), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: disagreement_loss(x, classes), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_disagreement_is_finite_where_the_class_is_certain(dtype):
    """log(1 - softmax) is -inf there: other implementations add 1e-6 and lose the gradient."""
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype, requires_grad=True)
    losses = disagreement_loss(logits, torch.tensor([0, 0]))
    assert losses.dtype == torch.float32 and losses[1] == 0
    assert losses[0].item() == pytest.approx(2e4, rel=1e-2)
    losses.sum().backward()
    torch.testing.assert_close(logits.grad[0].float(), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("shapes", [((4, 2), (3,)), ((4, 1), (4,)), ((4,), (4,))])
def test_disagreement_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match="expects logits"):
        disagreement_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.long))


def test_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    source, second_source = torch.randn(4, 3), torch.randn(4, 3)
    target, second_target = torch.randn(5, 3), torch.randn(5, 3)
    p = probabilities(second_source)[np.arange(4), source.argmax(1)]
    q = probabilities(second_target)[np.arange(5), target.argmax(1)]
    expected = -2.0 * np.log(p).mean() - np.log(1 - q).mean()
    loss = mdd_loss(source, second_source, target, second_target, margin=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_objective_is_the_loss_with_a_reversed_gradient():
    torch.manual_seed(0)
    features, logits = torch.randn(12, 4, requires_grad=True), torch.randn(12, 2)
    domain = torch.arange(12) // 6
    batch = FakeBatch(features, domain, logits)
    mdd = MDD(weight=0.5, ramp=None, margin=1.5, hidden_sizes=(), bounded=False)
    mdd.module = mdd.build_modules(batch)
    terms = mdd.loss(batch)
    sum(total for total, _ in terms.values()).backward()

    own = features.detach().requires_grad_()
    second = mdd.module(own)
    expected = mdd_loss(logits[:6], second[:6], logits[6:], second[6:], 1.5)
    (6 * expected).backward()
    torch.testing.assert_close(sum(total / 6 for total, _ in terms.values()), expected)
    assert [int(count) for _, count in terms.values()] == [6, 6]
    torch.testing.assert_close(features.grad, -0.5 * own.grad)


def test_no_gradient_is_reversed_where_the_second_classifier_is_past_its_value_for_like_domains():
    torch.manual_seed(0)
    features, logits, domain = torch.randn(20, 4), torch.randn(20, 2), torch.arange(20) // 10
    gradients = {}
    for bounded in (True, False):
        own = features.clone().requires_grad_()
        mdd = MDD(weight=0.5, margin=1.5, hidden_sizes=(6,), bounded=bounded)
        torch.manual_seed(1)
        mdd.module = mdd.build_modules(FakeBatch(own, domain, logits))
        for total, _ in mdd.loss(FakeBatch(own, domain, logits)).values():
            total.backward(retain_graph=True)
        gradients[bounded] = own.grad, mdd.module[0].weight.grad
    agreement = probabilities(mdd.module(features))[np.arange(20), logits.argmax(1)]
    past = torch.from_numpy(np.where(domain == 0, agreement < 0.6, agreement > 0.6))
    assert 0 < past[:10].sum() < 10 and 0 < past[10:].sum() < 10
    assert (gradients[True][0][past] == 0).all()
    assert torch.equal(gradients[True][0][~past], gradients[False][0][~past])
    assert torch.equal(gradients[True][1], gradients[False][1])


def test_refuses_arguments():
    with pytest.raises(ValueError, match=r"margin=0 must be positive"):
        MDD(margin=0)
