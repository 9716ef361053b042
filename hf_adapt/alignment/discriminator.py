"""The discriminator of domains, and what its accuracy says of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_adapt.alignment.adversarial import perceptron

logger = logging.getLogger(__name__)

FEW_ITEMS = 400
"""Number of features from which a discriminator's accuracy is known to about five points."""


class DomainDiscriminator(nn.Sequential):
    """A multi-layer perceptron that scores the domain of a feature.

    Args:
        feature_size: Size D of a feature.
        num_domains: Number K of domains, the source included.
        hidden_sizes: Sizes of the hidden layers; empty for a linear discriminator.
        dropout: Probability of dropout after each hidden layer.

    Shape:
        - input: (N, D); output: (N, K) logits.

    Example:
        >>> import torch
        >>> DomainDiscriminator(8, 2, (16,))(torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        feature_size: int,
        num_domains: int = 2,
        hidden_sizes: Sequence[int] = (256,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(*perceptron(feature_size, hidden_sizes, num_domains, dropout))


class DiscriminatorWatch:
    """Warns, once each, where a discriminator gives the model no useful gradient.

    It judges accuracies over at least `FEW_ITEMS` features, so it is silent in the first steps and
    gathers small batches. What it has seen survives in the checkpoint.

    Args:
        name: The objective's name, under which `domain_accuracy` and `source_share` are logged.
        num_domains: Number of domains, the source included.
    """

    def __init__(self, name: str, num_domains: int = 2) -> None:
        self.name = name
        self.num_domains = num_domains
        self.best_margin = float("-inf")
        self.unjudged = [0.0, 0.0, 0.0]  # features; sums over them of accuracy and source share
        self.since_log = 0
        self.warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {
            "best_margin": self.best_margin,
            "unjudged": list(self.unjudged),
            "since_log": self.since_log,
            "warned": sorted(self.warned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`; older checkpoints hold less or nothing."""
        self.best_margin = state.get("best_margin", self.best_margin)
        self.unjudged = list(state.get("unjudged", self.unjudged))
        self.since_log = state.get("since_log", self.since_log)
        self.warned = set(state.get("warned", self.warned))

    def on_log(self, logs: Mapping[str, float], progress: float) -> None:
        """See the averages of a logging step."""
        accuracy = logs.get(f"{self.name}/domain_accuracy")
        source_share = logs.get(f"{self.name}/source_share")
        if accuracy is None or source_share is None:
            return
        if logs.get(f"{self.name}/module_gradient_norm") == 0:
            self._warn(
                "no gradient", "its discriminator gets no gradient (every gradient is exactly 0)"
            )
        items, self.since_log = self.since_log, 0
        new = (items, items * accuracy, items * source_share)
        self.unjudged = [x + y for x, y in zip(self.unjudged, new, strict=True)]
        if self.unjudged[0] >= FEW_ITEMS:  # else too few to tell the accuracy from chance
            count, hits, source = self.unjudged
            self.unjudged = [0.0, 0.0, 0.0]
            self._judge(hits / count, source / count, progress)

    def _judge(self, accuracy: float, source_share: float, progress: float) -> None:
        chance = max(source_share, (1 - source_share) / (self.num_domains - 1))
        self.best_margin = max(self.best_margin, accuracy - chance)
        if progress >= 0.3 and accuracy < chance - 0.2:
            self._warn(
                "outrun",
                f"its discriminator is worse than chance (accuracy {accuracy:.2f}, majority "
                f"{chance:.2f}): the model changes faster than it can learn. Try a lower weight "
                "or a higher learning_rate",
            )
        elif progress >= 0.3 and self.best_margin < 0.05:
            self._warn(
                "chance",
                f"its discriminator was at chance from the start (accuracy {accuracy:.2f}, "
                f"majority {chance:.2f}): the domains are alike at this layer, or its "
                "learning_rate is too low. Try another feature_layer or a higher learning_rate",
            )
        if progress >= 0.5 and accuracy > 0.99 and chance < 0.9:
            self._warn(
                "saturated",
                f"its discriminator is saturated (accuracy {accuracy:.3f} past half of training): "
                "the model does not hide the domain. Try a higher weight, a lower learning_rate "
                "or fewer frozen layers",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            logger.warning("%s: %s.", self.name, text)
