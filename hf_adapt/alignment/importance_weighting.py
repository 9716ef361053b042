"""Importance weighting: source rows count the more, the more they look like target rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_adapt.alignment.dann import dann_loss
from hf_adapt.alignment.discriminator import DomainDiscriminator
from hf_adapt.alignment.predictions import predicted_features, refuse_other_problems
from hf_adapt.alignment.source_weights import (
    num_source_labels,
    refuse_other_losses,
    weighted_source,
)
from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows


def density_ratio_weights(domain_logits: torch.Tensor, max_weight: float = 5.0) -> torch.Tensor:
    r"""How much more probable each source item is in the target, with the mean 1.

    .. math::
        r_i = \frac{1 - p_i}{p_i}, \qquad p_i = \mathrm{softmax}(z_i)_0, \qquad
        w_i = \frac{N \min(r_i / \bar r, w_{\max})}{\sum_j \min(r_j / \bar r, w_{\max})}

    The factor N_s / N_t of the density ratio cancels.

    Reference:
        Bickel et al. 2009, "Discriminative Learning Under Covariate Shift", JMLR 10, section 4.

    Args:
        domain_logits: A discriminator's scores of each domain for source items, the source first;
            any floating dtype, computed in at least float32.
        max_weight: Largest weight, as a multiple of the mean, before the weights are scaled to the
            mean 1 again.

    Shape:
        - domain_logits: (N, K); output: (N,), unitless.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).log_softmax(-1)
        >>> [round(w, 4) for w in density_ratio_weights(logits).tolist()]
        [1.4621, 0.5379]
    """
    logits = domain_logits.detach().to(torch.promote_types(domain_logits.dtype, torch.float32))
    if not len(logits):
        return logits.sum(1)
    log_ratio = logits[:, 1:].logsumexp(1) - logits[:, 0]
    ratio = torch.softmax(log_ratio, 0) * len(logits)  # divided by its mean, without overflow
    clipped = ratio.clamp(max=max_weight)
    return clipped / clipped.mean()


class ImportanceWeighting(Objective):
    r"""Weights the task's loss on source rows by how much they look like target rows.

    A logistic regression on the features, which does not train the model, tells the domains apart;
    each source row's loss is multiplied by the ratio of the densities. The total is
    (1/N) Σ w_i ℓ_i.

    It is right where only the frequencies of inputs differ and the source covers the target. Do not
    expect a gain: in published comparisons reweighting by density ratios on features is between
    −1.7 and −0.2 points of source only (skada-bench, eight data sets), because domains that a
    classifier tells apart leave a few rows with all the weight. Watch `effective_share`, the share
    of the rows that this is worth; under 0.3 or so leave it out. Where class frequencies differ,
    correct those.

    Reference:
        Shimodaira 2000, "Improving predictive inference under covariate shift by weighting the
        log-likelihood function"; Bickel et al. 2009, JMLR 10.
        Deviation: weights have the mean 1 over the source rows of a micro-batch, so it needs
        micro-batches of more than a few rows (with one row each weight is 1).

    Args:
        weight: How far the weights go: 1 for w, 0.5 for half way between 1 and w; or a schedule.
        max_weight: Largest weight, as a multiple of the mean.
        feature_layer: Dotted name of the module whose output the classifier sees; by default the
            last hidden state of the base model.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        learning_rate: Peak learning rate of the classifier; follows the run's schedule.
        name: Prefix of the logs.

    Logs:
        `importance_weighting/discriminator` (the classifier's cross-entropy),
        `importance_weighting/reweighting` (what the weights add to the task's loss),
        `importance_weighting/effective_share`, (Σw)² / (N Σw²).

    Raises:
        ValueError: If an argument is out of range, or the task's loss is not the cross-entropy of a
            classifier.

    Example:
        >>> ImportanceWeighting(max_weight=3.0).name
        'importance_weighting'
    """

    name = "importance_weighting"
    needs_streams = ("target",)

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        max_weight: float = 5.0,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        learning_rate: float = 1e-3,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        if not max_weight > 1:
            raise ValueError(f"max_weight={max_weight} must be greater than 1, the mean weight.")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate={learning_rate} must be positive.")
        self.max_weight = max_weight
        self.learning_rate = learning_rate

    def setup(self, trainer: Trainer) -> None:
        """Refuse a loss that cannot be weighted."""
        refuse_other_problems(trainer.model, "ImportanceWeighting")
        refuse_other_losses(trainer, "ImportanceWeighting")
        self._trainer = trainer

    def build_modules(self, batch: Batch) -> nn.Module:
        """The logistic regression; with 0 as its weights, so that all rows start with weight 1."""
        features, _, _ = predicted_features(batch, "ImportanceWeighting")
        module = DomainDiscriminator(features.shape[1], batch.num_domains, ())
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        return module

    def num_items(self, rows: Rows) -> dict[str, torch.Tensor]:
        """The features that are classified, and the labels of the source."""
        return {
            "discriminator": rows.num_features(),
            "reweighting": num_source_labels(rows, self._trainer),
        }

    def loss(self, batch: Batch) -> dict[str, Term]:
        """The classifier's cross-entropy, and what the weights add to the task's loss."""
        assert self.module is not None
        features, logits, domain = predicted_features(batch, "ImportanceWeighting")
        domain_logits = self.module(features.detach())
        weights = density_ratio_weights(domain_logits[domain == 0], self.max_weight)
        share = weights.sum().square() / (len(weights) * weights.square().sum())
        batch.log("effective_share", share, len(weights))
        count = torch.as_tensor(len(domain), device=logits.device)
        return {
            "discriminator": (dann_loss(domain_logits, domain, "sum"), count),
            "reweighting": weighted_source(batch, logits[domain == 0], weights, self._trainer),
        }
