"""Numbers made of rows, which batching, padding, processes and resuming do not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

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
CPU_BLOCK = 2**15
"""How many values are mixed at once; a few blocks of 8 bytes each fit into a core's cache."""


def row_hash(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A number for each row that its tokens decide, whatever its padding, (B,) long."""
    ids = input_ids.long()
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        ids = ids * mask.bool()
    return mixed_bits((ids * 2654435761 + ids * ids).sum(1))


def mixed_bits(number: torch.Tensor) -> torch.Tensor:
    """Bits well stirred: numbers that are near each other become far apart."""
    number = number ^ (number >> 33)
    number *= -49064778989728563
    number ^= number >> 33
    number *= -4265267296055464877
    number ^= number >> 33
    return number


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
        values, size = values.flatten(1), 0
        if mask is not None and values.shape[1] % mask.shape[1] == 0:
            mask = (mask != 0).repeat_interleave(values.shape[1] // mask.shape[1], 1)
            places = mask.cumsum(1, dtype=torch.int32) * mask
        elif name in WHOLE_INPUTS:
            values, size = _in_pairs(values), values.shape[1]
            places = torch.arange(1, values.shape[1] + 1, device=values.device)[None]
        else:
            places = _between_zeros(values)
        mixed = mixed_bits(_sum_of_mixed(values, places) + size)
        keys.append(mixed_bits(mixed + number) if number else mixed)
    return torch.stack(keys).sum(0)


def _sum_of_mixed(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B,) long, made of the values (B, N) and their places (B, N) or (1, N), 0 for padding.

    A few columns at a time, which fit into the processor's cache: the sum is the same.
    """
    total = torch.zeros(len(values), dtype=torch.long, device=values.device)
    step = max(1, (CPU_BLOCK if values.device.type == "cpu" else 2**24) // max(1, len(values)))
    blocks = (torch.split(each, step, dim=1) for each in (values, places))
    for own, at in zip(*blocks, strict=True):
        mixed = mixed_bits(mixed_bits(at.long()) + own)
        if len(places) == len(values):
            mixed *= at != 0
        total += mixed.sum(1)
    return total


def _in_pairs(values: torch.Tensor) -> torch.Tensor:
    """Two numbers of 32 bits as one of 64, where that is what they are."""
    if values.dtype != torch.int32:
        return values
    if values.shape[1] % 2:
        values = F.pad(values, (0, 1))
    values = values.contiguous()
    return (values.clone() if values.storage_offset() % 2 else values).view(torch.long)


def _between_zeros(values: torch.Tensor) -> torch.Tensor:
    """The places of the values from the first that is not 0 to the last, from 1 on; 0 outside."""
    steps = torch.arange(1, values.shape[1] + 1, dtype=torch.int32, device=values.device)
    real = (values != 0).int()
    last = (real * steps).amax(1, keepdim=True)
    before = values.shape[1] - (real * steps.flip(0)).amax(1, keepdim=True)
    return ((steps - before) * (steps <= last)).clamp_min_(0)


def item_keys(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """A key of each token of rows with these keys and numbers of tokens, (N,) long."""
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.arange(len(first), device=rows.device) - first
    return mixed_bits(rows.repeat_interleave(counts) + mixed_bits(places + 1))
