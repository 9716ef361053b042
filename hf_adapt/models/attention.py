"""The modules of a layer that compute queries, keys, values and attention probabilities."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_adapt.models.capture import Extract

_ALONE = {
    "query": re.compile(r"(query|query_proj|q_proj|q_lin|q|query_layer|q_linear|wq)$"),
    "key": re.compile(r"(key|key_proj|k_proj|k_lin|k|key_layer|k_linear|wk)$"),
    "value": re.compile(r"(value|value_proj|v_proj|v_lin|v|value_layer|v_linear|wv)$"),
}
_TOGETHER = re.compile(r"(c_attn|Wqkv|qkv|in_proj)$")
"""One projection whose output is the queries, then the keys, then the values."""


def attention_projections(layer: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules that compute the queries, keys and values of a layer's self-attention.

    Args:
        layer: A transformer layer.
        names: One or more of `"query"`, `"key"` and `"value"`, in the desired order.

    Returns:
        One module for each name, or the one module whose output is all three in a row.

    Raises:
        ValueError: If the names of the modules do not show which they are.
    """
    modules = {
        name: module
        for name, module in layer.named_modules()
        if name and not re.search(r"cross|encoder_attn|EncDec", name, re.IGNORECASE)
    }
    found: list[nn.Module] = []
    for wanted in names:
        pattern = _ALONE[wanted]
        match = [m for name, m in modules.items() if pattern.match(name.rpartition(".")[2])]
        match = [m for m in match if not list(m.children()) or hasattr(m, "base_layer")]
        if match:
            found.append(match[0])
    if len(found) == len(names):
        return found
    together = [m for name, m in modules.items() if is_joint(name)]
    if together:
        return together[:1]
    raise ValueError(
        f"The query, key and value projections of {type(layer).__name__} cannot be derived from "
        f"its modules: {', '.join(list(modules)[:12])}. Use HiddenStates, or subclass "
        "SelfAttentionRelations and override captures(layer)."
    )


def is_joint(name: str) -> bool:
    """Whether a module of this name computes queries, keys and values in one output."""
    return _TOGETHER.match(name.rpartition(".")[2]) is not None


def attention_probabilities(layer: nn.Module) -> Mapping[nn.Module, Extract | None]:
    """The module of a layer whose output contains the self-attention probabilities.

    Raises:
        ValueError: If the layer has no attention module.
    """
    for name, module in layer.named_modules():
        cross = re.search(r"cross|encoder_attn|EncDec", name, re.IGNORECASE)
        inner = [
            m for n, m in module.named_modules() if n and "attention" in type(m).__name__.lower()
        ]
        if name and not cross and "attention" in type(module).__name__.lower() and not inner:
            return {module: probabilities}
    raise ValueError(
        f"{type(layer).__name__} has no module named like attention. Use SelfAttentionRelations or "
        "HiddenStates."
    )


def probabilities(output: Any) -> tuple[torch.Tensor, None] | None:
    """The attention probabilities (B, heads, T, T) in an attention module's output."""
    values = output if isinstance(output, (tuple, list)) else (output,)
    for value in reversed(values):
        if isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point():
            return value, None
    return None
