"""Checks of the arguments of `chunked_distillation_loss`."""

from __future__ import annotations

import torch
from torch import Tensor


def require(holds: bool, expected: str, got: object, fix: str) -> None:
    """Refuse an argument of `chunked_distillation_loss`."""
    if not holds:
        raise ValueError(f"chunked_distillation_loss expects {expected}, got {got}. {fix}")


def check_head(whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse hidden states, a weight and a bias that do not fit each other."""
    require(
        hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1],
        f"{whose}_hidden (N, H) and {whose}_weight (V, H) with the same H",
        f"{tuple(hidden.shape)} and {tuple(weight.shape)}",
        "Flatten batch and sequence, and pass the output projection's weight as it is.",
    )
    require(
        bias is None or bias.shape == weight.shape[:1],
        f"{whose}_bias of shape ({len(weight)},), one value for each class of its weight",
        None if bias is None else tuple(bias.shape),
        "Pass the bias of the same output projection.",
    )


def check_tokens(number: int, **tokens: Tensor | None) -> None:
    """Refuse tensors that have not one entry for each token."""
    for name, value in tokens.items():
        require(
            value is None or value.shape[: 2 - (name == "teacher_hidden")] == (number,),
            f"{name} of {number} rows, one for each of student_hidden",
            None if value is None else tuple(value.shape),
            "Both models must read the same tokens; shift and flatten all of them alike.",
        )
    mask = tokens["kd_mask"]
    got = None if mask is None else mask.dtype
    require(got in (None, torch.bool), "kd_mask of torch.bool", got, "Pass kd_mask != 0.")


def check_classes(student: int, teacher: int, vocabulary: int | None) -> None:
    """Refuse heads whose classes cannot be compared."""
    require(
        vocabulary is not None or student == teacher,
        "student_weight and teacher_weight of the same number of classes",
        f"{student} and {teacher}",
        "If a head is padded, pass vocabulary=, the number of classes that both have in common.",
    )
    require(
        vocabulary is None or 1 <= vocabulary <= min(student, teacher),
        f"vocabulary between 1 and {min(student, teacher)}, the classes of the smaller head",
        vocabulary,
        "Pass the size of the tokenizer that both models share.",
    )
