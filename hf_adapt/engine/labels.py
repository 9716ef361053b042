"""Labels as rows and batches have them: numbers, vectors, one per token, lists, arrays, tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

IGNORED = -100
"""The label that losses ignore."""


def label_of(label: Any, value: Any, length: int | None = None) -> Any:
    """A label of the same form with one value throughout.

    Args:
        label: A label: a number, a vector or list of them, or anything else.
        value: The value.
        length: Number of entries, where each token has a label; else as many as `label` has.

    Example:
        >>> label_of([1, 0, 2], -100, length=2), label_of([0.5, 1.0], -100), label_of("good", -100)
        ([-100, -100], [-100.0, -100.0], -100)
    """
    if isinstance(label, (torch.Tensor, np.ndarray)) and label.ndim > 0:
        if length is not None:
            label = label[:1].repeat(length)
        full = torch.full_like if isinstance(label, torch.Tensor) else np.full_like
        return full(label, value)
    if isinstance(label, (list, tuple)):
        value = float(value) if label and isinstance(label[0], float) else value
        return [value] * (len(label) if length is None else length)
    if isinstance(label, np.generic):
        return type(label)(value)
    if isinstance(label, torch.Tensor):
        return torch.full_like(label, value)
    return float(value) if isinstance(label, float) else value


def has_token_labels(row: Any, key: str) -> bool:
    """Whether a row's label has an entry for each of its tokens, which a class could have."""
    label = row.get(key) if isinstance(row, Mapping) else None
    if isinstance(label, (torch.Tensor, np.ndarray)):
        whole = (
            label.dtype.kind != "f"
            if isinstance(label, np.ndarray)
            else not label.is_floating_point()
        )
        return label.ndim == 1 and whole and len(label) == length_of(row)
    if not isinstance(label, (list, tuple)) or (label and isinstance(label[0], float)):
        return False
    return len(label) == length_of(row)


def length_of(row: Mapping[str, Any]) -> int | None:
    """Number of tokens of a row, or None if it has none."""
    ids = row.get("input_ids")
    return None if ids is None else len(ids)
