"""Auxiliary modules (discriminators, projections) and the optimizer of their own.

They live outside the model, so that its checkpoint stays a plain Hugging Face model, and outside
its optimizer, so that a plain Trainer can resume it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.gradients import loss_scale, step_was_skipped

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.adaptation import Adaptation


def seed_for(name: str, seed: int) -> int:
    """A seed that depends on the run's seed and on a name, the same in every process."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


class AuxiliaryOptimizer:
    """AdamW over the auxiliary modules, in step with the Trainer's own optimizer.

    Its learning rates follow the run's base schedule at `global_step`. Gradients are unscaled,
    averaged over processes and clipped as the model's are. It steps after the main optimizer has,
    because only then is known whether a main step was skipped for an overflow; if so, or if a
    gradient here overflowed, it does not step.
    """

    def __init__(self, adaptations: Sequence[Adaptation]) -> None:
        groups, self.names = [], []
        for adaptation in adaptations:
            if adaptation.module is None:
                continue
            trainable = [p for p in adaptation.module.parameters() if p.requires_grad]
            lr = adaptation.learning_rate
            for params, rate in _by_decay(trainable, adaptation.weight_decay):
                groups.append({"params": params, "lr": lr, "peak_lr": lr, "weight_decay": rate})
                self.names.append(adaptation.name)
        self.optimizer = torch.optim.AdamW(groups) if groups else None
        self._scale: float | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained auxiliary parameters."""
        if self.optimizer is None:
            return []
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def before_main_step(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        """Unscale, average over processes and clip the gradients.

        Returns:
            The gradient norm of each adaptation's modules, before clipping.
        """
        if self.optimizer is None:
            return {}
        parameters = self.parameters
        for parameter in parameters:
            if parameter.grad is None:  # no item of this term in the step: all ranks must agree
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._scale = loss_scale(trainer)
        flat = torch.cat([g.flatten() for g in gradients])
        if self._scale is not None:
            flat = flat / self._scale
        if trainer.accelerator.num_processes > 1:
            flat = trainer.accelerator.reduce(flat, reduction="mean")
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        norms: dict[str, torch.Tensor] = {}
        for name, group in zip(self.names, self.optimizer.param_groups, strict=True):
            found = [p.grad.norm() for p in group["params"]]
            found += [norms[name]] if name in norms else []
            norms[name] = torch.stack(found).norm()
        if trainer.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        return norms

    def after_main_step(self, trainer: Trainer, factor: Callable[[int], float]) -> bool:
        """Step, unless the main step was skipped or a gradient here is not finite.

        Returns:
            Whether it stepped.
        """
        if self.optimizer is None:
            return False
        skipped = step_was_skipped(trainer, self._scale)
        if self._scale is not None and not skipped:
            skipped = not all(
                bool(torch.isfinite(p.grad).all()) for p in self.parameters if p.grad is not None
            )
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor(trainer.state.global_step)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return not skipped

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, with the names of its groups."""
        state = {} if self.optimizer is None else self.optimizer.state_dict()
        return {"names": self.names, "optimizer": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state back.

        Raises:
            ValueError: If it was saved with other adaptations.
        """
        if state["names"] != self.names:
            raise ValueError(
                f"The checkpoint's auxiliary modules are those of {state['names']}, this run has "
                f"{self.names}. Resume with the same adaptations, in the same order."
            )
        if self.optimizer is not None:
            rates = [(g["lr"], g["peak_lr"]) for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, (lr, peak) in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"], group["peak_lr"] = lr, peak


def _by_decay(
    parameters: list[nn.Parameter], decay: float
) -> list[tuple[list[nn.Parameter], float]]:
    """Parameters by their weight decay: as in the Trainer, biases and norms have none."""
    matrices = [p for p in parameters if p.ndim > 1 or not decay]
    others = [p for p in parameters if p.ndim < 2 and decay]
    return [(each, rate) for each, rate in ((matrices, decay), (others, 0.0)) if each]


def base_schedule(trainer: Trainer) -> Callable[[int], float]:
    """The run's learning-rate factor as a function of `global_step`, whatever a part's own is.

    A schedule that is a pure function is evaluated as one; another (one that reacts to a metric) is
    read off the main optimizer's first group.
    """
    if isinstance(trainer.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
        return trainer.lr_scheduler.lr_lambdas[0]

    def ratio(step: int) -> float:
        assert trainer.optimizer is not None
        group = trainer.optimizer.param_groups[0]
        peak = group.get("initial_lr", trainer.args.learning_rate)
        return float(group["lr"]) / float(peak) if peak else 0.0

    return ratio
