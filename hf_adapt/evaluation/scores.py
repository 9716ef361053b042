"""All validators of one model at once, from its outputs for both domains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F

from hf_adapt.engine.item_outputs import ItemOutputs
from hf_adapt.evaluation import validators
from hf_adapt.evaluation.arrays import Array, Floats
from hf_adapt.evaluation.estimates import AccuracyEstimate, Method, estimate_accuracy
from hf_adapt.evaluation.importance_weights import DomainWeights

VALIDATORS = (
    "entropy",
    "im",
    "nuclear_norm",
    "iwv",
    "dev",
    "circular",
    "class_ami",
    "snd",
    "class_balance",
)
"""The validators of one model, by the names of their metrics."""
NEED_SOURCE = ("iwv", "dev", "circular")
"""Those that need held-out source items with labels."""


class TargetScores:
    """The validators of a model, each computed when it is asked for; what they share, once.

    Args:
        source: Held-out source items with labels; None if there are none.
        target: Target items.
        prior: The target's class frequencies, if they are known.

    Attributes:
        problems: Why values could not be computed or trusted, each with the first that it stopped.
    """

    def __init__(
        self, source: ItemOutputs | None, target: ItemOutputs, prior: Array | None = None
    ) -> None:
        self.source, self.target, self.prior = source, target, prior
        self.problems: dict[str, str] = {}

    @cached_property
    def domains(self) -> DomainWeights:
        """The importance weights of the source items."""
        assert self.source is not None
        return DomainWeights(self.source.features, self.target.features)

    @cached_property
    def losses(self) -> Floats:
        """The cross-entropies of the source items."""
        assert self.source is not None
        losses = F.cross_entropy(self.source.logits, self.source.labels, reduction="none")
        return np.asarray(losses.double().numpy())

    def score(self, name: str) -> float:
        """The value of a validator.

        Raises:
            UntrustedWeights: If importance weights leave too few items.
        """
        logits, features = self.target.logits, self.target.features
        if name == "entropy":
            return validators.entropy(logits)
        if name == "im":
            return validators.information_maximization(logits, self.prior)
        if name == "nuclear_norm":
            return validators.nuclear_norm(logits)
        if name == "snd":
            return validators.soft_neighborhood_density(logits)
        if name == "class_ami":
            return validators.class_ami(logits, features)
        if name == "class_balance":
            return validators.class_balance(logits, self.prior)
        assert self.source is not None
        if name == "circular":
            return validators.circular(
                features, logits.argmax(1), self.source.features, self.source.labels
            )
        if name == "iwv":
            return float(-(self.domains.trusted() * self.losses).mean())
        if name == "dev":
            return validators.controlled_risk(self.domains.trusted(normalize=False), self.losses)
        raise ValueError(f"The validator {name!r} is unknown: use {', '.join(VALIDATORS)}.")

    def estimate(self, method: Method = "atc", resamples: int = 200) -> AccuracyEstimate:
        """The accuracy on the target, estimated from the source: see [`estimate_accuracy`]."""
        assert self.source is not None
        return estimate_accuracy(
            self.source.logits,
            self.source.labels,
            self.target.logits,
            method=method,
            source_features=self.source.features,
            target_features=self.target.features,
            resamples=resamples,
        )

    def all(self, names: Collection[str] = VALIDATORS) -> dict[str, float]:
        """Several values by their names; -inf where one cannot be trusted or computed."""
        usable = [n for n in names if self.source is not None or n not in NEED_SOURCE]
        return self._each({name: partial(self.score, name) for name in usable})

    def measured(self, *names: str) -> dict[str, float]:
        """Of `effective_sample_size`, `a_distance` and `accuracy_estimate` what can be computed."""
        measures = {
            "effective_sample_size": lambda: self.domains.effective_size,
            "a_distance": lambda: self.domains.distance,
            "accuracy_estimate": lambda: self.estimate(resamples=1).value,
        }
        return {n: v for n, v in self._each({n: measures[n] for n in names}).items() if v > -np.inf}

    def _each(self, values: Mapping[str, Callable[[], float]]) -> dict[str, float]:
        found = {}
        for name, compute in values.items():
            try:
                found[name] = compute()
            except ValueError as error:  # too few items, or weights that say nothing
                found[name] = -np.inf
                self.problems.setdefault(str(error), name)
        return found

    @property
    def source_accuracy(self) -> float:
        """The accuracy on held-out source items."""
        assert self.source is not None
        items = self.source.labelled
        return float((items.logits.argmax(1) == items.labels).double().mean())


def strided(items: ItemOutputs, most: int) -> ItemOutputs:
    """At most so many of the items, evenly spread over their keys."""
    if len(items) <= most:
        return items
    return items.select(torch.linspace(0, len(items) - 1, most).long())
