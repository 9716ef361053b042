"""Checks of a student and a teacher: labels, vocabularies, kinds of heads, lengths."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_adapt.distillation.divergences import (
    Divergence,
    JensenShannon,
    forward_kl,
    reverse_kl,
)
from hf_adapt.distillation.heads import Head
from hf_adapt.models.structure import unwrapped_base

logger = logging.getLogger(__name__)


class Classes(NamedTuple):
    """The classes that a model predicts.

    Attributes:
        names: Names of the labels, in their order.
        vocabulary: Size of the vocabulary of a language model's head.
    """

    names: tuple[str, ...] | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: nn.Module | None) -> Classes:
        """The classes of this model; unknown for None."""
        if model is None:
            return cls()
        base = unwrapped_base(model)
        get = getattr(base, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if head is not None:
            size = getattr(head, "out_features", None)
            weight = getattr(head, "weight", None)
            if size is None and isinstance(weight, torch.Tensor):
                size = weight.shape[0]
            return cls(None, size)
        names = getattr(_config(model), "id2label", None)
        return cls(tuple(str(names[key]) for key in sorted(names, key=int)) if names else None)


def _config(model: nn.Module) -> Any:
    return getattr(unwrapped_base(model), "config", None)


def check_labels(student: Classes, teacher: Classes) -> None:
    """Refuse a teacher whose labels are not the student's, by number or by name.

    Raises:
        ValueError: If their numbers differ, or the same names stand in another order.
    """
    own, theirs = student.names, teacher.names
    if own is None or theirs is None:
        return
    if len(own) != len(theirs):
        raise ValueError(
            f"The student has {len(own)} labels {list(own)} and the teacher {len(theirs)} "
            f"{list(theirs)}. Use a teacher of the same labels, load the student with "
            f"num_labels={len(theirs)}, or override select_logits."
        )
    generic = tuple(f"LABEL_{i}" for i in range(len(own)))
    lower, their_lower = [n.lower() for n in own], [n.lower() for n in theirs]
    if generic in (own, theirs) or lower == their_lower:
        return
    if sorted(lower) == sorted(their_lower):
        raise ValueError(
            f"Student and teacher have the same labels in another order: {list(own)} and "
            f"{list(theirs)}. Number the student's labels as the teacher's (id2label=teacher."
            "config.id2label, label2id=…, and the data's labels with them)."
        )
    logger.warning(
        "Student and teacher name their labels differently: %s and %s. They are compared by "
        "position.",
        list(own),
        list(theirs),
    )


def shared_vocabulary(student: Classes, teacher: Classes, tokenizer: Any) -> int | None:
    """The number of classes to compare where one of two vocabularies is padded.

    Args:
        student: The student's classes.
        teacher: The teacher's classes.
        tokenizer: The Trainer's processing class; its length says how much is padding.

    Returns:
        The number of classes, or None for all.

    Raises:
        ValueError: If more than padding differs.
    """
    own, theirs = student.vocabulary, teacher.vocabulary
    if own is None or theirs is None or own == theirs:
        return None
    try:
        length = len(tokenizer)
    except TypeError:
        length = None
    smaller = min(own, theirs)
    if length is None or length > smaller:
        have = (
            "there is no tokenizer to tell padding by"
            if length is None
            else f"the tokenizer has {length} tokens, more than {smaller}"
        )
        raise ValueError(
            f"The student's vocabulary has {own} entries and the teacher's {theirs}, and {have}. "
            "Pass the tokenizer as processing_class= if one is only padded, or "
            "teacher_processing_class= if the teacher has a tokenizer of its own."
        )
    logger.warning(
        "The vocabularies are padded differently (student %d, teacher %d, tokenizer %d): the "
        "first %d entries are compared.",
        own,
        theirs,
        length,
        smaller,
    )
    return smaller


def check_regression(student: nn.Module, head: Head, divergence: Divergence) -> None:
    """Refuse to compare the outputs of a regression as if they were a distribution.

    Raises:
        ValueError: If the head is a regression's and the divergence is one of distributions.
    """
    compares_distributions = divergence in (forward_kl, reverse_kl) or isinstance(
        divergence, JensenShannon
    )
    if head.kind == "values" and compares_distributions:
        number = getattr(_config(student), "num_labels", None)
        raise ValueError(
            f"{type(unwrapped_base(student)).__name__} is a regression (num_labels={number}, "
            f"problem_type={getattr(_config(student), 'problem_type', None)!r}), whose outputs are "
            "numbers and no distribution over classes. Use divergence='mse'."
        )


KINDS = {
    "rows": "classifier of one label for each row",
    "labels": "multi-label classifier",
    "values": "regression",
}


def check_kinds(student: Head, teacher: nn.Module | None, labels: Any = None) -> None:
    """Refuse a teacher whose outputs have another meaning than the student's.

    Where the configuration has no `problem_type`, labels decide between one label and several.

    Args:
        student: The student's head.
        teacher: The teacher, or None if it is unknown.
        labels: The labels of a batch.

    Raises:
        ValueError: If one is a regression and the other is not, or one has several labels.
    """
    if teacher is None:
        return
    theirs = Head.of(teacher)
    if student.kind == theirs.kind or not {student.kind, theirs.kind} <= set(KINDS):
        return
    decided = theirs.is_decided and (student.is_decided or labels is not None)
    if decided or "values" in (student.kind, theirs.kind):
        raise ValueError(
            f"The student is a {KINDS[student.kind]} and the teacher a {KINDS[theirs.kind]}, so "
            "their outputs cannot be compared. Use a teacher of the same kind (problem_type in "
            "both configurations), or override select_logits."
        )


def num_positions(model: nn.Module | None) -> int | None:
    """The number of positions in a model's configuration; None if there is no such limit."""
    config = None if model is None else _config(model)
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if callable(get_text_config) else config
    number = getattr(config, "max_position_embeddings", None)
    if not isinstance(number, int) or number < 1:
        return None
    assert model is not None
    for name, module in model.named_modules():
        # RoBERTa's family counts from one after the padding's position.
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx:
            return number - module.padding_idx - 1
    return number


def check_sequence_length(student: nn.Module, teacher: nn.Module) -> None:
    """Warn of a teacher with fewer positions than its student."""
    own, theirs = num_positions(student), num_positions(teacher)
    if own is not None and theirs is not None and theirs < own:
        logger.warning(
            "The teacher has %d positions and the student %d: longer rows would fail. Truncate at "
            "%d.",
            theirs,
            own,
            theirs,
        )
