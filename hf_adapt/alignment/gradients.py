"""Gradients that are taken within a forward, of methods that look for the worst change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def gradient_of(
    term: torch.Tensor, inputs: Sequence[torch.Tensor], retain_graph: bool = True
) -> list[torch.Tensor]:
    """The gradient of a term, which leaves the parameters' own gradients alone.

    Raises:
        ValueError: If the model is run in reentrant gradient checkpoints.
    """
    found: Any  # None for what the term does not depend on
    try:
        found = torch.autograd.grad(
            term, list(inputs), retain_graph=retain_graph, allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "A gradient within a forward cannot be had from reentrant gradient checkpoints. Pass "
            " gradient_checkpointing_kwargs={'use_reentrant': False}."
        ) from error
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
