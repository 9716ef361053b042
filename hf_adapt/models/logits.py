"""The logits of a language model that was run without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_adapt.models.structure import unwrapped_base

LOGIT_SCALES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Settings of models that change their logits after the projection."""


def lacks_logits(outputs: Any) -> bool:
    """Whether a language model gave probabilities of the labels instead of logits (TRL)."""
    return getattr(outputs, "log_probs", None) is not None


def projected_logits(model: nn.Module, hidden: torch.Tensor | None) -> torch.Tensor:
    """The scores of a language model's head for hidden states of its last layer.

    Args:
        model: The language model, in any wrapper.
        hidden: The states, (..., D); None if they were not captured.

    Raises:
        ValueError: If the logits are not a plain projection of the last hidden state.
    """
    base: Any = unwrapped_base(model)
    config = base.config.get_text_config()
    scaling = [name for name in LOGIT_SCALES if getattr(config, name, None) not in (None, 1.0)]
    if hidden is None or scaling:
        raise ValueError(
            f"{type(base).__name__} was run without logits, and they cannot be computed from its "
            f"last hidden state ({', '.join(scaling) or 'which was not captured'}). Use the "
            "Trainer of transformers, or DistillationTrainer to distil."
        )
    head = base.get_output_embeddings()
    scores: torch.Tensor = head(hidden.to(head.weight.dtype))
    return scores
