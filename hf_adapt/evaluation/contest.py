"""The items on which candidates disagree, and what labels of some of them say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from hf_adapt.engine.labels import IGNORED
from hf_adapt.evaluation.arrays import Array, Floats

UNTOLD = -1
"""The label of an item that nobody could tell the class of."""
LEAST_LABELS = 5
"""Fewer labels do not decide, unless the candidates disagree on fewer items."""

Classes = NDArray[np.int64]


class Contest:
    """Where candidates disagree, and whether labels of some of these items may decide.

    They may if they are a random sample of them. All labelling goes through the items in one random
    order, whoever the candidates are, and labels count that leave none of the contested items out.
    So they stay a random sample when a candidate is taken away, and when one comes are none until
    the items that it adds are labelled too: where two others disagree each is often wrong, and a
    newcomer would seem better than both.

    Args:
        classes: The predicted classes of each candidate.
        keys: The items' keys; of equal items the first counts.
        labels: Those that are known, see [`as_labels`].
        labels_are_random: Whether they are of items that were drawn at random from all.

    Attributes:
        items: The numbers of the contested items, in the order in which they are labelled.
        total: How many items there are.
        sample: The numbers of those whose labels decide; none if they may not.
        problem: Why not, if there are labels.
    """

    def __init__(
        self,
        classes: Mapping[str, Classes],
        keys: torch.Tensor,
        labels: Classes,
        labels_are_random: bool = False,
    ) -> None:
        self.classes, self.labels = classes, labels
        distinct = np.zeros(len(keys), dtype=bool)
        distinct[np.unique(keys.numpy(), return_index=True)[1]] = True
        self.total = int(distinct.sum())
        given = np.stack([*classes.values()])
        order = label_order(len(keys))
        self.items: Classes = order[(distinct & (given != given[0]).any(0))[order]]
        asked = labels[self.items]
        known = np.flatnonzero(asked >= 0)
        self.sample = self.items[known]
        self.problem = ""
        count = int((labels >= 0).sum())
        if not labels_are_random and len(known) and (asked[: known[-1]] == IGNORED).any():
            self.problem = (
                f"The {count} labels decide nothing yet: they leave out items on which these "
                "candidates disagree, with which to_label begins."
            )
        elif count and len(known) < min(LEAST_LABELS, max(1, (asked != UNTOLD).sum())):
            self.problem = (
                f"The {count} labels decide nothing: {len(known)} of them are of items on which "
                "these candidates disagree."
            )
        if self.problem:
            self.sample = self.items[:0]

    @property
    def to_label(self) -> tuple[int, ...]:
        """The numbers of the contested items without a label, in the order to ask for them."""
        return tuple(self.items[self.labels[self.items] == IGNORED].tolist())

    def right(self, name: str) -> Floats:
        """1 for each item of the sample that a candidate has right, 0 for the others."""
        found = self.classes[name][self.sample] == self.labels[self.sample]
        return np.asarray(found, dtype=np.float64)

    def gain(self, differences: Floats) -> tuple[float, float]:
        """An interval of 95 % for what one candidate is better than another on all items.

        Args:
            differences: What it is better on each item of the sample: 1, 0 or -1.

        Reference:
            Agresti & Min 2005, "Simple improved confidence intervals for comparing matched
            proportions", Statistics in Medicine 24.
            Deviation: with the correction for a finite population, and Bonferroni's for the best of
            several.
        """
        share = len(self.items) / self.total
        return interval(differences, len(self.items), share, len(self.classes) - 1)


def interval(differences: Floats, contested: int, share: float, others: int) -> tuple[float, float]:
    """See [`Contest.gain`]; one number twice where every contested item has a label."""
    count = len(differences)
    if count == contested:
        return (float(differences.mean()) * share,) * 2
    wins, losses = (float((sign * differences > 0).sum()) + 0.5 for sign in (1, -1))
    size = count + 2
    middle = (wins - losses) / size
    error = math.sqrt((wins + losses - (wins - losses) ** 2 / size) * (1 - count / contested))
    width = NormalDist().inv_cdf(1 - 0.025 / others) * error / size
    return max(-1.0, middle - width) * share, min(1.0, middle + width) * share


def label_order(count: int) -> Classes:
    """The order in which so many items are labelled."""
    return np.random.default_rng(0).permutation(count)


def as_labels(given: Array | None, count: int, classes: int) -> Classes:
    """Labels of so many items; -100 where there is none, -1 where nobody could tell.

    Raises:
        ValueError: If they are not.
    """
    if given is None:
        return np.full(count, IGNORED)
    labels = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given)
    whole = np.full(0, IGNORED)
    if labels.ndim == 1 and labels.dtype.kind in "iufb" and (abs(labels) < 2**31).all():
        whole = labels.astype(np.int64)
    fits = len(whole) == count and ((whole == labels) & (whole < classes)).all()
    if not (fits and ((whole >= UNTOLD) | (whole == IGNORED)).all()):
        raise ValueError(
            f"Expected target_labels from 0 to {classes - 1} for the candidates' {count} target "
            f"items, in their order, {IGNORED} where there is none and {UNTOLD} where nobody could "
            f"tell; got an array of shape {labels.shape}, {str(labels.ravel()[:5])[:80]} …"
        )
    return whole


def agreed_labels(labels: Iterable[tuple[int, int]]) -> tuple[dict[int, int], set[int]]:
    """The labels of keys by the keys, and the keys that have been given several.

    Example:
        >>> agreed_labels([(7, 0), (8, 1), (7, 0), (8, 0), (9, 1), (9, -1)])
        ({7: 0, 9: 1}, {8})
    """
    known: dict[int, int] = {}
    disputed = set()
    for key, label in labels:
        before = known.setdefault(key, label)
        if before == UNTOLD:
            known[key] = label
        elif label not in (before, UNTOLD):
            disputed.add(key)
    return {key: label for key, label in known.items() if key not in disputed}, disputed


def aligned_labels(known: Mapping[int, int], keys: torch.Tensor) -> Classes:
    """Labels in the order of items with these keys, -100 where there is none."""
    return np.array([known.get(key, IGNORED) for key in keys.tolist()], dtype=np.int64)
