"""Domain-adversarial training: features that do not reveal the domain."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import datasets
import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.alignment.adversarial import AdversarialObjective, stop_gradient
from hf_adapt.alignment.discriminator import DiscriminatorWatch, DomainDiscriminator
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.collating import DOMAIN
from hf_adapt.engine.progress import Schedule, dann_ramp

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows


def dann_loss(logits: torch.Tensor, domain: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    r"""Cross-entropy of the domain classification, which the discriminator minimises.

    .. math::
        L = -\frac{1}{N} \sum_{i=1}^{N} \log \mathrm{softmax}(z_i)_{d_i}

    With a reversed gradient ([`reverse_gradient`]) the model maximises it. [`mmd_loss`] aligns
    features without a discriminator, which is easier to train.

    Reference:
        Ganin et al. 2016, Eq. 9, arXiv:1505.07818.
        Deviation: softmax over any number of domains; for two it equals the paper's logistic loss.

    Args:
        logits: Scores of each domain, any floating dtype; computed in float32.
        domain: The true domain of each row, 0 for the source.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Shape:
        - logits: (N, K), domain: (N,); output: (), in nats.

    Raises:
        ValueError: If the shapes do not fit, or there are fewer than two domains (a softmax over
            one is constant, and its gradient 0).

    Example:
        >>> round(dann_loss(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])).item(), 6)
        0.693147
    """
    if logits.ndim != 2 or domain.shape != logits.shape[:1]:
        raise ValueError(
            f"dann_loss expects logits (N, K) and domain (N,), got {tuple(logits.shape)} and "
            f"{tuple(domain.shape)}."
        )
    if logits.shape[1] < 2:
        raise ValueError(
            "dann_loss needs logits of at least two domains: over one domain the softmax is the "
            "constant 1 and no gradient flows."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), domain, reduction=reduction)


class DANN(AdversarialObjective):
    """Domain-adversarial training: trains features from which the domain cannot be predicted.

    A discriminator learns to predict the domain from the feature; its gradient is reversed and
    scaled by λ = `weight` · `ramp`(progress) before it reaches the model. Use it when source and
    target differ in all classes and have similar label distributions. If they do not,
    [`InformationMaximization`] or [`SelfTraining`] with the target's class frequencies is better.

    With several target domains the discriminator tells all of them apart; with `several_sources`,
    the sources as well.

    Reference:
        Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", arXiv:1505.07818.
        Deviations: the discriminator has its own optimizer (AdamW) and learns at full rate
        from the first step, while λ ramps for the model. The peak of λ is 0.1 by default, not 1:
        AdamW fine-tunes a whole transformer faster than a small discriminator can follow. And with
        `bounded` no gradient is reversed for an item whose domain the discriminator gets wrong
        already (its cross-entropy is over ln K): in the paper's game the model goes on, past
        confusion, to features that the discriminator takes for the other domain, so that the
        target as a whole overshoots the source, at times across the boundary between two classes
        (film reviews → tweets, one seed of five: accuracy 42 % without the bound, 65 % with it,
        68 % from source only).

    Args:
        weight: Peak λ, or a schedule of it; a constant 0 turns the objective off. With a learning
            rate of 2e-5 or so, or a frozen lower half, more (0.3 to 1) may be right: watch
            `dann/domain_accuracy`, which must not stay below chance.
        ramp: Factor of λ as a function of progress; `dann_ramp()` by default, None for none.
        feature_layer: Dotted name of the module whose output is aligned; by default the last
            hidden state of the base model.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        hidden_sizes: Hidden layers of the discriminator.
        dropout: Dropout of the discriminator.
        learning_rate: Peak learning rate of the discriminator; follows the run's schedule.
        weight_decay: Weight decay of the discriminator.
        name: Prefix of the logs.
        bounded: Reverse no gradient for items whose domain the discriminator gets wrong already
            (probability below 1/K). It makes runs alike; False is the paper's game, which aligns
            more, and now and then the wrong classes.
        several_sources: Whether the training rows are from several sources, as their column
            `domain` says; the discriminator then has a class for each.

    Logs:
        `loss/dann` (the discriminator's cross-entropy; ln K at chance), `dann/lambda`,
        `dann/domain_accuracy`, `dann/gradient_ratio` (the term's share of the gradient at the
        feature layer), `dann/module_gradient_norm`.

    Raises:
        ValueError: If the weight is negative, a hidden size or the learning rate not positive, or
            dropout outside [0, 1).

    Example:
        >>> DANN(weight=0.5, hidden_sizes=(128, 128), learning_rate=5e-4).name
        'dann'
    """

    name = "dann"
    uses_logits = False

    def __init__(
        self,
        weight: float | Schedule = 0.1,
        ramp: Schedule | None = dann_ramp(),  # noqa: B008 - a pure function
        *,
        bounded: bool = True,
        several_sources: bool = False,
        **adversary: Any,
    ) -> None:
        super().__init__(weight, ramp, **adversary)
        self.bounded = bounded
        self.columns = (DOMAIN,) if several_sources else ()
        self._sources: dict[Any, int] = {}  # of values of that column; 0 for the first

    def setup(self, trainer: Trainer) -> None:
        """Look up which sources there are."""
        self._sources = {}
        if self.columns:
            values = _domains(trainer.train_dataset)
            if len(values) < 2:
                raise ValueError(
                    f"several_sources=True, but the column {DOMAIN!r} of train_dataset has the "
                    f"values {values or 'none'}. Add a column that names each row's source."
                )
            self._sources = {value: number for number, value in enumerate(values)}

    @cached_property
    def watch(self) -> DiscriminatorWatch:
        """The warnings of this run."""
        return DiscriminatorWatch(self.name)

    def discriminated(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the discriminator sees of each item, and the item's domain."""
        return batch.features()

    def item_weights(self, batch: Batch) -> torch.Tensor | None:
        """(N,) factors of the items in the discriminator's loss, without a gradient."""
        return None

    def build_modules(self, batch: Batch) -> nn.Module:
        """The discriminator, as wide as what it sees."""
        features, _ = self.discriminated(batch)
        num_domains = batch.num_domains + max(0, len(self._sources) - 1)
        self.watch = DiscriminatorWatch(self.name, num_domains)
        return DomainDiscriminator(features.shape[1], num_domains, self.hidden_sizes, self.dropout)

    def num_items(self, rows: Rows) -> torch.Tensor:
        """Every row (or token) is classified."""
        return rows.num_features()

    def loss(self, batch: Batch) -> Term:
        """The discriminator's cross-entropy, summed over the features."""
        assert self.module is not None
        features, domain = self.discriminated(self._by_source(batch))
        reversed_ = self.reversed(features, batch)
        logits = self.module(reversed_)
        losses = dann_loss(logits, domain, reduction="none")
        if self.bounded:
            stop_gradient(reversed_, losses.detach() > math.log(logits.shape[1]))
        with torch.no_grad():
            source_share = (domain == 0).float().mean()
            accuracy = (logits.argmax(1) == domain).float().mean()
        if torch.is_grad_enabled():  # not in the look at the first batch
            self.watch.since_log += len(domain)
        batch.log("domain_accuracy", accuracy, len(domain))
        batch.log("source_share", source_share, len(domain))
        weights = self.item_weights(batch)
        total = losses.sum() if weights is None else (weights * losses).sum()
        return total, torch.as_tensor(len(domain), device=logits.device)

    def _by_source(self, batch: Batch) -> Batch:
        """The batch with a domain number for each source; those of the targets stay."""
        if not self._sources:
            return batch
        seen = copy.copy(batch)
        seen.parts = [
            replace(part, domain=self._numbered(part.domain, part.columns[DOMAIN], batch))
            for part in batch.parts
        ]
        return seen

    def _numbered(self, domain: torch.Tensor, values: list[Any], batch: Batch) -> torch.Tensor:
        """Source rows of the first source stay 0; the others follow after the targets."""
        numbers = [self._sources.get(value, 0) for value in values]
        source = torch.tensor(numbers, dtype=domain.dtype, device=domain.device)
        further = (domain == 0) & (source > 0)
        return torch.where(further, batch.num_domains - 1 + source, domain)

    def state_dict(self) -> dict[str, Any]:
        """What the warnings have seen of the discriminator."""
        return self.watch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.watch.load_state_dict(state)

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Warn if the discriminator gives the model no useful gradient."""
        self.watch.on_log(logs, progress)


def _domains(dataset: Any) -> list[Any]:
    """The different values of the column of domains, sorted."""
    stored = isinstance(dataset, datasets.Dataset)
    if stored and DOMAIN not in dataset.column_names:
        return []
    values = dataset[DOMAIN] if stored else (row.get(DOMAIN) for row in dataset)
    return sorted(set(values) - {None}, key=str)


class DomainAdversarialCallback(AdaptationCallback):
    """Domain-adversarial training in one line: [`DANN`] on an existing Trainer.

    Reference:
        Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", arXiv:1505.07818.

    Args:
        target_dataset: Rows of the target domain, prepared like `train_dataset`; labels are not
            needed and never used. A list or dict of datasets for several target domains. May be
            left out if `train_dataset` has a `domain` column.
        streams: Further streams of rows by name.
        **dann: Arguments of [`DANN`]: `weight`, `ramp`, `feature_layer`, `pooling`,
            `hidden_sizes`, `dropout`, `learning_rate`, `weight_decay`, `name`, `bounded`,
            `several_sources`.

    Example:
        ```python
        trainer.add_callback(DomainAdversarialCallback(target_dataset=target))
        trainer.train()
        ```
    """

    def __init__(
        self,
        target_dataset: Any = None,
        *,
        streams: Mapping[str, Any] | None = None,
        **dann: Any,
    ) -> None:
        super().__init__(
            DANN(**dann),
            target_dataset=target_dataset,
            streams=streams,
        )
