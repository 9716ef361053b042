"""The predictions of student and teachers on the same items and classes, so that they compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from hf_adapt.distillation.divergences import ABSENT, logit_mse
from hf_adapt.distillation.hooks import TeacherHooks
from hf_adapt.distillation.signals import Signal, TopK, bucket_logits
from hf_adapt.distillation.teachers import Teacher
from hf_adapt.distillation.tokenizers import universal_logit_distance
from hf_adapt.engine.parts import Part
from hf_adapt.models.logits import lacks_logits, projected_logits
from hf_adapt.models.structure import find_feature_module


def student_outputs(hooks: TeacherHooks, part: Part) -> Any:
    """The student's outputs; with logits, where a language model was run without (TRL).

    Raises:
        ValueError: If the logits are not a plain projection of the last hidden state.
    """
    if hooks.head.kind != "causal_lm" or not lacks_logits(part.outputs):
        return part.outputs
    hidden = part.hidden.get(id(find_feature_module(hooks.student, None)))
    return {"logits": projected_logits(hooks.student, hidden)}


def common_classes(
    hooks: TeacherHooks,
    student: torch.Tensor,
    signal: Signal,
    temperature: float,
    teacher: Teacher,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of student and teacher over the same classes.

    Raises:
        ValueError: If they predict different classes.
    """
    if isinstance(signal, TopK):
        if hooks.divergence_function is logit_mse:
            raise ValueError(
                "divergence='mse' compares logits, and a top-k store keeps probabilities. Use "
                "a divergence of probabilities, or store full logits."
            )
        return bucket_logits(student, signal, temperature)
    theirs = signal.to(student.device)
    if hooks.is_cross_tokenizer:
        return student, theirs
    if hooks.num_classes is not None:
        return student[:, : hooks.num_classes], theirs[:, : hooks.num_classes]
    if hooks.head.kind == "spans" and theirs.shape[1] < student.shape[1]:
        # A cache stores each row's own tokens; the batch may be padded further.
        more = student.shape[1] - theirs.shape[1]
        theirs = nn.functional.pad(theirs, (0, more), value=ABSENT)
    if student.shape != theirs.shape:
        raise ValueError(
            f"The student predicts {tuple(student.shape)} (items, classes) and the teacher "
            f"{teacher.name!r} {tuple(theirs.shape)}. Both must predict the same classes of "
            "the same items: use a teacher with the student's labels, or override "
            "select_logits and item_mask."
        )
    return student, theirs


def teacher_factors(
    hooks: TeacherHooks,
    inputs: Mapping[str, Any],
    signals: Sequence[Signal],
    student: torch.Tensor,
) -> Sequence[float | torch.Tensor]:
    """The factor of each teacher: a number, or one for each item.

    Raises:
        ValueError: If the function `teacher_weights` returned another shape, or needs logits that
            a top-k store does not have.
    """
    weights = hooks.teacher_weights
    if weights is None:
        return [1.0 / len(signals)] * len(signals)
    if not callable(weights):
        return list(weights)
    if any(isinstance(signal, TopK) for signal in signals):
        raise ValueError(
            "teacher_weights as a function needs each teacher's logits, which a top-k store does "
            "not have. Give numbers, or store full logits."
        )
    logits = cast("list[torch.Tensor]", list(signals))
    given = torch.as_tensor(weights(inputs, logits), device=student.device)
    if given.shape not in ((len(signals),), (len(signals), len(student))):
        raise ValueError(
            f"teacher_weights returned shape {tuple(given.shape)}; expected ({len(signals)},) "
            f"or ({len(signals)}, {len(student)}): a factor for each teacher (and item)."
        )
    return list(given.float().unbind())


def divergence_sum(
    hooks: TeacherHooks,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    factor: float | torch.Tensor,
) -> torch.Tensor:
    """The sum over the items of the divergence from one teacher, times its factor.

    Raises:
        ValueError: If `distillation_loss` returned another number of items, or no scalar.
    """
    if hooks.is_cross_tokenizer:
        return factor * universal_logit_distance(student, teacher, temperature).sum()
    if isinstance(factor, torch.Tensor) and factor.ndim == 1:
        return (factor * hooks.divergence(student, teacher, temperature)).sum()
    value, count = hooks.distillation_loss(student, teacher, temperature)
    if int(count) != len(student):
        raise ValueError(
            f"distillation_loss returned a count of {int(count)} for {len(student)} items. The "
            "sum is divided by the items of the whole optimizer step, which are counted before "
            "the forward: override item_mask to distil fewer items."
        )
    if value.ndim:
        raise ValueError(
            f"distillation_loss returned a sum of shape {tuple(value.shape)}; expected a "
            "scalar: the sum over the items."
        )
    return factor * value
