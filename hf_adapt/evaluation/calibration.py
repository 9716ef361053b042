"""Calibration: whether a probability of 0.8 is right in 80 % of the cases."""

from __future__ import annotations

import numpy as np

from hf_adapt.evaluation.arrays import (
    Array,
    as_classes,
    as_logits,
    extra,
    log_softmax,
    softmax,
)
from hf_adapt.evaluation.distillation import calibration_histogram


def brier_score(logits: Array, labels: Array) -> float:
    r"""Mean squared distance of the probabilities from the truth.

    .. math::
        \frac{1}{N} \sum_i \sum_c (p_{ic} - [y_i = c])^2

    Reference:
        Brier 1950, "Verification of Forecasts Expressed in Terms of Probability".

    Args:
        logits: Scores of each class.
        labels: The right classes.

    Shape:
        - logits: (N, C); labels: (N,).

    Returns:
        From 0 (sure and right) to 2 (sure and wrong).

    Example:
        >>> brier_score([[0.0, 0.0]], [1])
        0.5
    """
    scores = as_logits(logits)
    truth = np.eye(scores.shape[1])[as_classes(labels, "labels", len(scores), scores.shape[1])]
    return float(np.square(softmax(scores) - truth).sum(1).mean())


def reliability(logits: Array, labels: Array, n_bins: int = 10) -> list[dict[str, float]]:
    """The bins of a reliability diagram: confidence and accuracy, and how many items.

    Args:
        logits: Scores of each class.
        labels: The right classes; -100 does not count.
        n_bins: Number of bins of equal width; empty ones are left out.

    Shape:
        - logits: (N, C); labels: (N,).

    Example:
        >>> reliability([[0.0, 0.0], [0.0, 0.0]], [0, 1])
        [{'confidence': 0.5, 'accuracy': 0.5, 'count': 2}]
    """
    counts, confidences, right = calibration_histogram(softmax(as_logits(logits)), labels, n_bins)
    return [
        {"confidence": float(c / n), "accuracy": float(r / n), "count": int(n)}
        for n, c, r in zip(counts, confidences, right, strict=True)
        if n
    ]


def fitted_temperature(logits: Array, labels: Array) -> float:
    r"""The temperature T of \(\mathrm{softmax}(z / T)\) that makes held-out labels most probable.

    Reference:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2, arXiv:1706.04599.

    Args:
        logits: Scores of each class for held-out items.
        labels: Their labels.

    Shape:
        - logits: (N, C); labels: (N,).

    Returns:
        Between 0.05 and 20; a model that makes no error has no finite best one below 1.

    Example:
        >>> round(fitted_temperature([[2.0, 0.0]] * 4, [0, 0, 0, 1]), 4)  # 2 / ln 3
        1.8205
    """
    scores = as_logits(logits)
    truth = as_classes(labels, "labels", len(scores), scores.shape[1])
    rows = np.arange(len(scores))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(scores / np.exp(log_temperature))[rows, truth].mean())

    found = extra("scipy.optimize").minimize_scalar(
        loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded", options={"xatol": 1e-9}
    )
    return float(np.exp(found.x))
