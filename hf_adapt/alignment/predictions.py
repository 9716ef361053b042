"""What the objectives on the model's own predictions share."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.models.heads import HeadName, has_head
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch


def check_logits(name: str, logits: torch.Tensor) -> None:
    """Refuse scores that a loss is not defined for.

    Args:
        name: The function's name, for the message.
        logits: Scores of each class.

    Raises:
        ValueError: If they are not (N, C) with N at least 1 and C at least 2.
    """
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(
            f"{name} expects logits (N, C) of at least one row and two classes, got "
            f"{tuple(logits.shape)}."
        )


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


def predicted_features(
    batch: Batch, method: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The features, the scores of exclusive classes and the domain of each item.

    Args:
        batch: The micro-batch.
        method: Who asks, for the message.

    Shape:
        - features: (N, D); logits: (N, C), C at least 2; domain: (N,).

    Raises:
        ValueError: If the predictions are not scores of exclusive classes, or of other items than
            the features.
    """
    features, domain = batch.features()
    logits, _ = class_logits(batch, method)
    if len(logits) != len(features):
        raise ValueError(
            f"{method} needs a prediction for each feature, and there are {len(features)} features "
            f"and {len(logits)} predictions. Pass pooling='tokens' if the head predicts tokens; "
            "else leave pooling='auto'."
        )
    return features, logits, domain


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


def refuse_heads(model: Any, method: str, *heads: HeadName) -> None:
    """Refuse a model with one of these heads, whose predictions are of another kind.

    Raises:
        ValueError: If it has one.
    """
    base = unwrapped_base(model)
    if has_head(base, *heads):
        predicts_tokens = has_head(base, "masked_lm", "causal_lm")
        fix = "TargetLanguageModeling, or an" if predicts_tokens else "an"
        raise ValueError(
            f"{method} needs a head that gives each row or token one of a few classes; "
            f"{type(base).__name__} predicts something else. Use {fix} objective on features "
            "(MMD, CORAL, DANN)."
        )


LANGUAGE_MODELS: tuple[HeadName, ...] = ("masked_lm", "causal_lm", "conditional_generation")


class ClassPredictions(Objective):
    """An objective on the model's predictions over exclusive classes."""

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes."""
        refuse_other_problems(trainer.model, type(self).__name__)

    def class_logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of exclusive classes, (N, C), and the domain of each item, (N,)."""
        return class_logits(batch, type(self).__name__)


class TargetPredictions(ClassPredictions):
    """An objective on the predictions of the target rows of a micro-batch together.

    The term couples the rows: under gradient accumulation it is the mean of the values of the
    micro-batches. Where one has no target rows, its value is 0.
    """

    needs_streams = ("target",)

    @abstractmethod
    def batch_term(self, target_logits: torch.Tensor) -> torch.Tensor:
        """The term of (N, C) logits of at least one target row, a scalar."""

    def loss(self, batch: Batch) -> Term:
        """The term of the target rows."""
        logits, domain = self.class_logits(batch)
        target = logits[domain > 0]
        return self.batch_term(target) if len(target) else logits.sum() * 0.0
