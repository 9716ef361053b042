"""Weights on the source rows of the task's own loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.normalisation import count_labels
from hf_adapt.engine.selection import rows_of
from hf_adapt.models.heads import is_causal_lm

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch, Rows


def refuse_other_losses(trainer: Trainer, method: str) -> None:
    """Refuse a task whose loss is not the mean cross-entropy of labelled rows or tokens.

    A loss that a subclass of Trainer computes in `compute_loss` cannot be seen from outside.

    Raises:
        ValueError: If the loss is the user's own function, or the model is a causal language model.
    """
    if trainer.compute_loss_func is not None or (
        trainer.model is not None and is_causal_lm(trainer.model)
    ):
        found = "a causal language model"
        if trainer.compute_loss_func is not None:
            found = "compute_loss_func"
        raise ValueError(
            f"{method} weights the cross-entropy of a classifier's source rows; found {found}. "
            "Use a classification head with its own loss, or sample the source rows by weights "
            "(torch.utils.data.WeightedRandomSampler)."
        )


def num_source_labels(rows: Rows, trainer: Trainer) -> torch.Tensor:
    """How many source items have a label, known before the forward."""
    total = torch.zeros((), dtype=torch.long, device=rows.parts[0].domain.device)
    for part in rows.parts:
        count = count_labels(trainer, rows_of(part.inputs, part.domain == 0))
        total = total if count is None else total + count
    return total


def reweighting_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    r"""What must be added to the sum of a cross-entropy to weight its items.

    .. math::
        L = \sum_i (w_i - 1) \, \ell_i

    Args:
        logits: Scores of each class, any floating dtype; computed in at least float32.
        labels: The class of each item; items with -100 are left out.
        weights: w; no gradient flows through them.
        smoothing: The Trainer's `label_smoothing_factor`.

    Shape:
        - logits: (N, C); labels, weights: (N,); output: (), in nats.

    Example:
        >>> weights = torch.tensor([3.0, 1.0])
        >>> round(reweighting_loss(torch.zeros(2, 2), torch.tensor([0, 1]), weights).item(), 4)
        1.3863
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(
        logits.to(dtype), labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
    )
    return ((weights.detach() - 1) * losses).sum()


def weighted_source(
    batch: Batch, logits: torch.Tensor, weights: torch.Tensor, trainer: Trainer
) -> tuple[torch.Tensor, torch.Tensor]:
    """The term that weights the task's loss on source items, as a sum and a count.

    Args:
        batch: The micro-batch.
        logits: The predictions for source items.
        weights: The weight of each.
        trainer: The Trainer whose loss is weighted.
    """
    labels = batch.labels()[batch.logits()[1] == 0]
    total = reweighting_loss(logits, labels, weights, trainer.args.label_smoothing_factor)
    return total, (labels != IGNORED).sum()
