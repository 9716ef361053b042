"""Pooling of a hidden state to one feature per row, or per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from hf_adapt.models.heads import has_head
from hf_adapt.models.structure import unwrapped_base

Pooling = (
    Literal["auto", "mean", "cls", "last", "tokens"]
    | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
)


def resolve_pooling(pooling: Pooling, model: nn.Module) -> Pooling:
    """What `"auto"` means for this model: tokens for token classification, else the mean."""
    if pooling != "auto":
        return pooling
    return "tokens" if has_head(model, "token_classification") else "mean"


def without_virtual_tokens(hidden: torch.Tensor, length: int, model: nn.Module) -> torch.Tensor:
    """A hidden state without the virtual tokens of a learned prompt.

    Args:
        hidden: (B, T, D); (B, V + T, D) under PEFT's prompt tuning and p-tuning.
        length: Number of real tokens, T.
        model: The model, whose PEFT configuration gives V.

    Shape:
        - output: (B, T, D).
    """
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(active, str) and isinstance(configs, dict) else None
    extra = hidden.shape[1] - length
    if not getattr(config, "is_prompt_learning", False) or extra <= 0:
        return hidden
    return hidden[:, extra:] if extra == getattr(config, "num_virtual_tokens", 0) else hidden


def token_mask(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None, model: nn.Module
) -> torch.Tensor:
    """The positions of a hidden state that are not padding, as (B, T) bool.

    Args:
        hidden: (B, T, D).
        attention_mask: (B, T) with 1 on real positions, or None if all are; for an audio model
            (B, samples), reduced to frames by the model's own rule.
        model: The model, which has that rule.

    Raises:
        ValueError: If the mask does not fit the hidden state.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    if attention_mask.shape == hidden.shape[:2]:
        return attention_mask.bool()
    reduce = getattr(unwrapped_base(model), "_get_feature_vector_attention_mask", None)
    if callable(reduce):  # audio: frames are fewer than samples
        return torch.as_tensor(reduce(hidden.shape[1], attention_mask)).bool()
    raise ValueError(
        f"The attention mask has shape {tuple(attention_mask.shape)} but the feature layer's "
        f"output is {tuple(hidden.shape)}: expected (B, T) and (B, T, D). Pass a callable "
        "pooling=, or a feature_layer whose output follows the tokens."
    )


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pool a hidden state to one feature per row, or per token, in float32.

    Args:
        hidden: (B, T, D). (B, D) is pooled already; (B, C, H, W) is a feature map, which is
            averaged over H and W.
        mask: (B, T) bool, true on real positions. Padding may be on either side.
        pooling: `"mean"`, `"cls"` (first real token), `"last"` (last real token), `"tokens"`, or
            a callable `(hidden, mask) -> (B, D)`.

    Shape:
        - output: (B, D), or (number of real tokens, D) for `"tokens"`.

    Raises:
        ValueError: If `pooling` is unknown or the hidden state has another number of dimensions.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> [pool(hidden, mask, how).tolist() for how in ("mean", "last", "tokens")]
        [[[2.0]], [[3.0]], [[1.0], [3.0]]]
    """
    hidden = hidden.float()
    if callable(pooling):
        return pooling(hidden, mask)
    if pooling not in ("mean", "cls", "last", "tokens"):
        raise ValueError(
            f"pooling={pooling!r} is unknown: use 'auto', 'mean', 'cls', 'last', 'tokens' or a "
            "callable (hidden, mask) -> (B, D)."
        )
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim == 4:
        return hidden.mean(dim=(2, 3))
    if hidden.ndim != 3:
        raise ValueError(
            f"The feature layer's output has shape {tuple(hidden.shape)}; expected (B, D), "
            "(B, T, D) or (B, C, H, W). Pass a callable pooling=(hidden, mask) -> (B, D)."
        )
    if pooling == "mean":
        real = mask.unsqueeze(-1)
        return hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
    if pooling == "tokens":
        return hidden[mask]
    order = mask.int() if pooling == "cls" else mask.flip(1).int()
    first = order.argmax(dim=1)
    index = first if pooling == "cls" else mask.shape[1] - 1 - first
    return hidden[torch.arange(len(hidden), device=hidden.device), index]
