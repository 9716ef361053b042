"""What the distances between the feature distributions of two domains share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from hf_adapt.engine.adaptation import Objective, Term

if TYPE_CHECKING:
    from hf_adapt.engine.batch import Batch


def check_samples(
    name: str,
    source: torch.Tensor,
    target: torch.Tensor,
    least: int = 1,
    way_out: str = "Use a larger batch.",
) -> None:
    """Refuse two samples of features that a distance is not defined for.

    Args:
        name: The function's name, for the message.
        source: Features of the source rows, (N, D).
        target: Features of the target rows, (M, D).
        least: Rows that each sample must have.
        way_out: What to do where there are too few.

    Raises:
        ValueError: If the shapes do not fit, or a sample has too few rows.
    """
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise ValueError(
            f"{name} expects source (N, D) and target (M, D) with the same D, got "
            f"{tuple(source.shape)} and {tuple(target.shape)}."
        )
    if len(source) < least or len(target) < least:
        raise ValueError(
            f"{name} needs at least {least} row(s) of each domain, got {len(source)} and "
            f"{len(target)}. {way_out}"
        )


def domain_pairs(
    domain: torch.Tensor, num_domains: int, least: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The source's items and those of each target domain that has enough of them.

    Args:
        domain: (N,) long, the domain of each item; 0 is the source.
        num_domains: Number of domains, the source included.
        least: Items that source and target must have.

    Yields:
        Two masks, (N,) bool: the source's items and a target's.
    """
    source = domain == 0
    if int(source.sum()) < least:
        return
    for number in range(1, num_domains):
        target = domain == number
        if int(target.sum()) >= least:
            yield source, target


class Discrepancy(Objective):
    """A distance between the features of the source and of each target domain.

    The term couples the rows of a micro-batch: under gradient accumulation it is the mean of the
    values of the micro-batches, each of which needs a few rows of each domain. With several targets
    it is the mean over them.
    """

    needs_streams = ("target",)
    uses_logits = False

    @property
    def least_rows(self) -> int:
        """Rows of each domain that the distance is defined for."""
        return 1

    @abstractmethod
    def distance(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The distance of (N, D) source features and (M, D) target features, a scalar."""

    def pair_distance(
        self, batch: Batch, features: torch.Tensor, source: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """The distance of the items of two domains; to be overridden by what sees more of them.

        Args:
            batch: The micro-batch.
            features: (N, D) features of all items.
            source: (N,) bool, the source's items.
            target: (N,) bool, a target's items.
        """
        return self.distance(features[source], features[target])

    def build_modules(self, batch: Batch) -> None:
        """Build nothing; refuse batches in which the term can only be 0."""
        _, domain = batch.features()
        counts = torch.bincount(domain, minlength=batch.num_domains).tolist()
        if counts[0] < self.least_rows or max(counts[1:], default=0) < self.least_rows:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.least_rows} rows of the source "
                f"and of a target in each micro-batch; the first has {counts} rows of each "
                "domain. Raise per_device_train_batch_size (and lower "
                "gradient_accumulation_steps) or the stream's ratio."
            )

    def loss(self, batch: Batch) -> Term:
        """The distance of source and target, averaged over the target domains."""
        features, domain = batch.features()
        terms = [
            self.pair_distance(batch, features, source, target)
            for source, target in domain_pairs(domain, batch.num_domains, self.least_rows)
        ]
        return torch.stack(terms).mean() if terms else features.sum() * 0.0
