"""Weights on source rows: ImportanceWeighting and PADA against weighted losses by hand."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_adapt.alignment import PADA, ImportanceWeighting, density_ratio_weights
from hf_adapt.alignment.source_weights import reweighting_loss
from tests.helpers.data import collate
from tests.helpers.fake_batch import FakeBatch
from tests.helpers.methods import make_trainer
from tests.helpers.models import bert, llama
from tests.helpers.trainers import GradientRecorder

TRAINER = SimpleNamespace(
    args=SimpleNamespace(label_smoothing_factor=0.0),
    accelerator=SimpleNamespace(reduce=lambda tensor, reduction: tensor),
)
METHODS = [ImportanceWeighting, PADA]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reweighting_makes_a_sum_a_weighted_sum(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, -100, 1, 1])
    weights = torch.tensor([2.0, 0.5, 9.0, 0.0, 1.0], requires_grad=True)
    loss = partial(F.cross_entropy, logits, labels, label_smoothing=smoothing)
    expected = (weights * loss(reduction="none")).sum()
    total = loss(reduction="sum") + reweighting_loss(logits, labels, weights, smoothing)
    torch.testing.assert_close(total, expected)
    assert not total.requires_grad  # weights are constants


def test_density_ratio_is_that_of_the_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.float64)
    p = np.exp(logits.numpy())
    p = p[:, 0] / p.sum(1)
    ratio = (1 - p) / p
    weights = density_ratio_weights(logits, max_weight=99.0)
    np.testing.assert_allclose(weights.numpy(), ratio / ratio.mean(), rtol=1e-12)
    clipped = np.minimum(ratio / ratio.mean(), 1.2)
    weights = density_ratio_weights(logits, max_weight=1.2)
    np.testing.assert_allclose(weights.numpy(), clipped / clipped.mean(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_density_ratio_is_finite_where_the_domains_are_told_apart(dtype):
    logits = torch.tensor([[6e4, -6e4], [6e4, -6e4], [0.0, 0.0]], dtype=dtype)
    assert density_ratio_weights(logits, 2.0).tolist() == pytest.approx([0, 0, 3])
    assert density_ratio_weights(logits[:2], 2.0).tolist() == [1, 1]
    assert density_ratio_weights(logits[:0]).shape == (0,)


def test_importance_weighting_weights_the_task_and_trains_its_classifier_only():
    torch.manual_seed(0)
    features, logits = torch.randn(7, 4, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    domain = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    labels = torch.tensor([0, 2, 1, 1, -100, -100, -100])
    batch = FakeBatch(features, domain, logits, labels)
    method = ImportanceWeighting()
    method._trainer = TRAINER
    method.module = method.build_modules(batch)
    at_first = method.loss(batch)
    assert float(at_first["reweighting"][0].detach()) == 0  # all weights are 1
    torch.nn.init.normal_(method.module[0].weight)
    terms = method.loss(batch)

    weights = density_ratio_weights(method.module(features)[:4])
    losses = F.cross_entropy(logits[:4], labels[:4], reduction="none")
    torch.testing.assert_close(terms["reweighting"][0] + losses.sum(), (weights * losses).sum())
    error = F.cross_entropy(method.module(features), domain, reduction="sum")
    torch.testing.assert_close(terms["discriminator"][0], error)
    assert [int(count) for _, count in terms.values()] == [7, 4]
    share = weights.sum() ** 2 / (4 * (weights**2).sum())
    assert batch.logged["effective_share"] == pytest.approx((float(share.detach()), 4))
    sum(total for total, _ in terms.values()).backward()
    assert features.grad is None and (logits.grad[4:] == 0).all()
    assert method.module[0].weight.grad.abs().max() > 0


def test_pada_weights_the_source_by_the_mean_prediction_of_the_step_before():
    torch.manual_seed(0)
    features, logits = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    domain = torch.tensor([0, 0, 0, 1, 1, 1])
    labels = torch.tensor([0, 2, -100, -100, -100, -100])
    batch = FakeBatch(features, domain, logits, labels)
    pada = PADA(weight=0.5, ramp=None, momentum=0.25, hidden_sizes=(5,), bounded=False)
    pada._trainer = TRAINER
    pada.module = pada.build_modules(batch)
    pada.before_step(0)
    assert pada.class_weights.tolist() == [1, 1, 1]
    pada.loss(batch)
    pada.loss(batch)  # a second micro-batch: nothing changes within a step
    assert pada.class_weights.tolist() == [1, 1, 1]
    pada.before_step(1)
    mean = 0.25 / 3 + 0.75 * logits[3:].softmax(1).mean(0)
    classes = (mean / mean.max()).detach()
    torch.testing.assert_close(pada.class_weights, classes)

    terms = pada.loss(batch)
    sum(total for total, _ in terms.values()).backward()
    own = features.detach().requires_grad_()
    weights = torch.stack([classes[0], classes[2], *torch.ones(4)])
    error = weights * F.cross_entropy(pada.module(own), domain, reduction="none")
    error.sum().backward()
    torch.testing.assert_close(terms["discriminator"][0], error.sum())
    torch.testing.assert_close(features.grad, -0.5 * own.grad)
    losses = F.cross_entropy(logits[:2], labels[:2], reduction="none")
    expected = ((weights[:2] - 1) * losses).sum()
    torch.testing.assert_close(terms["reweighting"][0], expected)
    assert [int(count) for _, count in terms.values()] == [6, 2]


def test_pada_counts_a_class_out_that_the_target_lacks():
    """Its source rows weigh nothing once the model predicts it for no target row."""
    logits = torch.tensor([[0.0, 0.0, 0.0]] * 4 + [[9.0, 0.0, -30.0], [0.0, 9.0, -30.0]])
    domain = torch.tensor([0, 0, 0, 0, 1, 1])
    batch = FakeBatch(torch.randn(6, 2), domain, logits, torch.tensor([0, 1, 2, 2, -100, -100]))
    pada = PADA(momentum=0.0)
    pada._trainer = TRAINER
    pada.module = pada.build_modules(batch)
    pada.loss(batch)
    pada.before_step(1)
    assert pada.item_weights(batch).tolist() == pytest.approx([1, 1, 0, 0, 1, 1], abs=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_whole_loss_is_the_weighted_one(smoothing, tmp_path):
    """The gradient of a step of the engine, with weights that are not 1."""

    class Fixed(ImportanceWeighting):
        def build_modules(self, batch):
            module = super().build_modules(batch)
            torch.nn.init.normal_(module[0].weight)
            return module

    kept = []

    def keep(features):
        kept.append(collate(features))
        return kept[-1]

    method, model, recorder = Fixed(learning_rate=1e-9), bert(), GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        [method],
        model,
        callbacks=[recorder],
        max_steps=1,
        max_grad_norm=0,
        learning_rate=0.0,
        label_smoothing_factor=smoothing,
    )
    trainer.data_collator = keep
    trainer.train()

    batch = {key: value for key, value in kept[0].items() if key != "domain"}
    source = batch.pop("labels")
    outputs = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].unsqueeze(-1)
    features = (outputs.hidden_states[-1] * mask).sum(1) / mask.sum(1)
    is_source = source != -100
    weights = density_ratio_weights(method.module(features)[is_source])
    losses = F.cross_entropy(
        outputs.logits[is_source], source[is_source], reduction="none", label_smoothing=smoothing
    )
    assert weights.std() > 0.1
    model.zero_grad()
    (weights * losses).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(recorder.gradients[0], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_refuses_losses_that_cannot_be_weighted(method, tmp_path):
    with pytest.raises(ValueError, match=f"{method.__name__} weights the cross-entropy.*causal"):
        make_trainer(tmp_path, [method()], llama(), labels="lm").train()
    trainer = make_trainer(tmp_path, [method()])
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss
    with pytest.raises(ValueError, match="found compute_loss_func"):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImportanceWeighting(max_weight=1.0), "max_weight=1.0 must be greater than 1"),
        (lambda: ImportanceWeighting(learning_rate=0), "learning_rate=0 must be positive"),
        (lambda: PADA(momentum=1.0), r"momentum=1.0 must lie in \[0, 1\)"),
    ],
)
def test_refuses_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
