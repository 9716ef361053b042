"""Numbers made of tokens: random choices that batching, processes and resuming do not change."""

from __future__ import annotations

import torch


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
