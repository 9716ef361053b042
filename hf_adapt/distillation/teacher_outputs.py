"""What a teacher computes for a micro-batch: its predictions, and the layers that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_adapt.distillation.cache import CachedTeacher
from hf_adapt.distillation.features import Captured
from hf_adapt.distillation.hooks import TeacherHooks
from hf_adapt.distillation.signals import Signal
from hf_adapt.distillation.teachers import Teacher
from hf_adapt.distillation.tokenizers import paired_positions
from hf_adapt.engine.parts import Part
from hf_adapt.models.capture import capturing
from hf_adapt.models.copies import WeightsInUse


@dataclass
class TeacherOutput:
    """A teacher's predictions and features for one micro-batch.

    Attributes:
        signal: The predictions of the items.
        captured: The outputs of the layers that features compare.
        item_mask: The student's items that are compared, if not all that are distilled.
    """

    signal: Signal
    captured: Captured = field(default_factory=dict)
    item_mask: torch.Tensor | None = None


def teacher_output(hooks: TeacherHooks, teacher: Teacher, part: Part) -> TeacherOutput:
    """Ask a teacher, or its cache, for a micro-batch."""
    mask = hooks.items(part)
    if hooks.is_cross_tokenizer:
        return _cross_tokenizer_output(hooks, teacher, part, mask)
    inputs = teacher_inputs(hooks, part)
    if isinstance(teacher, CachedTeacher):
        return _cached_output(hooks, teacher, inputs, part, mask)
    with torch.no_grad(), capturing_teacher(hooks) as take:
        outputs = call_teacher(hooks, teacher, inputs)
        signal = hooks.select_logits(outputs, part.inputs, mask)
        return TeacherOutput(signal, take())


def teacher_inputs(hooks: TeacherHooks, part: Part) -> dict[str, Any]:
    """The teacher's inputs for a micro-batch."""
    with torch.no_grad():
        return hooks.teacher_inputs({**part.inputs, **part.extra}, part.columns)


def capturing_teacher(
    hooks: TeacherHooks,
) -> AbstractContextManager[Callable[[], dict[nn.Module, Any]]]:
    """Capture the teacher's layers that features compare."""
    return capturing({m: e for loss in hooks.features for m, e in loss.teacher_captures.items()})


def call_teacher(hooks: TeacherHooks, teacher: Any, inputs: Mapping[str, Any]) -> Any:
    """Run a teacher.

    Raises:
        ValueError: If its predictions require a gradient, or a model's first forward used the
            student's weights.
    """
    module = getattr(teacher, "module", None)
    is_new = module is not None and id(module) not in hooks.independent
    watched = WeightsInUse(hooks.student) if is_new else nullcontext()
    with torch.no_grad(), hooks.autocast(), watched:
        outputs = hooks.teacher_forward(teacher, inputs)
    if isinstance(watched, WeightsInUse):
        watched.check(teacher.name)
        hooks.independent.add(id(module))
    logits = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "logits", None)
    if isinstance(logits, torch.Tensor) and logits.requires_grad:
        raise ValueError(
            "The teacher's predictions require a gradient: it enabled gradients, which would keep "
            "its whole graph in memory. Compute them under torch.no_grad(), or detach them."
        )
    return outputs


def _cached_output(
    hooks: TeacherHooks,
    teacher: CachedTeacher,
    inputs: Mapping[str, Any],
    part: Part,
    mask: torch.Tensor,
) -> TeacherOutput:
    def compute() -> torch.Tensor:
        outputs = call_teacher(hooks, teacher.teacher, inputs)
        return hooks.select_logits(outputs, part.inputs, mask)

    counts = hooks.head.row_counts(mask, hooks.num_labels)
    with torch.no_grad():
        ragged = hooks.head.kind == "spans"
        return TeacherOutput(teacher.signal(inputs, mask, counts, compute, ragged))


def _cross_tokenizer_output(
    hooks: TeacherHooks, teacher: Teacher, part: Part, mask: torch.Tensor
) -> TeacherOutput:
    """The predictions of a language model with another tokenizer, position by position."""
    assert hooks.retokenizer is not None
    inputs, theirs = hooks.retokenizer.completions(part.inputs, mask)
    own_mask, their_mask = paired_positions(mask, theirs)
    with torch.no_grad():
        outputs = call_teacher(hooks, teacher, inputs)
        signal = hooks.select_logits(outputs, inputs, their_mask)
    return TeacherOutput(signal, item_mask=own_mask)
