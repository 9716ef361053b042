"""Whole gradients and weights: what adaptations do between a step's last backward and its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.mixins import GradientTransform, WeightTransform

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.adaptation import Adaptation


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
    transforms = [each for each in transforms if each.transforms_gradients]
    if not transforms:
        return
    scale = loss_scale(trainer) or 1.0
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


class WeightTransforms:
    """Lets adaptations work on the weights around the steps of the optimizer.

    Args:
        model: The unwrapped model.
        transforms: The adaptations.
    """

    def __init__(self, model: nn.Module, transforms: Sequence[WeightTransform]) -> None:
        self.model = model
        self.transforms = list(transforms)
        self._scale: float | None = None

    @torch.no_grad()
    def before(self, trainer: Trainer) -> None:
        """The optimizer steps next."""
        if not self.transforms:
            return
        self._scale = loss_scale(trainer)
        for adaptation in self.transforms:
            adaptation.before_optimizer_step(self.model)

    @torch.no_grad()
    def after(self, trainer: Trainer) -> None:
        """The optimizer has stepped, or has skipped; its groups are still those of the step."""
        if not self.transforms or step_was_skipped(trainer, self._scale):
            return
        groups: Any = trainer.optimizer.param_groups if trainer.optimizer is not None else []
        rates = {p: float(group["lr"]) for group in groups for p in group["params"]}
        for adaptation in self.transforms:
            adaptation.after_optimizer_step(self.model, rates)


def loss_scale(trainer: Trainer) -> float | None:
    """The factor of the loss under fp16; None where there is none."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None


def step_was_skipped(trainer: Trainer, scale: float | None) -> bool:
    """Whether the optimizer has left out the step because gradients overflowed.

    Args:
        trainer: The Trainer, after the step.
        scale: The loss scale before the step. It falls exactly when gradients overflowed. (A fused
            optimizer is informed inside its kernel, so that accelerate does not learn of it.)
    """
    if trainer.accelerator.optimizer_step_was_skipped:
        return True
    now = loss_scale(trainer)
    return scale is not None and now is not None and now < scale


def check_whole_gradients(trainer: Trainer, adaptations: Sequence[Adaptation]) -> None:
    """Refuse what shards gradients and weights, before anything is trained.

    Raises:
        ValueError: Under FSDP or DeepSpeed.
    """
    transforms: list[Adaptation] = [a for a in adaptations if isinstance(a, WeightTransform)]
    transforms += [
        a for a in adaptations if isinstance(a, GradientTransform) and a.transforms_gradients
    ]
    if transforms and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        what = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"{', '.join(a.name for a in transforms)} works on whole gradients and weights, and "
            f"{what} gives each process a piece of them. Use DDP, or leave it out."
        )


def _multiply(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
