"""Some rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def rows_of(inputs: Mapping[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """The chosen rows of a batch: every tensor or list with one entry per row is indexed."""
    size, places = len(keep), keep.nonzero().flatten().tolist()

    def chosen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == size:
            return value[keep.to(value.device)]
        if isinstance(value, list) and len(value) == size:
            return [value[place] for place in places]
        return value

    return {key: chosen(value) for key, value in inputs.items()}


def as_if_alone(inputs: Mapping[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """The chosen rows of a batch, padded as they would be without the others.

    A batch that is wider than its longest row was padded to a width of its own, which is kept.
    """
    rows, mask = rows_of(inputs, keep), inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not bool(mask.any(0).all()):
        return rows
    used = rows["attention_mask"].bool().any(0)
    wide = (len(rows["attention_mask"]), len(used))
    return {
        key: value[:, used]
        if isinstance(value, torch.Tensor) and value.shape[:2] == wide
        else value
        for key, value in rows.items()
    }
