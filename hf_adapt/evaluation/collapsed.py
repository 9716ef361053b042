"""Models that have collapsed: one class for everything, or all features at a point."""

from __future__ import annotations

import numpy as np

from hf_adapt.evaluation.arrays import Array, as_features, as_logits, as_prior

ONE_CLASS = 0.99
"""Share of one predicted class from which the others count as lost."""
SPREAD = 1e-3
"""Variance of the features, as a share of their mean square, under which they lie at a point."""


def collapse(
    target_logits: Array, target_features: Array | None = None, prior: Array | None = None
) -> str | None:
    """Whether and how a model has collapsed on the target.

    Args:
        target_logits: Scores of each class.
        target_features: Features.
        prior: The target's class frequencies, if they are known; one class may be that frequent.

    Shape:
        - target_logits: (M, C); target_features: (M, D); prior: (C,).

    Returns:
        What has happened, in words; None if nothing has.

    Example:
        >>> collapse([[1.0, 0.0]] * 10)
        'every target item is given class 0'
    """
    logits = as_logits(target_logits, "target_logits")
    shares = np.bincount(logits.argmax(1), minlength=logits.shape[1]) / len(logits)
    largest = int(shares.argmax())
    expected = 0.0 if prior is None else float(as_prior(prior, logits.shape[1])[largest])
    if shares[largest] > max(ONE_CLASS, expected + (1 - expected) / 2):
        share = (
            "every target item" if shares[largest] == 1 else f"{shares[largest]:.1%} of the target"
        )
        return f"{share} is given class {largest}"
    if target_features is not None:
        features = as_features(target_features, "target_features", len(logits)).astype(np.float64)
        square = float(np.square(features).sum(1).mean())
        if square == 0 or float(features.var(0).sum()) < SPREAD * square:
            return "all target features lie at one point"
    return None
