"""Features of two runs on the same two axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_adapt.evaluation.scores import strided
from hf_adapt.experiments.outputs import RunOutputs

MOST_POINTS = 150
"""Rows of each domain in a plot."""

View = dict[str, NDArray[Any]]
"""Points (N, 2), and the domain and the predicted class of each."""


def projected(before: RunOutputs, after: RunOutputs) -> tuple[View, View] | None:
    """The features of two runs on the first two principal components of both together.

    They are those of held-out source rows and of unlabelled target rows, in equal numbers; labels
    play no part.

    Returns:
        The views of the two; None if one lacks rows of a domain, or their features differ in size.
    """
    from sklearn.decomposition import PCA

    found = [_items(outputs) for outputs in (before, after)]
    if any(each is None for each in found):
        return None
    (first, first_view), (second, second_view) = found  # type: ignore[misc]
    both = np.concatenate([first, second]) if first.shape[1] == second.shape[1] else first
    if first.shape[1] != second.shape[1] or min(both.shape) < 2 or not np.isfinite(both).all():
        return None
    components = PCA(2, svd_solver="covariance_eigh").fit(both)
    return (
        {**first_view, "points": components.transform(first)},
        {**second_view, "points": components.transform(second)},
    )


def _items(outputs: RunOutputs) -> tuple[NDArray[Any], View] | None:
    source, target = outputs.source_dev or outputs.source_test, outputs.target_unlabelled
    if source is None or target is None:
        return None
    most = min(MOST_POINTS, len(source), len(target))
    sides = [strided(source, most), strided(target, most)]
    features = np.concatenate([side.features.double().numpy() for side in sides])
    view = {
        "domain": np.repeat([0, 1], most),
        "predicted class": np.concatenate([side.logits.argmax(1).numpy() for side in sides]),
    }
    return features, view
