"""Metrics of a student and its teacher: agreement, divergence, calibration, retained share.

Plain functions of arrays; `metrics.py` has them as metrics of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_adapt.evaluation.arrays import Floats, log_softmax

IGNORED = -100
"""The label of ignored items, as in torch's cross-entropy and the Trainer's padding."""

Score = Callable[[NDArray[Any], NDArray[Any]], float]
"""(predictions, labels) -> a score, where higher is better."""


def same_shape(student: NDArray[Any], teacher: NDArray[Any], what: str) -> None:
    """Refuse arrays of student and teacher with different shapes."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected {what} of one shape from student and teacher, got {student.shape} and "
            f"{teacher.shape}. Give both for the same items (and classes), in the same order."
        )


def counted_items(shape: tuple[int, ...], labels: ArrayLike | None) -> NDArray[np.bool_]:
    """The items that are not ignored; there must be one."""
    kept = np.ones(shape, bool) if labels is None else np.asarray(labels) != IGNORED
    if kept.shape != shape:
        raise ValueError(f"Expected one label for each of the items {shape}, got {kept.shape}.")
    if not kept.any():
        raise ValueError(
            f"No item to measure: of {kept.size}, none has a label other than {IGNORED}. Give at "
            "least one."
        )
    return kept


def _scores(values: ArrayLike, what: str) -> Floats:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim < 2 or scores.shape[-1] < 2:
        raise ValueError(
            f"Expected {what} of shape (N, C) with at least two classes, got {scores.shape}. A "
            "single score of a binary classifier becomes two with np.stack([-x / 2, x / 2], -1)."
        )
    if np.isnan(scores).any():
        raise ValueError(f"Expected {what} without NaN, got some. Find where the model diverged.")
    return scores


def agreement(student: ArrayLike, teacher: ArrayLike, labels: ArrayLike | None = None) -> float:
    r"""The share of items on which student and teacher predict the same class.

    .. math::
        \frac{1}{N} \sum_i [\arg\max s_i = \arg\max t_i]

    A student may be as accurate as its teacher and yet make other errors, which agreement shows
    and an accuracy does not. For probabilities use [`teacher_divergence`].

    Reference:
        Stanton et al. 2021, "Does Knowledge Distillation Really Work?" (average top-1 agreement),
        arXiv:2106.05945.

    Args:
        student: Classes (integers) or scores of each class (floats, last dimension C).
        teacher: The same of the teacher; one may be classes and the other scores.
        labels: If given, items labelled -100 do not count. A class of -100 does not count either.

    Shape:
        - classes: (N,) or (N, L); scores: (N, C) or (N, L, C); labels: as classes.

    Returns:
        A share from 0 to 1.

    Raises:
        ValueError: If the shapes differ or no item counts.

    Example:
        >>> agreement([0, 2, 1, -100], [0, 1, 1, 1])
        0.6666666666666666
    """
    one, other = _classes(student), _classes(teacher)
    same_shape(one, other, "predictions")
    kept = counted_items(one.shape, labels)
    kept = counted_items(
        one.shape, np.where(kept & (one != IGNORED) & (other != IGNORED), 0, IGNORED)
    )
    return float((one == other)[kept].mean())


def _classes(predictions: ArrayLike) -> NDArray[Any]:
    array = np.asarray(predictions)
    if np.issubdtype(array.dtype, np.integer):
        return array
    return np.asarray(_scores(array, "scores").argmax(-1))


def teacher_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: float = 1.0,
    labels: ArrayLike | None = None,
) -> float:
    r"""Mean KL(teacher ‖ student) of the predicted probabilities.

    .. math::
        \frac{1}{N} \sum_i \sum_c p_{ic} \log \frac{p_{ic}}{q_{ic}}, \quad
        p = \sigma(t / T), \; q = \sigma(s / T)

    It sees differences that leave the predicted class unchanged, unlike [`agreement`].

    Reference:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2,
        arXiv:1503.02531. Deviation: no factor T², which scales gradients; this is a divergence.

    Args:
        student_logits: Scores of each class, before the softmax; computed in float64.
        teacher_logits: The teacher's scores of the same classes.
        temperature: Softmax temperature T of student and teacher.
        labels: If given, items labelled -100 do not count.

    Shape:
        - logits: (N, C) or (N, L, C); labels: without the C.

    Returns:
        The mean over the items, in nats, 0 or more.

    Raises:
        ValueError: If the shapes differ, the temperature is not positive or no item counts.

    Example:
        >>> round(teacher_divergence([[2.0, 0.0]], [[0.0, 0.0]]), 4)
        0.4338
    """
    student, teacher = (_scores(x, "logits") for x in (student_logits, teacher_logits))
    same_shape(student, teacher, "logits")
    if not temperature > 0:
        raise ValueError(f"Expected a positive temperature, got {temperature}. 1 changes nothing.")
    kept = counted_items(student.shape[:-1], labels)
    own, given = (log_softmax(x[kept] / temperature) for x in (student, teacher))
    with np.errstate(invalid="ignore"):  # a class of logit -inf in both: 0 · (-inf + inf) is 0
        terms = np.where(given == -np.inf, 0.0, np.exp(given) * (given - own))
    return float(max(terms.sum(-1).mean(), 0.0))


def calibration_histogram(probabilities: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> Floats:
    """Sums over bins for the calibration error; adding up batches and processes is exact.

    Args:
        probabilities: Probability of each class.
        labels: The right classes; -100 does not count.
        n_bins: Number of bins of equal width, ((m-1)/M, m/M] of the top probability.

    Shape:
        - probabilities: (N, C) or (N, L, C); labels: without the C; output: (3, n_bins).

    Returns:
        For each bin the number of items, the sum of their confidences and the number of right ones.

    Raises:
        ValueError: If the rows are no probabilities, or the shapes or labels do not fit.

    Example:
        >>> first = calibration_histogram([[0.75, 0.25]], [0], n_bins=2)
        >>> calibration_error_from(first + calibration_histogram([[0.25, 0.75]], [0], n_bins=2))
        0.25
    """
    rows = _scores(probabilities, "probabilities")
    if isinstance(n_bins, bool) or n_bins < 1:
        raise ValueError(f"Expected n_bins to be 1 or more, got {n_bins}.")
    truth = np.asarray(labels)
    if truth.shape != rows.shape[:-1]:
        raise ValueError(f"Expected one label for each row of {rows.shape}, got {truth.shape}.")
    rows, truth = rows[truth != IGNORED], truth[truth != IGNORED]
    if not _are_probabilities(rows):
        raise ValueError(
            "Expected probabilities, in rows from 0 to 1 with sum 1, got other values. Pass logits "
            "through a softmax first, or use `calibration_error(logits, labels)`."
        )
    if truth.size and (truth.min() < 0 or truth.max() >= rows.shape[-1]):
        raise ValueError(
            f"Expected labels from 0 to {rows.shape[-1] - 1} (or {IGNORED}), got {truth.min()} to "
            f"{truth.max()}."
        )
    confidences = rows.max(-1)
    edges = np.linspace(0.0, 1.0, n_bins + 1)[1:-1]
    bins = np.searchsorted(edges, confidences, side="left")
    sums = (None, confidences, (rows.argmax(-1) == truth).astype(np.float64))
    return np.stack(
        [np.bincount(bins, weights, minlength=n_bins).astype(float) for weights in sums]
    )


def _are_probabilities(rows: Floats) -> bool:
    # The sum's tolerance is that of half precision.
    return bool((rows >= 0).all() and (np.abs(rows.sum(-1) - 1) < 1e-2).all())


def calibration_error_from(histogram: ArrayLike) -> float:
    """The expected calibration error of a sum of histograms.

    Args:
        histogram: A `calibration_histogram`, or the sum of several of them.

    Shape:
        - histogram: (3, n_bins).

    Returns:
        From 0 (calibrated) to 1.

    Raises:
        ValueError: If the shape differs or the histogram is empty.

    Example:
        >>> calibration_error_from([[0, 2], [0, 1.5], [0, 2]])
        0.25
    """
    table = np.asarray(histogram, dtype=np.float64)
    if table.ndim != 2 or len(table) != 3:
        raise ValueError(
            f"Expected a histogram of shape (3, n_bins) from `calibration_histogram`, got "
            f"{table.shape}."
        )
    counts, confidences, correct = table
    if counts.sum() == 0:
        raise ValueError(f"The histogram is empty: no item had a label other than {IGNORED}.")
    # |B|/n · |acc(B) - conf(B)|, with the |B| of the means cancelled.
    return float(np.abs(correct - confidences).sum() / counts.sum())


def calibration_error(
    scores: ArrayLike, labels: ArrayLike, n_bins: int = 15, from_logits: bool = True
) -> float:
    r"""Expected calibration error: the gap of confidence and accuracy, over bins of confidence.

    .. math::
        \sum_{m=1}^{M} \frac{\lvert B_m \rvert}{N}
        \left\lvert acc(B_m) - conf(B_m) \right\rvert

    Add up [`calibration_histogram`] where the items come in batches.

    Reference:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", Eq. 3, arXiv:1706.04599.

    Args:
        scores: Logits of each class, or probabilities with `from_logits=False`.
        labels: The right classes; -100 does not count.
        n_bins: Number of bins of equal width.
        from_logits: Whether the scores go through a softmax first.

    Shape:
        - scores: (N, C) or (N, L, C); labels: without the C.

    Returns:
        From 0 (calibrated) to 1.

    Raises:
        ValueError: If the shapes do not fit, no item counts, or the scores are probabilities where
            logits are expected, or the reverse.

    Example:
        >>> calibration_error([[0.75, 0.25]], [0], from_logits=False)
        0.25
    """
    rows = _scores(scores, "logits" if from_logits else "probabilities")
    if from_logits:
        if rows.size and _are_probabilities(rows):
            raise ValueError(
                "Expected logits, got rows from 0 to 1 with sum 1. A softmax over probabilities "
                "would flatten them: pass `from_logits=False`."
            )
        rows = np.exp(log_softmax(rows))
    return calibration_error_from(calibration_histogram(rows, labels, n_bins))


def retained_share(student_score: float, teacher_score: float) -> float:
    """The student's score as a share of its teacher's ("retains 97% of the performance").

    Reference:
        Sanh et al. 2019, "DistilBERT", Table 1, arXiv:1910.01108.

    Args:
        student_score: A score from 0, where higher is better, such as an accuracy.
        teacher_score: The teacher's, on the same data.

    Returns:
        1 if the student is as good as its teacher.

    Raises:
        ValueError: If the teacher's score is not positive.

    Example:
        >>> retained_share(0.75, 0.8)
        0.9375
    """
    if not (np.isfinite(student_score) and np.isfinite(teacher_score) and teacher_score > 0):
        raise ValueError(
            f"Expected finite scores and a positive one of the teacher, got {student_score} and "
            f"{teacher_score}. Use a score where higher is better, such as an accuracy."
        )
    return float(student_score / teacher_score)
