"""CDAN: the outer product and the weights against numpy, and classes that DANN would mix up."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_adapt.alignment import CDAN, conditioned_features, entropy_weights
from tests.helpers.fake_batch import FakeBatch


def test_outer_product_with_probabilities_that_have_no_gradient():
    torch.manual_seed(0)
    features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    product = conditioned_features(features, logits)
    scores = np.exp(logits.detach().numpy())
    probabilities = scores / scores.sum(1, keepdims=True)
    expected = np.einsum("nc,nd->ncd", probabilities, features.detach().numpy()).reshape(3, 20)
    np.testing.assert_allclose(product.detach().numpy(), expected, rtol=1e-12)
    product.sum().backward()
    assert logits.grad is None
    torch.testing.assert_close(features.grad, torch.ones_like(features))  # Σ_c p_c = 1


@pytest.mark.parametrize("shapes", [((3, 4), (2, 5)), ((3, 4), (3,)), ((3, 2, 4), (3, 5))])
def test_outer_product_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match="the same N, got"):
        conditioned_features(*map(torch.zeros, shapes))


def test_entropy_weights_are_those_of_the_paper():
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 1.0, -1.0], [5.0, 0.0, 1.0]]).double()
    scores = np.exp(logits.numpy())
    probabilities = scores / scores.sum(1, keepdims=True)
    weights = 1 + np.exp((probabilities * np.log(probabilities)).sum(1))
    np.testing.assert_allclose(entropy_weights(logits), 3 * weights / weights.sum(), rtol=1e-12)
    assert entropy_weights(torch.zeros(0, 3)).shape == (0,)
    # exp(3e4) has no float16.
    extreme = torch.tensor([[3e4, -3e4], [0.0, 0.0]], dtype=torch.float16)
    np.testing.assert_allclose(entropy_weights(extreme).numpy(), [2 / 1.75, 1.5 / 1.75], rtol=1e-6)


@pytest.mark.parametrize("conditioning", [True, False])
def test_loss_is_that_of_a_discriminator_of_the_product(conditioning):
    torch.manual_seed(0)
    features, logits = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3)
    domain = torch.tensor([0, 0, 0, 1, 1, 1])
    batch = FakeBatch(features, domain, logits)
    cdan = CDAN(entropy_conditioning=conditioning, hidden_sizes=(5,), bounded=False)
    cdan.module = cdan.build_modules(batch)
    total, count = cdan.loss(batch)
    total.backward()

    own = features.detach().requires_grad_()
    weights = entropy_weights(logits) if conditioning else torch.ones(6)
    scores = cdan.module((logits.softmax(1)[:, :, None] * own[:, None]).flatten(1))
    expected = (weights * F.cross_entropy(scores, domain, reduction="none")).sum()
    expected.backward()
    assert int(count) == 6
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(features.grad, -0.0848284 * own.grad, rtol=1e-4, atol=1e-7)


def test_refuses_predictions_of_other_items_than_the_features():
    batch = FakeBatch(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), torch.zeros(9, 3))
    with pytest.raises(
        ValueError, match="CDAN needs a prediction for each feature, and there are 4 features and 9"
    ):
        CDAN().build_modules(batch)
