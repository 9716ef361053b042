"""Whole gradients between the last backward of an optimizer step and their clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_adapt.engine.mixins import GradientTransform

if TYPE_CHECKING:
    from transformers import Trainer


def transform_gradients(
    trainer: Trainer, model: nn.Module, transforms: Sequence[GradientTransform]
) -> None:
    """Let adaptations work on the gradients of a step.

    Under fp16 they see them without the loss scale, which is a power of two, so that taking it
    off and putting it on again changes no bit; a step whose gradients overflowed is left alone.

    Args:
        trainer: The Trainer, after the last backward (DDP has averaged the gradients).
        model: The unwrapped model.
        transforms: The adaptations.

    Raises:
        ValueError: Under FSDP or DeepSpeed.
    """
    if not transforms:
        return
    scaler = getattr(trainer.accelerator, "scaler", None)
    scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
    if scale != 1.0:
        _multiply(model, 1.0 / scale)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            _multiply(model, scale)  # the scaler will find the overflow and skip the step
            return
    with torch.no_grad():
        for adaptation in transforms:
            adaptation.transform_gradients(model)
    if scale != 1.0:
        _multiply(model, scale)


def check_whole_gradients(trainer: Trainer, transforms: Sequence[GradientTransform]) -> None:
    """Refuse what shards gradients, before anything is trained.

    Raises:
        ValueError: Under FSDP or DeepSpeed.
    """
    if transforms and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        what = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"{', '.join(a.name for a in transforms)} works on whole gradients, and {what} gives "
            "each process a piece of them. Use DDP, or leave it out."
        )


def _multiply(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
