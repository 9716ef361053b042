"""Keys that tell the rows of a dataset apart by their content, wherever they are met again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

MAIN_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")


def row_keys(inputs: Mapping[str, Any]) -> torch.Tensor:
    """A 64-bit key of each row of a batch, made of what the model is given.

    Padding does not matter, on either side: a row has the same key in every batch. Equal rows share
    a key; different ones have different keys but for one pair in 2⁶⁴.

    Args:
        inputs: The model's inputs, with one of `input_ids`, `pixel_values`, `input_values`,
            `input_features` and `inputs_embeds`.

    Shape:
        - output: (B,) long, on the inputs' device.

    Raises:
        ValueError: If there is none of these inputs.

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 0], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> short = torch.tensor([[5, 6]])
        >>> keys = row_keys({"input_ids": ids, "attention_mask": mask})
        >>> bool(keys[0] == row_keys({"input_ids": short})[0]), bool(keys[0] == keys[1])
        (True, False)
    """
    name = next((name for name in MAIN_INPUTS if isinstance(inputs.get(name), torch.Tensor)), None)
    if name is None:
        raise ValueError(
            f"Rows are told apart by one of the inputs {', '.join(MAIN_INPUTS)}; the batch has "
            f"{', '.join(inputs)}. Use a method without a memory of its rows."
        )
    values = inputs[name]
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and values.shape[: mask.ndim] == mask.shape:
        mask = mask.flatten(1) if mask.ndim > 2 and values.ndim == mask.ndim else mask
    else:
        mask = None
    if values.is_floating_point():
        values = values.float().view(torch.int32)
    values = values.flatten(1).long()
    if mask is None or values.shape[1] % mask.shape[1]:
        mask = torch.ones_like(values)
    mask = mask.long().repeat_interleave(values.shape[1] // mask.shape[1], 1)
    places = mask.cumsum(1)
    return _mixed((_mixed(_mixed(places) + values) * mask).sum(1))


def item_keys(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """A key of each token of rows with these keys and numbers of tokens, (N,) long."""
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.arange(len(first), device=rows.device) - first
    return _mixed(rows.repeat_interleave(counts) + _mixed(places + 1))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014); int64 wraps around."""
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
