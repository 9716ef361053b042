"""Metrics of a student, against hand-computed values and independent formulas."""

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score

import hf_adapt.evaluation
from hf_adapt.evaluation import (
    Agreement,
    CalibrationError,
    RetainedShare,
    TeacherDivergence,
    agreement,
    calibration_error,
    calibration_error_from,
    calibration_histogram,
    retained_share,
    teacher_divergence,
)


def random_logits(seed: int, number: int = 200, classes: int = 4) -> Any:
    return np.random.default_rng(seed).normal(size=(number, classes)).astype(np.float32) * 2


def random_labels(seed: int, number: int = 200, classes: int = 4) -> Any:
    return np.random.default_rng(seed).integers(0, classes, number)


# ---- agreement


def test_agreement_is_the_accuracy_with_the_teacher_as_truth() -> None:
    student, teacher = random_logits(0), random_logits(1)
    expected = accuracy_score(teacher.argmax(-1), student.argmax(-1))
    assert agreement(student, teacher) == pytest.approx(expected)
    assert agreement(student, teacher.argmax(-1)) == pytest.approx(expected)
    assert agreement(torch.tensor(student), torch.tensor(teacher)) == pytest.approx(expected)
    assert agreement(student, student) == 1.0


def test_ignored_items_do_not_count_in_agreement() -> None:
    assert agreement([0, 1, 2, -100], [0, 2, 2, -100]) == pytest.approx(2 / 3)
    assert agreement([0, 1, 2], [0, -100, 1]) == 0.5
    assert agreement([0, 1, 2], [0, 0, 2], labels=[1, -100, 1]) == 1.0
    tokens = np.array([[0, 1, 1], [1, 1, 1]]), np.array([[0, 0, 1], [1, 0, 0]])
    assert agreement(*tokens, labels=[[5, 5, -100], [5, -100, -100]]) == pytest.approx(2 / 3)


# ---- divergence


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_divergence_is_that_of_scipy(temperature: float) -> None:
    student, teacher = random_logits(0), random_logits(1)
    p, q = (softmax(x.astype(np.float64) / temperature, -1) for x in (teacher, student))
    expected = entropy(p, q, axis=-1).mean()
    found = teacher_divergence(student, teacher, temperature)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found != pytest.approx(teacher_divergence(teacher, student, temperature), rel=1e-3)
    labels = np.where(np.arange(200) < 50, 0, -100)
    some = entropy(p, q, axis=-1)[:50].mean()
    assert teacher_divergence(student, teacher, temperature, labels) == pytest.approx(some)


def test_divergence_by_hand_and_at_the_extremes() -> None:
    # p = (1/2, 1/2), q = (3/4, 1/4): KL = ln(2/3)/2 + ln(2)/2.
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert teacher_divergence([[np.log(3), 0.0]], [[1.0, 1.0]]) == pytest.approx(expected)
    assert teacher_divergence(random_logits(0), random_logits(0) + 7) == pytest.approx(0, abs=1e-12)
    assert teacher_divergence([[1e4, 0.0]], [[0.0, 1e4]]) == pytest.approx(1e4)
    # A class that neither has (padding) adds nothing; one that only the teacher has, infinitely.
    masked = [[0.0, 1.0, -np.inf]]
    assert teacher_divergence(masked, masked) == 0.0
    assert teacher_divergence(masked, [[0.0, 1.0, 0.0]]) == np.inf


# ---- calibration


def by_loop(probabilities: Any, labels: Any, n_bins: int) -> float:
    """Eq. 3 of Guo et al. 2017, as written."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    total = 0.0
    for m in range(1, n_bins + 1):
        inside = (confidence > (m - 1) / n_bins) & (confidence <= m / n_bins)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("n_bins", [1, 2, 10, 15])
def test_calibration_error_is_its_definition(n_bins: int) -> None:
    logits, labels = random_logits(0), random_labels(1)
    probabilities = softmax(logits.astype(np.float64), -1)
    expected = by_loop(probabilities, labels, n_bins)
    assert calibration_error(logits, labels, n_bins) == pytest.approx(expected, rel=1e-12)
    found = calibration_error(probabilities, labels, n_bins, from_logits=False)
    assert found == pytest.approx(expected, rel=1e-12)


def test_bins_are_those_of_scikit_learn() -> None:
    probabilities, labels = softmax(random_logits(0), -1), random_labels(1)
    counts, confidences, correct = calibration_histogram(probabilities, labels, 10)
    right = probabilities.argmax(-1) == labels
    true, predicted = calibration_curve(right, probabilities.max(-1), n_bins=10)
    filled = counts > 0
    np.testing.assert_allclose(correct[filled] / counts[filled], true)
    np.testing.assert_allclose(confidences[filled] / counts[filled], predicted, rtol=1e-6)


def test_a_confidence_on_an_edge_is_in_the_lower_bin() -> None:
    rows = [[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]
    counts, confidences, correct = calibration_histogram(rows, [0, 0, 1], n_bins=4)
    assert counts.tolist() == [0, 1, 1, 1]
    assert confidences.tolist() == [0, 0.5, 0.75, 1.0]
    assert correct.tolist() == [0, 1, 1, 0]


def test_sums_over_batches_are_exact_and_ignored_labels_do_not_count() -> None:
    logits, labels = random_logits(0), random_labels(1)
    probabilities = softmax(logits.astype(np.float64), -1)
    labels[::3] = -100
    parts = [
        calibration_histogram(probabilities[i : i + 7], labels[i : i + 7]) for i in range(0, 200, 7)
    ]
    kept = labels != -100
    whole = calibration_error(probabilities[kept], labels[kept], from_logits=False)
    assert calibration_error_from(sum(parts)) == pytest.approx(whole, rel=1e-12)
    assert calibration_error(logits, labels) == pytest.approx(whole, rel=1e-12)
    ignored = calibration_histogram(probabilities[:2], [-100, -100])
    assert ignored.shape == (3, 15)
    assert not ignored.any()
    assert not calibration_histogram(np.zeros((0, 4)), np.zeros(0, int)).any()


def test_a_calibrated_and_an_overconfident_model() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 20_000)
    labels = np.array([rng.choice(3, p=p) for p in probabilities])
    assert calibration_error(probabilities, labels, from_logits=False) < 0.02
    assert calibration_error(np.log(probabilities) * 4, labels) > 0.1


# ---- what is retained


def test_retained_share() -> None:
    assert retained_share(0.9, 0.9) == 1.0
    assert retained_share(0.45, 0.9) == 0.5
    assert RetainedShare(keep_in_memory=True).compute(
        predictions=[0.8, 0.4], references=[1.0, 0.5]
    ) == {"retained_share": pytest.approx(0.8)}
    found = RetainedShare(keep_in_memory=True).compute(
        predictions=[0, 1, 1, 0, 5],
        references=[0, 1, 0, 1, -100],
        teacher_predictions=[0, 1, 0, 0, 6],
        metric=lambda predictions, labels: accuracy_score(labels, predictions),
    )
    assert found == {"retained_share": pytest.approx((2 / 4) / (3 / 4))}


# ---- as metrics of evaluate


@pytest.mark.parametrize("in_memory", [True, False])
def test_metrics_compute_what_their_functions_do(in_memory: bool, tmp_path: Any) -> None:
    student, teacher, labels = random_logits(0), random_logits(1), random_labels(2)
    given = dict(keep_in_memory=True) if in_memory else dict(cache_dir=str(tmp_path))
    both = dict(predictions=student, references=teacher)
    assert Agreement(**given).compute(**both) == {"agreement": agreement(student, teacher)}
    classes = dict(predictions=student.argmax(-1), references=teacher.argmax(-1))
    assert Agreement(**given).compute(**classes) == {"agreement": agreement(student, teacher)}
    expected = teacher_divergence(student, teacher, 2.0, labels)
    found = TeacherDivergence(**given).compute(**both, temperature=2.0, labels=labels)
    assert found == {"teacher_divergence": expected}
    found = CalibrationError(**given).compute(predictions=student, references=labels, n_bins=5)
    assert found == {"calibration_error": calibration_error(student, labels, 5)}


def test_a_metric_takes_batches_and_says_what_it_is() -> None:
    student, labels = random_logits(0), random_labels(2)
    metric = CalibrationError(keep_in_memory=True)
    for start in range(0, 200, 50):
        rows = slice(start, start + 50)
        metric.add_batch(predictions=student[rows], references=labels[rows])
    assert metric.compute() == {"calibration_error": calibration_error(student, labels)}
    for cls in (Agreement, TeacherDivergence, CalibrationError, RetainedShare):
        assert cls(keep_in_memory=True).info.description


def test_the_extra_is_named_where_evaluate_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "hf_adapt.evaluation.metrics")
    with pytest.raises(ImportError, match=r'pip install "hf-adapt\[evaluation\]"'):
        importlib.import_module("hf_adapt.evaluation.metrics")
    assert hf_adapt.evaluation.agreement([1], [1]) == 1.0  # the plain functions do without


# ---- refused

ROWS = [[0.5, 0.5], [0.9, 0.1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: agreement([0, 1], [0]), r"one shape .*\(2,\) and \(1,\)"),
        (lambda: agreement([0.5, 0.5], [1, 0]), r"shape \(N, C\) .*got \(2,\)"),
        (lambda: agreement([-100], [0]), r"No item to measure"),
        (lambda: agreement([0, 1], [0, 1], labels=[0]), r"one label for each .*\(2,\), got \(1,\)"),
        (lambda: agreement([], []), r"\(N, C\)"),
        (lambda: agreement([[np.nan, 0.0]], [0]), r"NaN"),
        (lambda: teacher_divergence(ROWS, [[0.0, 1.0, 2.0]] * 2), r"\(2, 2\) and \(2, 3\)"),
        (lambda: teacher_divergence([[1.0]], [[1.0]]), r"at least two classes"),
        (lambda: teacher_divergence(ROWS, ROWS, temperature=0.0), r"positive temperature, got 0.0"),
        (lambda: teacher_divergence(ROWS, ROWS, labels=[-100, -100]), r"No item to measure: of 2"),
        (lambda: calibration_error(ROWS, [0, 1]), r"Expected logits.*from_logits=False"),
        (lambda: calibration_error([[3.0, 1.0]], [0], from_logits=False), r"through a softmax"),
        (lambda: calibration_error(ROWS, [0, 2], from_logits=False), r"labels from 0 to 1"),
        (lambda: calibration_error(ROWS, [0], from_logits=False), r"each row of \(2, 2\)"),
        (lambda: calibration_error(ROWS, [-100, -100], from_logits=False), r"histogram is empty"),
        (lambda: calibration_histogram(ROWS, [0, 1], 0), r"n_bins to be 1 or more, got 0"),
        (lambda: calibration_error_from(np.zeros((2, 15))), r"\(3, n_bins\).*\(2, 15\)"),
        (lambda: retained_share(0.5, 0.0), r"positive one of the teacher, got 0.5 and 0.0"),
        (lambda: retained_share(float("nan"), 0.5), r"finite"),
        (
            lambda: RetainedShare(keep_in_memory=True).compute(
                predictions=[1], references=[1], metric=accuracy_score
            ),
            r"together",
        ),
    ],
)
def test_inputs_that_do_not_fit(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        call()
