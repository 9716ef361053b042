"""An estimate of a model's accuracy on the target, without target labels, with an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from hf_adapt.evaluation.arrays import (
    Array,
    Floats,
    as_classes,
    as_features,
    as_logits,
    log_softmax,
    softmax,
)
from hf_adapt.evaluation.calibration import fitted_temperature
from hf_adapt.evaluation.collapsed import collapse
from hf_adapt.evaluation.importance_weights import DomainWeights

Method = Literal["atc", "doc", "iwv"]

FEWEST_ITEMS = 50
"""Of source and of target, for an estimate that can be trusted."""


@dataclass(frozen=True)
class AccuracyEstimate:
    """An estimated accuracy.

    Args:
        value: The estimate, from 0 to 1.
        low: Lower end of the interval.
        high: Upper end.
        method: How it was made.
        warnings: Why it cannot be trusted; empty if nothing speaks against it.
        effective_sample_size: What the weighted source items are worth, with `"iwv"`.
    """

    value: float
    low: float
    high: float
    method: str
    warnings: Sequence[str] = field(default_factory=tuple)
    effective_sample_size: float | None = None

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.warnings

    def __str__(self) -> str:
        text = f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, {self.method.upper()})"
        return text if self.trusted else f"{text}; not to be trusted: {' '.join(self.warnings)}"


def estimate_accuracy(
    source_logits: Array,
    source_labels: Array,
    target_logits: Array,
    *,
    method: Method = "atc",
    source_features: Array | None = None,
    target_features: Array | None = None,
    source_classes: Sequence[Any] | None = None,
    target_classes: Sequence[Any] | None = None,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> AccuracyEstimate:
    r"""Estimate a model's accuracy on unlabelled target items from held-out source items.

    - `"atc"`: the share of target items above the threshold of confidence under which the share of
      source items is the source's error, after temperature scaling.
    - `"doc"`: the source's accuracy less the drop of the mean confidence.
    - `"iwv"`: the source's accuracy weighted by [`density_ratio`]; it needs the features.

    The interval is a bootstrap over the items of both. It does not hold what no such method can
    see: that the same text has another label in the target. Never rank models by it: a model that
    is sure of everything has a high estimate; [`choose`][hf_adapt.evaluation.choose] ranks.

    Reference:
        Garg et al. 2022, "Leveraging Unlabeled Data to Predict Out-of-Distribution Performance"
        (ATC), arXiv:2201.04234; Guillory et al. 2021, "Predicting with Confidence on Unseen
        Distributions" (DoC), arXiv:2107.03315.

    Args:
        source_logits: Scores for source items that were not trained on.
        source_labels: Their labels.
        target_logits: Scores for target items.
        method: `"atc"`, `"doc"` or `"iwv"`.
        source_features: Features of the source items, for `"iwv"`.
        target_features: Features of the target items, for `"iwv"`; for the others they show whether
            the model has collapsed to a point.
        source_classes: The names of the source's classes.
        target_classes: The names of the classes that the target is known to have.
        confidence: Of the interval.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Shape:
        - source_logits: (N, C); source_labels: (N,); target_logits: (M, C); features: (N, D) and
          (M, D).

    Raises:
        ValueError: If the shapes do not fit, or the features are missing.

    Example:
        >>> source, labels = [[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]], [0, 1, 1]
        >>> estimate = estimate_accuracy(source, labels, [[3.0, 0.0], [0.5, 0.0]])
        >>> estimate.value, estimate.trusted
        (0.5, False)
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is unknown: use {', '.join(get_args(Method))}.")
    source = as_logits(source_logits, "source_logits")
    target = as_logits(target_logits, "target_logits")
    classes = source.shape[1]
    if target.shape[1] != classes:
        raise ValueError(
            f"The source's logits have {classes} classes and the target's {target.shape[1]}: an "
            "estimate needs one model, with the same classes, for both."
        )
    labels = as_classes(source_labels, "source_labels", len(source), classes)
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1.")
    if source_features is not None:
        source_features = as_features(source_features, "source_features", len(source))
    if target_features is not None:
        target_features = as_features(target_features, "target_features", len(target))
    warnings = _warnings(source, labels, target, source_classes, target_classes)
    if (reason := collapse(target, target_features)) is not None:
        warnings.append(f"The model has collapsed: {reason}.")
    size = None
    right = (source.argmax(1) == labels).astype(np.float64)
    if method == "iwv":
        if source_features is None or target_features is None:
            raise ValueError(
                'method="iwv" weights source items by their features: pass source_features= and '
                "target_features=."
            )
        domains = DomainWeights(source_features, target_features)
        size = domains.effective_size
        if domains.problem is not None:
            warnings.append(str(domains.problem))
        items, others, compute = np.stack([domains.weights(), right], 1), np.zeros(1), _weighted
    else:
        temperature = fitted_temperature(source, labels)
        measure = _negative_entropy if method == "atc" else _confidence
        items = np.stack([measure(source / temperature), right], 1)
        others = measure(target / temperature)
        compute = _threshold_share if method == "atc" else _less_the_drop
    low, high = _bootstrap(compute, items, others, confidence, resamples, seed)
    value = compute(items, others)
    return AccuracyEstimate(value, min(low, value), max(high, value), method, tuple(warnings), size)


def _warnings(
    source: Floats,
    labels: np.ndarray,
    target: Floats,
    source_classes: Sequence[Any] | None,
    target_classes: Sequence[Any] | None,
) -> list[str]:
    """What speaks against any estimate."""
    found = []
    if source_classes is not None and target_classes is not None:
        if unknown := sorted({*map(str, target_classes)} - {*map(str, source_classes)}):
            found.append(
                f"The target has classes that the model does not know ({', '.join(unknown)}): its "
                "items of them are wrong however sure it is."
            )
        if missing := sorted({*map(str, source_classes)} - {*map(str, target_classes)}):
            found.append(
                f"The target lacks classes of the source ({', '.join(missing)}): confidence on the "
                "source says less of it."
            )
    for name, logits in (("source", source), ("target", target)):
        if len(logits) < FEWEST_ITEMS:
            found.append(f"There are {len(logits)} {name} items; {FEWEST_ITEMS} are few.")
    absent = [n for n in range(source.shape[1]) if not (labels == n).any()]
    if absent:
        found.append(f"The source has no held-out item of the classes {absent}.")
    return found


def _negative_entropy(logits: Floats) -> Floats:
    logs = log_softmax(logits)
    return np.asarray((np.exp(logs) * logs).sum(1))


def _confidence(logits: Floats) -> Floats:
    return np.asarray(softmax(logits).max(1))


def _threshold_share(items: Floats, others: Floats) -> float:
    """ATC, of (score, right) of source items and the scores of target items."""
    scores, right = items[:, 0], items[:, 1]
    wrong = round((1 - right.mean()) * len(right))
    if wrong == len(scores):
        return 0.0
    threshold = np.sort(scores)[wrong]
    # Of source items at the threshold itself some count as wrong: of target items the same share.
    tied = (scores == threshold).sum()
    kept = (tied - (wrong - (scores < threshold).sum())) / tied
    return float((others > threshold).mean() + kept * (others == threshold).mean())


def _less_the_drop(items: Floats, others: Floats) -> float:
    """DoC, of (confidence, right) of source items and the confidences of target items."""
    drop = items[:, 0].mean() - others.mean()
    return float(np.clip(items[:, 1].mean() - drop, 0.0, 1.0))


def _weighted(items: Floats, others: Floats) -> float:
    """The weighted share of right items, of (weight, right)."""
    return float((items[:, 0] * items[:, 1]).sum() / items[:, 0].sum())


def _bootstrap(
    compute: Callable[[Floats, Floats], float],
    items: Floats,
    others: Floats,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """A percentile interval over both sets of items."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, such as 0.95.")
    random = np.random.default_rng(seed)
    values = [
        compute(
            items[random.integers(len(items), size=len(items))],
            others[random.integers(len(others), size=len(others))],
        )
        for _ in range(resamples)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
