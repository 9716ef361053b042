"""Entropy and diversity of predictions: hand values, extreme logits, and the objective."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from hf_adapt import InformationMaximization, adapt
from hf_adapt.alignment import prediction_diversity, prediction_entropy
from hf_adapt.engine.streams import Stream
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments


def logits_of(*probabilities):
    """Logits with these softmax probabilities, moved by a constant, which must not matter."""
    return torch.tensor(probabilities, dtype=torch.float64).log() + 3.0


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities)


def test_entropy_by_hand():
    logits = logits_of([0.5, 0.25, 0.25], [0.8, 0.1, 0.1])
    # 1/2 ln 2 + 1/2 ln 4 = 1.5 ln 2
    expected = [1.5 * math.log(2), entropy(0.8, 0.1, 0.1)]
    assert prediction_entropy(logits).tolist() == pytest.approx(expected, abs=1e-12)


def test_entropy_keeps_the_leading_dimensions():
    logits = torch.randn(2, 5, 3)
    result = prediction_entropy(logits)
    assert result.shape == (2, 5)
    torch.testing.assert_close(result[1, 2], prediction_entropy(logits[1, 2]))


def test_diversity_is_the_entropy_of_the_mean_probability():
    """The mean of (.9, .1) and (.3, .7) is (.6, .4): of probabilities, not of logits."""
    logits = logits_of([0.9, 0.1], [0.3, 0.7])
    assert prediction_diversity(logits).item() == pytest.approx(entropy(0.6, 0.4), abs=1e-12)


def test_diversity_tells_one_class_from_all_classes():
    one = torch.tensor([[50.0, 0.0, 0.0]]).repeat(3, 1)
    assert prediction_diversity(one).item() == pytest.approx(0, abs=1e-6)
    each = 50.0 * torch.eye(3)
    assert prediction_diversity(each).item() == pytest.approx(math.log(3), abs=1e-6)
    assert prediction_entropy(each).max().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_both_are_at_most_ln_c_and_reach_it(classes):
    uniform = torch.full((4, classes), 2.0)
    bound = math.log(classes)
    assert prediction_entropy(uniform).tolist() == pytest.approx([bound] * 4, abs=1e-6)
    assert prediction_diversity(uniform).item() == pytest.approx(bound, abs=1e-6)
    torch.manual_seed(0)
    for _ in range(20):
        logits = 3 * torch.randn(6, classes)
        rows, mean = prediction_entropy(logits), prediction_diversity(logits)
        assert (rows >= 0).all() and (rows < bound).all()
        assert rows.mean() <= mean + 1e-6 <= bound + 2e-6  # the mutual information is >= 0


@pytest.mark.parametrize("function", [prediction_entropy, prediction_diversity])
def test_gradcheck(function):
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("function", [prediction_entropy, prediction_diversity])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(function, dtype):
    """A probability that underflows to 0 has 0 · ln 0 = 0, not NaN, also in the gradient."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    value = function(logits)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()
    if function is prediction_entropy:
        assert value.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-3)
    else:  # the mean is (1/2, 1/4, 1/4)
        assert value.item() == pytest.approx(1.5 * math.log(2), abs=1e-3)


# ---- the objective ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, r"InformationMaximization\(weight=-1.0\).*finite number >= 0"),
        ({"entropy_weight": -0.1}, "entropy_weight=-0.1 and diversity_weight=1.0 must not be"),
        ({"diversity_weight": -2.0}, "entropy_weight=1.0 and diversity_weight=-2.0 must not be"),
    ],
)
def test_objective_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        InformationMaximization(**arguments)


def batch(logits, domain):
    return SimpleNamespace(model=None, logits=lambda: (logits, torch.tensor(domain)))


def test_objective_sees_target_rows_alone():
    torch.manual_seed(0)
    logits = torch.randn(5, 3, requires_grad=True)
    target = logits[[1, 3, 4]].detach()
    objective = InformationMaximization(entropy_weight=0.5, diversity_weight=0.3)
    terms = objective.loss(batch(logits, [0, 1, 0, 2, 1]))
    total, count = terms["entropy"]
    torch.testing.assert_close(total, 0.5 * prediction_entropy(target).sum())
    assert int(count) == 3
    torch.testing.assert_close(terms["negative_diversity"], -0.3 * prediction_diversity(target))
    (total + terms["negative_diversity"]).backward()
    assert torch.equal(logits.grad[[0, 2]], torch.zeros(2, 3))
    assert (logits.grad[[1, 3, 4]].abs().sum(1) > 0).all()


def test_objective_without_diversity_is_one_sum():
    terms = InformationMaximization(diversity_weight=0).loss(batch(torch.zeros(2, 2), [0, 1]))
    assert list(terms) == ["entropy"]


def test_objective_is_0_without_target_rows():
    logits = torch.randn(2, 3, requires_grad=True)
    terms = InformationMaximization().loss(batch(logits, [0, 0]))
    total, count = terms["entropy"]
    (total + terms["negative_diversity"]).backward()
    assert total.item() == terms["negative_diversity"].item() == int(count) == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_objective_refuses_logits_without_classes(shape):
    with pytest.raises(ValueError, match="logits of at least two classes, got"):
        InformationMaximization().loss(batch(torch.zeros(shape), [0, 1, 1]))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_objective_refuses_heads_without_exclusive_classes(problem):
    trainer = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(problem_type=problem)))
    with pytest.raises(ValueError, match=f"problem_type is '{problem}'"):
        InformationMaximization().setup(trainer)


def test_objective_counts_target_predictions():
    rows = SimpleNamespace(
        num_predictions=lambda target_only: torch.tensor(7 if target_only else 9)
    )
    assert int(InformationMaximization().num_items(rows)) == 7


def test_a_problem_that_only_the_labels_tell_is_refused_in_every_run(tmp_path):
    """transformers sets problem_type in the first forward, and leaves it set."""

    def vectors(features):
        batch = collate([{**row, "labels": 0} for row in features])
        return {**batch, "labels": torch.tensor([row["labels"] for row in features])}

    def data(seed):
        made = rows(8, seed)
        return made.map(lambda row, i: {"labels": [float(i % 2), 1.0, 0.0]}, with_indices=True)

    trainer = Trainer(
        model=bert(), args=arguments(tmp_path), train_dataset=data(1), data_collator=vectors
    )
    adapt(trainer, InformationMaximization(), target_dataset=Stream(data(2), forward="separate"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"exclusive classes.*'multi_label_classification'"):
            trainer.train()
        assert trainer.state.global_step == 0
