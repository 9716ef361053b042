"""Whether items that were alike before training are given the same class."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hf_adapt.evaluation.arrays import Array, Floats, as_array, as_classes, as_features, as_logits


class Neighborhoods:
    """The nearest neighbours of target items in features that no candidate has trained.

    Args:
        reference_features: Features of the items, of the model before any training.
        num_neighbors: K, the item itself left out; by default a quarter of the items that a class
            has on average. Of 480 items 60 told good models from bad ones where 10 did not.
        num_classes: C, for the default.
        max_items: So many items are looked at most, spread evenly; their neighbours are among all.
        block: How many of them are compared at once.

    Shape:
        - reference_features: (N, D).

    Raises:
        ValueError: If there are not more items than neighbours.

    Example:
        >>> near = Neighborhoods([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]], num_neighbors=1)
        >>> near.agreement([0, 0, 1, 1]), near.agreement([0, 1, 0, 1])
        (1.0, -1.0)
    """

    def __init__(
        self,
        reference_features: Array,
        num_neighbors: int | None = None,
        num_classes: int = 2,
        max_items: int = 5000,
        block: int = 512,
    ) -> None:
        features = torch.from_numpy(as_features(reference_features, "reference_features"))
        if num_neighbors is None:
            num_neighbors = min(max(10, len(features) // (4 * num_classes)), len(features) - 1)
        if not 1 <= num_neighbors < len(features):
            raise ValueError(
                f"Expected more items than neighbours (num_neighbors={num_neighbors}), got "
                f"{len(features)} items."
            )
        self.count = len(features)
        unit = torch.nn.functional.normalize(features - features.mean(0))
        number = min(max_items, len(unit))
        self._items = torch.linspace(0, len(unit) - 1, number).long()
        found = []
        for start in range(0, number, block):
            items = self._items[start : start + block]
            similarity = unit[items] @ unit.T
            similarity[torch.arange(len(items)), items] = -torch.inf
            found.append(similarity.topk(num_neighbors, dim=1).indices.int())
        self._neighbors = torch.cat(found)

    def agreement(self, predictions: Array) -> float:
        r"""How much more often than by chance an item has the class of its neighbours.

        .. math::
            \frac{a - \sum_c s_c^2}{1 - \sum_c s_c^2}

        a is the share of pairs of an item and a neighbour that are given the same class, s_c the
        share of class c. Chance is taken away, so that giving everything one class earns nothing.

        Args:
            predictions: Predicted classes, or logits.

        Shape:
            - predictions: (N,) or (N, C).

        Returns:
            1 for perfect agreement, 0 for chance, and for a single class.
        """
        return float(self.agreements(predictions).mean())

    def agreements(self, predictions: Array) -> Floats:
        """The same for each item that is looked at, (min(N, max_items),); their mean is it."""
        if np.ndim(predictions) == 2:
            predictions = as_logits(predictions).argmax(1)
        classes: NDArray[np.int64] = as_classes(predictions, "predictions", self.count)
        shares = np.bincount(classes) / len(classes)
        chance = float(np.square(shares).sum())
        if chance == 1:
            return np.zeros(len(self._items))
        same = classes[self._neighbors.numpy()] == classes[self._items.numpy()][:, None]
        return np.asarray((same.mean(1) - chance) / (1 - chance))


def neighbor_agreement(
    predictions: Array,
    reference_features: Array,
    num_neighbors: int | None = None,
    num_classes: int | None = None,
) -> float:
    """Whether target items that were alike before training are given the same class.

    The features are those of the model before training (or of any other encoder): a view of the
    items that no candidate has bent to its own predictions. Compare several candidates with one
    [`Neighborhoods`]. It says little where the encoder knows little of the task.

    Args:
        predictions: Predicted classes of target items, or logits.
        reference_features: Their features before training.
        num_neighbors: K, by default a quarter of the items that a class has on average.
        num_classes: C, for the default; that of the logits, or of the predictions, if not given.

    Shape:
        - predictions: (N,) or (N, C); reference_features: (N, D).

    Returns:
        1 for perfect agreement, 0 for chance.
    """
    if num_classes is None:
        ndim = min(max(np.ndim(predictions), 1), 2)
        given = as_array(predictions, "predictions", ndim)
        num_classes = given.shape[1] if ndim == 2 else max(2, 1 + int(given.max()))
    return Neighborhoods(reference_features, num_neighbors, num_classes).agreement(predictions)
