"""Which source rows helped on the target: the influence of each on the target's predictions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_adapt.engine.labels import IGNORED
from hf_adapt.evaluation.arrays import (
    Array,
    Floats,
    as_array,
    as_classes,
    as_features,
    as_logits,
    softmax,
)


def source_influence(
    source_features: Array,
    source_logits: Array,
    source_labels: Array,
    target_features: Array,
    target_logits: Array,
    target_predictions: Array | None = None,
    *,
    confident_share: float = 0.5,
    bias: bool = True,
) -> Floats:
    r"""How much a step on each source row lowers the target's loss: positive rows help it.

    TracIn at one checkpoint, of the last layer alone. For a linear layer the gradient of the
    cross-entropy is \((p - y) \otimes f\), so the mean over the target rows is one matrix:

    .. math::
        I_i = \Big\langle (p_i - y_i) \otimes [f_i, 1], \;
            \frac{1}{M} \sum_j (p_j - \hat y_j) \otimes [f_j, 1] \Big\rangle

    Look at the lowest rows first: mislabelled rows, and those whose like has another label in the
    target, are among them. A row that is fitted well has an influence near 0, whatever it taught.
    Rows that have misled the model just where the target is agree with its pseudo-labels and stay
    hidden; a few labelled target rows, as `target_predictions`, find them.

    Reference:
        Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient Descent",
        arXiv:2002.08484, section 3 (TracInCP). Deviation: one checkpoint, the last layer alone, and
        pseudo-labels of the target rows that the model is most sure of.

    Args:
        source_features: The input of the last linear layer, for each source row: for BERT,
            `collect_items(trainer, rows, feature_layer="bert.pooler")`. Where they are pooled
            otherwise than the head pools them, or it has more layers, the values are an
            approximation.
        source_logits: What the model gives for them.
        source_labels: Their labels.
        target_features: The same of the target rows.
        target_logits: What the model gives for them.
        target_predictions: Pseudo-labels of another source; rows with -100 do not count. By default
            the model's own, of the rows that it is most sure of.
        confident_share: The share of the target rows that count as sure.
        bias: Whether the layer has a bias.

    Shape:
        - features: (N, D) and (M, D); logits: (N, C) and (M, C); source_labels: (N,);
          target_predictions: (M,); output: (N,), in the loss's unit per unit of learning rate.

    Raises:
        ValueError: If the shapes do not fit, or no target row counts.

    Example:
        >>> features, logits = [[1.0], [1.0]], [[0.0, 0.0], [0.0, 0.0]]
        >>> source_influence(features, logits, [0, 1], [[2.0]], [[1.0, 0.0]]).round(3).tolist()
        [0.807, -0.807]
    """
    source, target = (
        as_features(source_features, "source_features"),
        as_features(target_features, "target_features"),
    )
    source_scores = as_logits(source_logits, "source_logits")
    target_scores = as_logits(target_logits, "target_logits")
    if (source.shape[1], source_scores.shape[1]) != (target.shape[1], target_scores.shape[1]):
        raise ValueError(
            f"Expected features and logits of one model, got {source.shape[1]} features and "
            f"{source_scores.shape[1]} classes for the source, {target.shape[1]} and "
            f"{target_scores.shape[1]} for the target."
        )
    for name, rows, scores in (
        ("source", source, source_scores),
        ("target", target, target_scores),
    ):
        if len(rows) != len(scores):
            raise ValueError(
                f"Expected {name}_logits for each of the {len(rows)} rows of {name}_features, got "
                f"{len(scores)}."
            )
    if not 0 < confident_share <= 1:
        raise ValueError(f"confident_share={confident_share} must be over 0 and at most 1.")
    labels, counted = _pseudo_labels(target_scores, target_predictions, confident_share)
    wanted = _residuals(target_scores[counted], labels[counted], "target_predictions")
    weight = wanted.T @ target[counted] / len(wanted)  # the mean gradient, (C, D)
    residuals = _residuals(source_scores, source_labels, "source_labels")
    influence = np.einsum("nc,nc->n", residuals, source @ weight.T)
    return np.asarray(influence + residuals @ wanted.mean(0) * bias)


def _pseudo_labels(
    logits: Floats, given: Array | None, share: float
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The labels of the target rows, and which of them count."""
    if given is not None:
        labels = as_array(given, "target_predictions", 1)
        counted = labels != IGNORED
        if len(labels) != len(logits) or not counted.any():
            raise ValueError(
                f"Expected {len(logits)} target_predictions, at least one of them a class; got "
                f"{len(labels)}, {int(counted.sum())} of them classes."
            )
        return labels, counted
    counted = np.zeros(len(logits), dtype=bool)
    surest = np.argsort(-softmax(logits).max(1), kind="stable")
    counted[surest[: max(1, round(share * len(logits)))]] = True
    return logits.argmax(1), counted


def _residuals(logits: Floats, labels: Array, name: str) -> Floats:
    """The predicted probabilities less the labels, (N, C)."""
    residuals = softmax(logits)
    residuals[np.arange(len(logits)), as_classes(labels, name, len(logits), logits.shape[1])] -= 1
    return residuals
