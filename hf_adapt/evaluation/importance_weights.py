"""How much more probable source items are in the target: the weights behind IWV and DEV."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_adapt.evaluation.arrays import Array, Floats, as_array, as_features
from hf_adapt.evaluation.linear_models import logistic_regression

LEAST_EFFECTIVE_SIZE = 30
"""Fewer items than this say too little of the others."""


NO_OVERLAP = 1.95
"""The proxy A-distance from which domains do not overlap: one error in 80 items."""


class UntrustedWeights(ValueError):
    """The weights say nothing; `size` is their effective sample size."""

    def __init__(self, size: float, count: int, distance: float) -> None:
        problem = f"the effective sample size is {size:.1f} of {count} source items"
        if size >= LEAST_EFFECTIVE_SIZE:
            problem = f"the domains do not overlap (a proxy A-distance of {distance:.2f} of 2)"
        super().__init__(
            f"Importance weights cannot be trusted: {problem}, and at least "
            f"{LEAST_EFFECTIVE_SIZE} source items must look like the target's. Use a validator "
            "without weights, or label fifty target rows."
        )
        self.size = size


def density_ratio(
    source_features: Array,
    target_features: Array,
    folds: int = 5,
    clip: float = 0.99,
    normalize: bool = True,
) -> Floats:
    r"""Importance weights of source items, by a classifier of the domains.

    .. math::
        w_i = \frac{N_s}{N_t} \frac{d(x_i)}{1 - d(x_i)}

    d is a logistic regression's probability of the target. Each item's is that of a classifier that
    has not seen it, since one with more features than items knows by heart where each one is from.
    Weights over a quantile are cut there. The regression's penalty flattens them: between domains
    that a classifier tells apart, exact ones would leave the weight to a few items.

    Reference:
        Bickel et al. 2009, "Discriminative Learning Under Covariate Shift", JMLR 10, section 4.
        Deviation: cross-fitted, flattened as in Sugiyama et al. 2007, JMLR 8, and cut.

    Args:
        source_features: Features of held-out source items.
        target_features: Features of target items.
        folds: Number of parts, of which each is predicted from the others.
        clip: The quantile of the weights over which they are cut.
        normalize: Divide them by their mean, which is 1 in theory.

    Shape:
        - source_features: (N, D); target_features: (M, D); output: (N,), unitless.

    Raises:
        ValueError: If the shapes do not fit or there are fewer items than folds.
    """
    odds, target_odds = domain_log_odds(source_features, target_features, folds)
    return weights_of(odds, len(target_odds) / len(odds), clip, normalize)


def domain_log_odds(
    source_features: Array, target_features: Array, folds: int = 5
) -> tuple[Floats, Floats]:
    """The log-odds of the target that a classifier of the domains gives, cross-fitted.

    Returns:
        Those of the source items, (N,), and of the target items, (M,).

    Raises:
        ValueError: If the shapes do not fit or there are fewer items than folds.
    """
    source = as_features(source_features, "source_features")
    target = as_features(target_features, "target_features")
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            f"Expected features of one width, got {source.shape[1]} for the source and "
            f"{target.shape[1]} for the target. Take both from the same layer."
        )
    if min(len(source), len(target)) < folds:
        raise ValueError(
            f"Expected at least {folds} items of each domain, got {len(source)} and {len(target)}."
        )
    both = np.concatenate([source, target])
    is_target = np.repeat([0, 1], [len(source), len(target)])
    # In turn, so that each domain is in every fold.
    fold = np.concatenate([np.arange(len(source)) % folds, np.arange(len(target)) % folds])
    odds = np.empty(len(both))
    for number in range(folds):
        held_out = fold == number
        scores = logistic_regression(both[~held_out], is_target[~held_out])(both[held_out])
        odds[held_out] = scores[:, 1] - scores[:, 0]
    return odds[: len(source)], odds[len(source) :]


def weights_of(
    source_odds: Floats, target_per_source: float, clip: float = 0.99, normalize: bool = True
) -> Floats:
    """The weights of source items with these log-odds: see [`density_ratio`]."""
    logs = source_odds - np.log(target_per_source)
    logs = np.minimum(logs, np.quantile(logs, clip))
    weights: Floats = np.exp(logs - logs.max() * normalize)  # no overflow
    return np.asarray(weights / weights.mean()) if normalize else weights


def proxy_a_distance(source_features: Array, target_features: Array) -> float:
    r"""How well a linear classifier tells the domains apart, 2(1 - 2e) with its balanced error e.

    Reference:
        Ben-David et al. 2006, "Analysis of Representations for Domain Adaptation", NeurIPS.
        Deviation: a cross-fitted logistic regression.

    Args:
        source_features: Features of source items.
        target_features: Features of target items.

    Shape:
        - (N, D) and (M, D).

    Returns:
        From 0 (alike; by chance a little below) to 2 (no error).

    Example:
        >>> import numpy as np
        >>> left, right = np.arange(10.0)[:, None], np.arange(10.0)[:, None] + 100
        >>> proxy_a_distance(left, right)
        2.0
    """
    return a_distance_of(*domain_log_odds(source_features, target_features))


def a_distance_of(source_odds: Floats, target_odds: Floats) -> float:
    """The proxy A-distance of the log-odds of [`domain_log_odds`]."""
    # The classifier has learnt how many items there are of each; balanced, there are as many.
    even = np.log(len(target_odds) / len(source_odds))
    error = ((source_odds > even).mean() + (target_odds <= even).mean()) / 2
    return float(2 * (1 - 2 * error))


def effective_sample_size(weights: Array) -> float:
    r"""How many equally weighted items are worth as much as these.

    .. math::
        \frac{(\sum_i w_i)^2}{\sum_i w_i^2}

    Reference:
        Kish 1965, "Survey Sampling".

    Example:
        >>> effective_sample_size([1.0, 1.0, 1.0, 1.0]), effective_sample_size([1.0, 0.0])
        (4.0, 1.0)
    """
    array: NDArray[np.float64] = as_array(weights, "weights", 1).astype(np.float64)
    if (array < 0).any() or not array.any():
        raise ValueError("Expected weights of 0 or more that are not all 0.")
    return float(array.sum() ** 2 / np.square(array).sum())


class DomainWeights:
    """The importance weights of source items, and whether they can be trusted.

    Args:
        source_features: Features of held-out source items.
        target_features: Features of target items.

    Attributes:
        effective_size: Their effective sample size.
        distance: The proxy A-distance of the domains.
    """

    def __init__(self, source_features: Array, target_features: Array) -> None:
        self._odds, target_odds = domain_log_odds(source_features, target_features)
        self._ratio = len(target_odds) / len(self._odds)
        self.distance = a_distance_of(self._odds, target_odds)
        self.effective_size = effective_sample_size(self.weights())

    def weights(self, normalize: bool = True) -> Floats:
        """The weights, (N,): see [`density_ratio`]."""
        return weights_of(self._odds, self._ratio, normalize=normalize)

    @property
    def problem(self) -> UntrustedWeights | None:
        """Why they cannot be trusted, if they cannot."""
        if self.effective_size < LEAST_EFFECTIVE_SIZE or self.distance > NO_OVERLAP:
            return UntrustedWeights(self.effective_size, len(self._odds), self.distance)
        return None

    def trusted(self, normalize: bool = True) -> Floats:
        """The weights.

        Raises:
            UntrustedWeights: If the effective sample size is below 30, or the domains do not
                overlap.
        """
        if (problem := self.problem) is not None:
            raise problem
        return self.weights(normalize)
