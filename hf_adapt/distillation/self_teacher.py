"""The student's own past as its teacher."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.distillation.placement import on_device_of
from hf_adapt.distillation.teachers import Teacher
from hf_adapt.models.averages import move_towards
from hf_adapt.models.copies import copied

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


class SelfTeacher(Teacher):
    """The student's own past: an exponential moving average of its weights, or earlier weights.

    The average is stored and run in float32.

    Reference:
        Tarvainen & Valpola 2017, "Mean teachers are better role models", arXiv:1703.01780
        (`decay`); Furlanello et al. 2018, "Born-Again Neural Networks", arXiv:1805.04770 and Kim
        et al. 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets",
        arXiv:2006.12000 (`every_steps`).

    Args:
        decay: Decay of the moving average for each optimizer step, from 0 to 1.
        every_steps: Instead of an average, copy the student's weights every so many steps.

    Raises:
        ValueError: If both or neither are given or out of range, or the model is sharded.

    Example:
        >>> SelfTeacher(decay=0.99).decay
        0.99
    """

    def __init__(self, decay: float | None = None, every_steps: int | None = None) -> None:
        if decay is None and every_steps is None:
            decay = 0.999
        if decay is not None and every_steps is not None:
            raise ValueError("SelfTeacher takes decay or every_steps, not both.")
        if decay is not None and not 0.0 <= decay <= 1.0:
            raise ValueError(f"SelfTeacher(decay={decay}): expected a number from 0 to 1.")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"SelfTeacher(every_steps={every_steps}): expected at least 1.")
        self.decay, self.every_steps = decay, every_steps
        self.name = "the student's own weights"
        self._student: nn.Module | None = None
        self._step: int | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: Trainer, student: nn.Module) -> None:
        """Copy the student."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "SelfTeacher needs the student's whole weights on each process; FSDP and DeepSpeed "
                "shard them. Use DDP, or a saved model as the teacher."
            )
        self._student, self._step = student, None
        # In float32: small steps would be rounded away in half precision.
        self.module = copied(student).float().eval().requires_grad_(False)

    def begin(self, trainer: Trainer) -> None:
        """Start from the weights that training starts from (a checkpoint's are loaded by now)."""
        assert self.module is not None and self._student is not None
        self.module.to(trainer.args.device)
        self.module.load_state_dict(self._student.state_dict())
        self._step = None

    def before_step(self, step: int) -> None:
        """Follow the student by one step."""
        assert self.module is not None and self._student is not None
        if self._loaded:
            self.module.load_state_dict(self._loaded["weights"])
            self._step, self._loaded = int(self._loaded["step"]), {}
        if self._step is None and step > 0:
            logger.warning(
                "The checkpoint holds no average of the student (it was saved by another Trainer, "
                "or with save_only_model=True): it starts again, from the checkpoint's weights."
            )
        if self._step is None or step <= self._step:
            self._step = step if self._step is None else self._step
            return
        self._step = step
        if self.every_steps is not None:
            if step % self.every_steps == 0:
                self.module.load_state_dict(self._student.state_dict())
            return
        assert self.decay is not None
        # Each tensor once: tied weights have several names in a state dict.
        own = dict(self._student.named_parameters())
        move_towards(dict(self.module.named_parameters()), own, self.decay)
        buffers = dict(self._student.named_buffers())
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])

    def __call__(self, **inputs: Any) -> Any:
        """The average's outputs."""
        assert self.module is not None
        like = next(self.module.parameters())
        return self.module(**{key: on_device_of(like, value) for key, value in inputs.items()})

    def state_dict(self) -> dict[str, Any]:
        """The average, which nothing else holds; it is stored in checkpoints only."""
        if self.module is None or self._step is None:
            return {}
        weights = {key: value.cpu() for key, value in self.module.state_dict().items()}
        return {"weights": weights, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average, at the next step."""
        self._loaded = state if "weights" in state else {}  # else another teacher's

    def close(self) -> None:
        """Release the student."""
        self._student = None
