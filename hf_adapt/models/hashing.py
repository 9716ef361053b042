"""Numbers made of rows, which batching, padding, processes and resuming do not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

MAIN_INPUTS = (
    "input_ids",
    "pixel_values",
    "input_values",
    "input_features",
    "inputs_embeds",
    "bbox",
)
WHOLE_INPUTS = ("pixel_values", "input_features", "bbox")
"""Inputs in which zeros are values like others."""


def row_hash(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A number for each row that its tokens decide, whatever its padding, (B,) long."""
    ids = input_ids.long()
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        ids = ids * mask.bool()
    return mixed_bits((ids * 2654435761 + ids * ids).sum(1))


def mixed_bits(number: torch.Tensor) -> torch.Tensor:
    """Bits well stirred: numbers that are near each other become far apart."""
    number = (number ^ (number >> 33)) * -49064778989728563
    number = (number ^ (number >> 33)) * -4265267296055464877
    return number ^ (number >> 33)


def row_keys(inputs: Mapping[str, Any]) -> torch.Tensor:
    """A 64-bit key of each row of a batch, made of what the model is given.

    Padding does not matter, on either side: a row has the same key in every batch. Without an
    attention mask, zeros at either end of tokens or samples count as padding. Equal rows share a
    key; different ones have different keys but for one pair in 2⁶⁴.

    Args:
        inputs: The model's inputs, with at least one of `input_ids`, `pixel_values`,
            `input_values`, `input_features`, `inputs_embeds` and `bbox`.

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
    found = {n: inputs[n] for n in MAIN_INPUTS if isinstance(inputs.get(n), torch.Tensor)}
    if not found:
        raise ValueError(
            f"Rows are told apart by one of the inputs {', '.join(MAIN_INPUTS)}; the batch has "
            f"{', '.join(inputs)}. Use a method without a memory of its rows."
        )
    attention = inputs.get("attention_mask")
    keys = []
    for number, (name, values) in enumerate(found.items()):
        mask = attention if isinstance(attention, torch.Tensor) else None
        if mask is not None and values.shape[: mask.ndim] == mask.shape:
            mask = mask.flatten(1) if mask.ndim > 2 and values.ndim == mask.ndim else mask
        else:
            mask = None
        if values.is_floating_point():
            values = values.float().view(torch.int32)
        values = values.flatten(1).long()
        if mask is None or values.shape[1] % mask.shape[1]:
            mask = torch.ones_like(values) if name in WHOLE_INPUTS else _between_zeros(values)
        mask = mask.long().repeat_interleave(values.shape[1] // mask.shape[1], 1)
        places = mask.cumsum(1)
        mixed = mixed_bits((mixed_bits(mixed_bits(places) + values) * mask).sum(1))
        keys.append(mixed_bits(mixed + number) if number else mixed)
    return torch.stack(keys).sum(0)


def _between_zeros(values: torch.Tensor) -> torch.Tensor:
    """1 from the first value that is not 0 to the last."""
    real = (values != 0).long()
    return ((real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)).long()


def item_keys(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """A key of each token of rows with these keys and numbers of tokens, (N,) long."""
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.arange(len(first), device=rows.device) - first
    return mixed_bits(rows.repeat_interleave(counts) + mixed_bits(places + 1))
