"""Calibration against hand-computed values, scikit-learn and scipy."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax, logit, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from hf_adapt.evaluation import brier_score, calibration_error, fitted_temperature, reliability

CONFIDENCES = np.array([0.95, 0.9, 0.8, 0.65, 0.55])
RIGHT = np.array([1, 1, 0, 1, 0])


def items(seed: int, number: int = 400, classes: int = 4) -> tuple[Any, Any]:
    """Logits that are too sure of labels drawn from a softer softmax of them."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(number, classes)) * 3
    labels = [generator.choice(classes, p=p) for p in softmax(logits / 2.5, 1)]
    return logits, np.array(labels)


def of_two(confidences: Any) -> Any:
    return np.stack([confidences, 1 - confidences], 1)


def test_calibration_error_by_hand() -> None:
    # Each is alone in its bin: (.05 + .1 + .8 + .35 + .55) / 5.
    found = calibration_error(of_two(CONFIDENCES), 1 - RIGHT, 10, from_logits=False)
    assert found == pytest.approx(0.37)
    # The same from logits, whose softmax is .8000000000000002 and the like.
    logits = np.stack([logit(CONFIDENCES), np.zeros(5)], 1)
    assert calibration_error(logits, 1 - RIGHT, 10) == pytest.approx(0.37)
    single = calibration_error(logits.astype(np.float32), 1 - RIGHT, 10)
    assert single == pytest.approx(0.37, abs=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda x: x.tolist()])
def test_the_bins_are_those_of_scikit_learn(kind: Any) -> None:
    logits, labels = items(0)
    top, right = softmax(logits, 1).max(1), logits.argmax(1) == labels
    accuracy, confidence = calibration_curve(right, top, n_bins=10)
    found = reliability(kind(logits), kind(labels))
    assert [each["accuracy"] for each in found] == pytest.approx(accuracy.tolist())
    assert [each["confidence"] for each in found] == pytest.approx(confidence.tolist())
    assert sum(each["count"] for each in found) == 400
    gap = sum(each["count"] * abs(each["accuracy"] - each["confidence"]) for each in found) / 400
    assert calibration_error(logits, labels, 10) == pytest.approx(gap)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda x: x.tolist()])
def test_brier_score_is_its_definition(kind: Any) -> None:
    logits, labels = items(1)
    probabilities = softmax(logits, 1)
    each = [
        sum((p - (c == y)) ** 2 for c, p in enumerate(row))
        for row, y in zip(probabilities, labels, strict=True)
    ]
    assert brier_score(kind(logits), kind(labels)) == pytest.approx(np.mean(each))
    # For two classes it is twice that of the probability of one.
    two, truth = logits[:, :2], labels % 2
    own = brier_score_loss(truth, softmax(two, 1)[:, 1])
    assert brier_score(two, truth) == pytest.approx(2 * own)
    assert brier_score([[1e3, 0.0]], [0]) == 0 and brier_score([[1e3, 0.0]], [1]) == 2


def test_temperature_by_hand() -> None:
    # Three of four are right where sigma(2 / T) = 3/4: T = 2 / ln 3.
    found = fitted_temperature([[2.0, 0.0]] * 4, [0, 0, 0, 1])
    assert found == pytest.approx(1.820478, abs=1e-6)


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_temperature_is_the_root_of_the_gradient(scale: float, kind: Any) -> None:
    logits, labels = items(2)
    logits = logits * scale

    def slope(inverse: float) -> float:
        expected = (softmax(logits * inverse, 1) * logits).sum(1)
        return float((expected - logits[np.arange(400), labels]).mean())

    found = fitted_temperature(kind(logits), kind(labels))
    assert found == pytest.approx(1 / brentq(slope, 1e-2, 1e2), rel=1e-6)
    assert found / scale == pytest.approx(2.5, rel=0.2)
    after = logits / found
    assert log_loss(labels, softmax(after, 1)) <= log_loss(labels, softmax(logits, 1))
    assert (after.argmax(1) == logits.argmax(1)).all()
    assert calibration_error(after, labels, 10) < 0.05
    assert -log_softmax(after, 1).min() > 0


def test_a_model_without_errors_has_a_bounded_temperature() -> None:
    logits = np.eye(3)[[0, 1, 2]] * 4
    assert 0.05 <= fitted_temperature(logits, [0, 1, 2]) < 0.2  # from there on the loss is 0
    assert fitted_temperature(logits, [1, 2, 0]) == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize("function", [brier_score, fitted_temperature])
def test_wrong_labels_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"Leave out the items without a label \(-100\)"):
        function([[1.0, 0.0], [0.0, 1.0]], [0, -100])
    with pytest.raises(ValueError, match="below 2, the number of classes; got 2"):
        function([[1.0, 0.0], [0.0, 1.0]], [0, 2])
    with pytest.raises(ValueError, match="Expected 2 labels, one for each item, got 1"):
        function([[1.0, 0.0], [0.0, 1.0]], [0])


def test_items_without_a_label_are_left_out_of_the_diagram() -> None:
    logits, labels = items(3)
    some = np.where(np.arange(400) < 100, labels, -100)
    assert reliability(logits, some) == reliability(logits[:100], labels[:100])
