"""A logistic regression on standardised features: the probe of several validators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hf_adapt.evaluation.arrays import extra

Scores = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""Scores of each class, (N, C), of features (N, D): logits."""


def logistic_regression(
    features: NDArray[np.float32], classes: NDArray[np.int64], strength: float = 1e-3
) -> Scores:
    """Fit a multinomial logistic regression with an L2 penalty.

    Features are standardised, and divided by √D, so that one penalty fits every width.

    Args:
        features: (N, D).
        classes: (N,), of at least two classes.
        strength: The penalty, as a share: strength · ‖W‖² / 2 beside the mean cross-entropy.
    """
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-6, scale, 1.0) * np.sqrt(features.shape[1])

    def standardised(given: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray((given - mean) / scale, dtype=np.float32)

    model = extra("sklearn.linear_model").LogisticRegression(
        C=1 / (strength * len(features)), max_iter=200, tol=1e-3
    )
    model.fit(standardised(features), classes)

    def scores(given: NDArray[np.float32]) -> NDArray[np.float64]:
        found = np.asarray(model.decision_function(standardised(given)), dtype=np.float64)
        return np.stack([-found / 2, found / 2], 1) if found.ndim == 1 else found

    return scores
