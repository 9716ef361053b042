"""What the objectives on the model's own predictions share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_adapt.engine.batch import Batch


def class_logits(batch: Batch, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of exclusive classes, and the domain of each item.

    Args:
        batch: The micro-batch.
        method: Who asks, for the message.

    Shape:
        - logits: (N, C), C at least 2; domain: (N,).

    Raises:
        ValueError: If the predictions are not scores of exclusive classes.
    """
    # Models without a problem_type choose one when they get the first labels.
    refuse_other_problems(batch.model, method)
    logits, domain = batch.logits()
    if logits.ndim != 2 or logits.shape[-1] < 2:
        raise ValueError(
            f"{method} needs logits of at least two classes, got {tuple(logits.shape)}. For a "
            "regression head, use DANN or MMD."
        )
    return logits, domain


def refuse_other_problems(model: Any, method: str) -> None:
    """Refuse a model whose outputs are not scores of exclusive classes.

    Raises:
        ValueError: If it is a regression, or may give a row several labels.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"{method} needs predictions over exclusive classes; this model's problem_type is "
            f"{problem!r}, as its configuration or its labels say (vectors of floats are several "
            "labels per row). Use an objective on features (DANN, MMD)."
        )
