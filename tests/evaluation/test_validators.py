"""Validators against independent formulas, on fixed arrays."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, balanced_accuracy_score

from hf_adapt.evaluation import (
    collapse,
    density_ratio,
    effective_sample_size,
    proxy_a_distance,
    validators,
)
from hf_adapt.evaluation.importance_weights import UntrustedWeights
from hf_adapt.evaluation.validators import controlled_risk

PRIOR = [0.5, 0.3, 0.2]


def logits(seed: int = 0, number: int = 60, classes: int = 3) -> Any:
    return np.random.default_rng(seed).normal(size=(number, classes)) * 2


def domains(number: int = 200, shift: float = 0.5) -> Any:
    """Features of two domains, and what a good model says of them."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 2, 2 * number)
    features = random.normal(size=(2 * number, 4)) + 2 * labels[:, None] * np.eye(4)[0]
    features[number:, 1] += shift
    return features[:number], labels[:number], features[number:], labels[number:]


# ---- values


def test_entropy_is_that_of_scipy() -> None:
    p = softmax(logits(), axis=1)
    assert validators.entropy(logits()) == pytest.approx(-scipy_entropy(p, axis=1).mean())


def test_information_maximization_counts_the_prior() -> None:
    p = softmax(logits(), axis=1)
    certain = -scipy_entropy(p, axis=1).mean()
    expected = certain - scipy_entropy(p.mean(0), PRIOR)
    assert validators.information_maximization(logits(), PRIOR) == pytest.approx(expected)
    uniform = certain + scipy_entropy(p.mean(0)) - math.log(3)
    assert validators.information_maximization(logits()) == pytest.approx(uniform)


def test_nuclear_norm_is_that_of_torch() -> None:
    p = torch.tensor(logits()).softmax(1)
    expected = float(torch.linalg.matrix_norm(p, "nuc")) / math.sqrt(60 * 3)
    assert validators.nuclear_norm(logits()) == pytest.approx(expected)
    wide = torch.tensor(logits(1, 2, 5)).softmax(1)
    expected = float(torch.linalg.matrix_norm(wide, "nuc")) / 2
    assert validators.nuclear_norm(logits(1, 2, 5)) == pytest.approx(expected)


@pytest.mark.parametrize("block", [1, 7, 60, 512])
def test_soft_neighbourhood_density_is_that_of_the_whole_matrix(block: int) -> None:
    p = torch.tensor(softmax(logits(), axis=1))
    unit = p / p.norm(dim=1, keepdim=True)
    similarity = (unit @ unit.T / 0.05).fill_diagonal_(-torch.inf)
    expected = torch.special.entr(similarity.softmax(1)).sum(1).mean()
    found = validators.soft_neighborhood_density(logits(), block=block)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_ensemble_agreement() -> None:
    models = [logits(seed) for seed in range(5)]
    ensemble = sum(softmax(each, axis=1) for each in models).argmax(1)
    expected = [(each.argmax(1) == ensemble).mean() for each in models]
    assert [validators.ensemble_agreement(models, n) for n in range(5)] == expected
    assert validators.ensemble_agreement(models) == pytest.approx(np.mean(expected))
    assert validators.ensemble_agreement(models, models[2]) == expected[2]


def test_class_balance_is_one_less_the_total_variation() -> None:
    shares = np.bincount(logits().argmax(1), minlength=3) / 60
    expected = 1 - np.abs(shares - PRIOR).sum() / 2
    assert validators.class_balance(logits(), PRIOR) == pytest.approx(expected)


def test_class_ami_compares_clusters_with_predictions() -> None:
    source, labels, _, _ = domains()
    scores = np.eye(2)[labels]
    clusters = (source[:, 0] > 1).astype(int)
    found = validators.class_ami(scores, source * [9, 0.01, 0.01, 0.01])
    assert found == pytest.approx(adjusted_mutual_info_score(labels, clusters), abs=0.1)
    random = np.eye(2)[np.random.default_rng(0).permutation(labels)]
    assert validators.class_ami(random, source) < 0.1
    assert validators.class_ami(np.eye(2)[labels * 0], source) == 0


def test_circular_validation_teaches_the_source() -> None:
    source, source_labels, target, target_labels = domains()
    peer = LogisticRegression(C=100).fit(target, target_labels).predict(source)
    expected = balanced_accuracy_score(source_labels, peer)
    found = validators.circular(target, target_labels, source, source_labels)
    assert found == pytest.approx(expected, abs=0.02)
    assert validators.circular(target, np.eye(2)[target_labels], source, source_labels) == found
    wrong = validators.circular(target, 1 - target_labels, source, source_labels)
    assert wrong == pytest.approx(1 - found, abs=0.02)
    assert validators.circular(target, target_labels * 0, source, source_labels) == 0.5


# ---- importance weights


def test_weights_are_the_ratio_of_the_densities() -> None:
    random = np.random.default_rng(0)
    source, target = random.normal(size=(4000, 1)), random.normal(0.5, 1, size=(2000, 1))
    weights = density_ratio(source, target, clip=1.0, normalize=False)
    expected = np.exp(0.5 * source[:, 0] - 0.125)  # of N(0.5, 1) to N(0, 1)
    assert np.corrcoef(np.log(weights), np.log(expected))[0, 1] > 0.99
    assert weights.mean() == pytest.approx(1, abs=0.1)
    assert density_ratio(source, target).mean() == pytest.approx(1)


def test_weighted_loss_is_nearer_to_the_targets() -> None:
    random = np.random.default_rng(0)
    source, target = random.normal(size=(3000, 1)), random.normal(1.0, 1, size=(3000, 1))
    loss = lambda x: np.square(x[:, 0])  # noqa: E731
    truth = loss(target).mean()
    for validator in (validators.importance_weighted, validators.deep_embedded):
        found = -validator(source, loss(source), target)
        assert abs(found - truth) < abs(loss(source).mean() - truth) / 2, validator.__name__


def test_the_control_variate_is_a_regression_on_the_weights() -> None:
    random = np.random.default_rng(1)
    weights, losses = random.gamma(2, 0.4, 500), random.random(500)
    slope = np.polyfit(weights, weights * losses, 1)[0]
    expected = (weights * losses).mean() - slope * (weights.mean() - 1)
    assert -controlled_risk(weights, losses) == pytest.approx(expected)
    assert controlled_risk(np.ones(500), losses) == pytest.approx(-losses.mean())


def test_weights_of_a_few_items_are_refused_with_the_number() -> None:
    source, target = np.zeros((100, 3)), np.ones((100, 3))
    random = np.random.default_rng(0)
    source, target = (x + 0.01 * random.normal(size=x.shape) for x in (source, target))
    source[:20] = target[:20]
    weights = density_ratio(source, target)
    size = effective_sample_size(weights)
    assert size < 30
    for validator in (validators.importance_weighted, validators.deep_embedded):
        with pytest.raises(UntrustedWeights, match=rf"effective sample size is {size:.1f} of 100"):
            validator(source, np.zeros(100), target)


def test_a_distance_tells_domains_apart() -> None:
    source, _, target, _ = domains(shift=20.0)
    assert proxy_a_distance(source, target) > 1.9
    assert abs(proxy_a_distance(source[::2], source[1::2])) < 0.4


# ---- collapse


def test_a_collapsed_model_is_named() -> None:
    one = np.tile([3.0, 0.0], (100, 1))
    few = one.copy()
    few[0] = [0, 1]
    assert collapse(one) == "every target item is given class 0"
    assert collapse(few) == "99.0% of the target is given class 0" or collapse(few) is None
    fine, features = logits(0, 100, 2), np.random.default_rng(0).normal(size=(100, 4))
    assert collapse(fine, features) is None
    assert collapse(fine, features * 1e-3 + 5) == "all target features lie at one point"
    assert collapse(fine, features * 0) == "all target features lie at one point"
    rare = np.tile([3.0, 0.0], (1000, 1))
    rare[:5] = [0, 1]
    assert collapse(rare) and collapse(rare, prior=[0.995, 0.005]) is None


# ---- what goes in


ALL = {
    "entropy": lambda x, f, y: validators.entropy(x),
    "information_maximization": lambda x, f, y: validators.information_maximization(x),
    "nuclear_norm": lambda x, f, y: validators.nuclear_norm(x),
    "soft_neighborhood_density": lambda x, f, y: validators.soft_neighborhood_density(x),
    "class_balance": lambda x, f, y: validators.class_balance(x),
    "ensemble_agreement": lambda x, f, y: validators.ensemble_agreement([x, x]),
    "class_ami": lambda x, f, y: validators.class_ami(x, f),
    "circular": lambda x, f, y: validators.circular(f, x, f, y),
    "importance_weighted": lambda x, f, y: validators.importance_weighted(f, x[:, 0], f),
    "deep_embedded": lambda x, f, y: validators.deep_embedded(f, x[:, 0], f),
}


@pytest.mark.parametrize("name", ALL)
def test_arrays_tensors_and_lists_are_alike(name: str) -> None:
    x = logits().astype(np.float32)
    features = np.random.default_rng(5).normal(size=(60, 4)).astype(np.float32)
    labels = x.argmax(1)
    found = ALL[name](x, features, labels)
    assert type(found) is float and math.isfinite(found)
    assert ALL[name](*map(torch.tensor, (x, features, labels))) == pytest.approx(found, rel=1e-6)
    half = ALL[name](torch.tensor(x).bfloat16(), torch.tensor(features), torch.tensor(labels))
    assert math.isfinite(half)


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_or_of_another_shape_is_named(name: str) -> None:
    x, features = logits(), np.random.default_rng(5).normal(size=(60, 4))
    labels = x.argmax(1)
    broken = x.copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 60 rows"):
        ALL[name](broken, features, labels)
    with pytest.raises(ValueError, match="Expected"):
        ALL[name](x[:0], features, labels)


def test_extreme_scores_stay_finite() -> None:
    x = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]] * 20)
    for name in ("entropy", "information_maximization", "nuclear_norm"):
        assert math.isfinite(ALL[name](x, None, None))
    assert validators.entropy(x) == pytest.approx(0.0)
    assert log_softmax(x, axis=1).min() < -1e3
