"""Partial adversarial domain adaptation: source classes that the target lacks count less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.alignment.dann import DANN
from hf_adapt.alignment.predictions import predicted_features, refuse_other_problems
from hf_adapt.alignment.source_weights import (
    num_source_labels,
    refuse_other_losses,
    weighted_source,
)
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.progress import Schedule

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows


class PADA(DANN):
    r"""Partial adversarial domain adaptation: [`DANN`] for a target without some of the classes.

    .. math::
        L = \frac{1}{N_s} \sum_i \gamma_{y_i} \ell_i + L_{\mathrm{DANN}}(\gamma), \qquad
        \gamma = \bar p / \max_c \bar p_c, \qquad
        \bar p = \frac{1}{N_t} \sum_j \mathrm{softmax}(z_j)

    Each source class is weighted by the model's mean prediction on the target, in the task's loss
    and in the discriminator's, so that target rows are not aligned with source rows of classes that
    the target lacks. Use it where the target has fewer classes than the source, or some are much
    rarer there, and the source model is right about which; not where both have the same classes.

    Reference:
        Cao et al. 2018, "Partial Adversarial Domain Adaptation", Eq. 5-7, arXiv:1808.04205.
        Deviations: those of [`DANN`]; the mean prediction is a running average over the optimizer
        steps instead of a pass over the target every few hundred steps. It starts uniform, so that
        all weights are 1.

    Args:
        weight: Peak λ, or a schedule of it; a constant 0 turns the objective off.
        momentum: Share of the running average that each optimizer step keeps.
        **adversary: Further arguments of [`DANN`]: `ramp`, `feature_layer`, `pooling`,
            `hidden_sizes`, `dropout`, `learning_rate`, `weight_decay`, `name`, `bounded`,
            `several_sources`.

    Logs:
        As [`DANN`], under `pada`; `pada/reweighting` (what the weights add to the task's loss),
        `pada/smallest_class_weight`.

    Raises:
        ValueError: As [`DANN`]; if `momentum` is outside [0, 1), or the task's loss is not the
            cross-entropy of a classifier.

    Example:
        >>> PADA(momentum=0.99).name
        'pada'
    """

    name = "pada"
    uses_logits = True

    def __init__(
        self, weight: float | Schedule = 0.1, *, momentum: float = 0.9, **adversary: Any
    ) -> None:
        super().__init__(weight, **adversary)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1).")
        self.momentum = momentum
        self._mean = torch.zeros(0)  # the running average
        self._seen = torch.zeros(0)  # of this step: the sum of the predictions, and their number

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes, or a loss that cannot be weighted."""
        super().setup(trainer)
        refuse_other_problems(trainer.model, "PADA")
        refuse_other_losses(trainer, "PADA")
        self._trainer = trainer

    @property
    def class_weights(self) -> torch.Tensor:
        """(C,) the weight of each source class in this optimizer step, at most 1."""
        return self._mean / self._mean.max()

    def build_modules(self, batch: Batch) -> nn.Module:
        """The discriminator; the weights start at 1."""
        _, logits, _ = predicted_features(batch, "PADA")
        classes = logits.shape[1]
        self._mean = torch.full((classes,), 1 / classes, device=logits.device)
        self._seen = torch.zeros(classes + 1, device=logits.device)
        return super().build_modules(batch)

    def before_step(self, step: int) -> None:
        """Take the predictions of the last step into the average."""
        *total, count = self._seen
        if count > 0:
            new = torch.stack(total) / count
            self._mean = self.momentum * self._mean + (1 - self.momentum) * new
        self._seen = torch.zeros_like(self._seen)

    def num_items(self, rows: Rows) -> Any:
        """The features that are classified, and the labels of the source."""
        return {
            "discriminator": rows.num_features(),
            "reweighting": num_source_labels(rows, self._trainer),
        }

    def item_weights(self, batch: Batch) -> torch.Tensor:
        """The class weights of source items; 1 for those of the target or without a label."""
        labels = batch.labels("features")
        weights = self.class_weights[labels.clamp(min=0)]
        return torch.where(labels == IGNORED, torch.ones_like(weights), weights)

    def loss(self, batch: Batch) -> Any:
        """The discriminator's cross-entropy, and what the weights add to the task's loss."""
        logits, domain = batch.logits()
        if torch.is_grad_enabled():
            predictions = logits.detach()[domain > 0].float().softmax(-1)
            seen = torch.cat([predictions.sum(0), predictions.new_tensor([len(predictions)])])
            self._seen = self._seen + self._trainer.accelerator.reduce(seen, reduction="sum")
        batch.log("smallest_class_weight", self.class_weights.min())
        is_source = domain == 0
        weights = self.item_weights(batch)[is_source]
        terms: dict[str, Term] = {
            "discriminator": super().loss(batch),
            "reweighting": weighted_source(batch, logits[is_source], weights, self._trainer),
        }
        return terms

    def state_dict(self) -> dict[str, Any]:
        """The average of the predictions, and what the warnings have seen."""
        return {**super().state_dict(), "mean": self._mean, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        super().load_state_dict(state)
        self._mean, self._seen = state["mean"].to(self._mean), state["seen"].to(self._seen)
