"""Training on balanced classes, and predictions corrected for the target's class frequencies."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.alignment.heads import last_linear
from hf_adapt.alignment.predictions import refuse_heads
from hf_adapt.alignment.priors import LEAST, PriorObjective, Priors, predicted
from hf_adapt.alignment.source_weights import (
    num_source_labels,
    refuse_other_losses,
    weighted_source,
)
from hf_adapt.engine.adaptation import Term
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.streams import TARGET, TRAINING
from hf_adapt.engine.training import resumed_from

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows

logger = logging.getLogger(__name__)


class PriorCorrection(PriorObjective):
    r"""Corrects a classifier for class frequencies that differ between source and target.

    Source rows are weighted so that their classes are equally frequent, and when training has ended
    the logarithm of the target's frequencies is added to the bias of the model's head:

    .. math::
        L = \frac{1}{N} \sum_i \frac{1}{C \, \pi_s(y_i)} \ell_i, \qquad
        p'(y \mid x) \propto p(y \mid x) \, C \, \pi_t(y)

    The saved model is a plain one and predicts for the target. It is right where only the
    frequencies differ. Between domains that look different the estimated ones are often wrong:
    give `target_priors`, and combine it with a method that adapts the features. [`SelfTraining`]
    uses the frequencies for its labels, and learns them from those.

    Reference:
        Saerens et al. 2002 (correction); Garg et al. 2023, "RLSbench", arXiv:2302.03020 (balanced
        training).
        Deviation: the source is balanced by weights on the loss, not by a sampler, so that the
        script's sampler and epochs stay what they are.

    Args:
        balance: Weight the source rows. False where they are balanced already; the correction then
            starts from the source's own frequencies.
        prior: Class frequencies for this objective alone, in place of the run's `target_priors`.
            Estimated at the end where neither is given.
        name: Prefix of the logs.

    Logs:
        `loss/prior_correction` (what the weights add to the task's loss).

    Raises:
        ValueError: If the head has no bias for each class, or the task's loss is not the
            cross-entropy of a classifier.

    Example:
        >>> PriorCorrection(prior={"ham": 0.9, "spam": 0.1}).name
        'prior_correction'
    """

    name = "prior_correction"
    needs_streams = (TARGET,)
    default_prior = "estimate"

    def __init__(
        self, balance: bool = True, prior: Priors | None = None, name: str | None = None
    ) -> None:
        super().__init__(1.0, name=name)
        self.balance = balance
        self.prior = prior
        self._source: torch.Tensor | None = None
        self._corrected: tuple[torch.Tensor, torch.Tensor] | None = None

    def setup(self, trainer: Trainer) -> None:
        """Refuse what cannot be weighted or corrected."""
        super().setup(trainer)
        refuse_heads(trainer.model, "PriorCorrection", "multiple_choice")
        refuse_other_losses(trainer, "PriorCorrection")
        bias = head_bias(trainer.accelerator.unwrap_model(trainer.model))
        self._trainer.check_sweep(TRAINING)
        self._source = None
        if not bias.requires_grad and hasattr(trainer.model, "peft_config"):
            raise ValueError(
                "PriorCorrection corrects the head's bias, which is not saved with these adapters. "
                "Name the head in modules_to_save of the LoraConfig (task_type does)."
            )
        corrected, shift = self._corrected or (None, None)
        if shift is not None and corrected is bias and resumed_from(trainer) is None:
            with torch.no_grad():  # trained once more
                bias -= shift.to(bias)
        self._corrected = None

    def before_step(self, step: int) -> None:
        """Count the classes of the source."""
        if self._source is None:
            self._source = self.source_priors()
        if self._priors is None and self._kind in ("source", "estimate"):
            self._priors = self._source
        super().before_step(step)

    def estimation_steps(self) -> Collection[int]:
        """None: they are estimated at the end."""
        return ()

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The labels of the source."""
        return num_source_labels(rows, self._trainer)

    def loss(self, batch: Batch) -> Term:
        """What the weights add to the sum of the task's loss."""
        logits, domain = self.class_logits(batch)
        source = domain == 0
        labels = batch.labels()[source]
        weights = torch.ones_like(labels, dtype=torch.float32)
        if self.balance and self._source is not None:
            of_class = 1 / (self._source.clamp_min(LEAST) * len(self._source)).to(logits.device)
            weights = torch.where(labels == IGNORED, weights, of_class[labels.clamp_min(0)])
        return weighted_source(batch, logits[source], weights, self._trainer)

    def finish(self, trainer: Trainer) -> None:
        """Estimate the target's frequencies, where they are not given; correct the head."""
        if self.estimates_priors:
            self.refresh_priors(self._trainer.sweep(self, TARGET, predicted)["logits"])
        source = self.source_priors() if self._source is None else self._source
        target = self.target_priors(len(source))
        trained = torch.full_like(target, 1 / len(target)) if self.balance else source
        shift = target.clamp_min(LEAST).log() - trained.to(target).clamp_min(LEAST).log()
        bias = head_bias(trainer.accelerator.unwrap_model(trainer.model))
        with torch.no_grad():
            bias += shift.to(bias)
        self._corrected = (bias, shift)
        logger.info("%s: corrected for the class frequencies %s", self.name, target.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The class frequencies of both domains."""
        source = {} if self._source is None else {"source": self._source}
        return {**super().state_dict(), **source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        super().load_state_dict(state)
        self._source = state.get("source")


def head_bias(model: nn.Module) -> torch.Tensor:
    """The bias of a classifier's last layer, one number for each class.

    Raises:
        ValueError: If there is none.
    """
    layer = last_linear(model, "PriorCorrection")
    if layer.bias is None:
        raise ValueError(
            "PriorCorrection corrects the bias of the head's last layer, and the one of this "
            f"{type(model).__name__} has none. Correct its predictions instead, with "
            "hf_adapt.alignment.corrected_logits."
        )
    return layer.bias
