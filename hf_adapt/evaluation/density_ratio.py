"""How much more probable source items are in the target: the weights behind IWV and DEV."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_adapt.evaluation.arrays import Array, Floats, as_array, as_features
from hf_adapt.evaluation.linear_models import logistic_regression

LEAST_EFFECTIVE_SIZE = 30
"""Fewer items than this say too little of the others."""


class UntrustedWeights(ValueError):
    """The weights leave too few items; `size` says how many."""

    def __init__(self, size: float, count: int, least: float) -> None:
        super().__init__(
            f"The effective sample size is {size:.1f} of {count} source items, and at least "
            f"{least:g} are needed: almost no source item looks like the target's. Do not trust "
            "importance weighting here; label fifty target rows instead."
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
    Weights over a quantile are cut there.

    Reference:
        Bickel et al. 2009, "Discriminative Learning Under Covariate Shift", JMLR 10, section 4.
        Deviation: cross-fitted and cut.

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
    odds, _ = domain_log_odds(source_features, target_features, folds)
    return weights_of(odds, len(target_features) / len(odds), clip, normalize)  # type: ignore[arg-type]


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
    error = ((source_odds > 0).mean() + (target_odds <= 0).mean()) / 2
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
    return float(array.sum() ** 2 / np.square(array).sum())


def trusted_weights(
    source_features: Array,
    target_features: Array,
    least: float = LEAST_EFFECTIVE_SIZE,
    normalize: bool = True,
) -> Floats:
    """The weights of [`density_ratio`], if they leave enough items.

    Raises:
        UntrustedWeights: If the effective sample size is below `least`.
    """
    weights = density_ratio(source_features, target_features, normalize=normalize)
    size = effective_sample_size(weights)
    if size < least:
        raise UntrustedWeights(size, len(weights), least)
    return weights
