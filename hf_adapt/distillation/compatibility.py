"""Checks before training: student, teachers, data and options fit each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_adapt.distillation.cache import CachedTeacher
from hf_adapt.distillation.checks import (
    Classes,
    check_kinds,
    check_labels,
    check_regression,
    check_sequence_length,
    shared_vocabulary,
)
from hf_adapt.distillation.hooks import TeacherHooks
from hf_adapt.engine.texts import check_dataset, named_datasets
from hf_adapt.engine.training import added_inputs, target_datasets, unwrapped_model

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


def open_cache(
    hooks: TeacherHooks, cache: CachedTeacher, trainer: Trainer, is_scheduled: bool
) -> None:
    """Open a cached teacher's folder for a run.

    Args:
        hooks: The teachers and how they are asked.
        cache: One of the teachers.
        trainer: The Trainer.
        is_scheduled: Whether the temperature is a schedule.

    Raises:
        ValueError: If the folder holds something else, or a schedule meets a top-k store.
    """
    sizes = [Classes.of(model).vocabulary for model in (unwrapped_model(trainer), cache.module)]
    cache.open(
        hooks.teacher_processing_class or trainer.processing_class,
        trainer.args.process_index,
        min((size for size in sizes if size is not None), default=None),
        str(trainer.accelerator.mixed_precision),
        hooks.overridden("teacher_forward", "select_logits"),
    )
    top_k, temperature = cache.format.top_k, cache.format.temperature
    if top_k is not None and is_scheduled:
        raise ValueError(
            f"{cache.name} are the top {top_k} at temperature {temperature}, and the "
            "distillation's temperature is a schedule. Give that number, or store full logits "
            "(top_k=None)."
        )


def bind_student(hooks: TeacherHooks, trainer: Trainer) -> None:
    """Bind the teachers to the student; compare labels, vocabularies and lengths.

    Raises:
        ValueError: If they do not fit.
    """
    tokenizer = trainer.processing_class
    hooks.bind(unwrapped_model(trainer), trainer.label_names, tokenizer)
    hooks.student_only_inputs = set(added_inputs(trainer))
    own, shared = Classes.of(hooks.student), []
    for teacher in hooks.teachers:
        theirs = Classes.of(teacher.module)
        if teacher.module is None and isinstance(teacher, CachedTeacher):
            theirs = teacher.classes
        if not hooks.overridden("select_logits"):
            check_labels(own, theirs)
            check_kinds(hooks.head, teacher.module)
        if hooks.retokenizer is None:
            shared.append(shared_vocabulary(own, theirs, tokenizer))
            if teacher.module is not None:
                check_sequence_length(hooks.student, teacher.module)
    hooks.num_classes = min((size for size in shared if size is not None), default=None)


def check_texts(trainer: Trainer, columns: Sequence[str], is_evaluated: bool) -> None:
    """Refuse datasets without the text that a teacher with another tokenizer reads.

    Raises:
        ValueError: Naming the dataset and the column or row.
    """
    given = [*named_datasets(trainer.train_dataset, target_datasets(trainer))]
    evaluated = trainer.eval_dataset
    if is_evaluated and evaluated is not None:
        parts = evaluated.items() if isinstance(evaluated, dict) else [("", evaluated)]
        given += [("eval_dataset" + f"[{key!r}]" * bool(key), data) for key, data in parts]
    for name, dataset in given:
        check_dataset(dataset, columns, name)


def check_method(hooks: TeacherHooks, trainer: Trainer, logits_weight: float) -> None:
    """Refuse a loss, a cache or features that do not fit the head or the tokenizer.

    Raises:
        ValueError: If they do not fit.
    """
    if logits_weight and not hooks.overridden("divergence", "distillation_loss", "select_logits"):
        check_regression(hooks.student, hooks.head, hooks.divergence_function)
    if hooks.overridden("distillation_loss") and callable(hooks.teacher_weights):
        raise ValueError(
            "distillation_loss gives one sum for all items, so teacher_weights cannot weigh "
            "them one by one. Override divergence instead, or give numbers."
        )
    has_cache = any(teacher.is_cached for teacher in hooks.teachers)
    if has_cache and hooks.is_cross_tokenizer:
        raise ValueError(
            "A language model with another tokenizer is run in each step: its positions depend on "
            "both tokenizers. Pass the teacher itself, not a CachedTeacher."
        )
    if has_cache and getattr(trainer.data_collator, "mlm", False):
        logger.warning(
            "The data collator masks other tokens in each epoch, so a cached teacher's "
            "predictions are hardly ever found again. Mask once beforehand, or drop the cache."
        )
    if hooks.features and hooks.retokenizer is not None:
        raise ValueError(
            f"{', '.join(type(feature).__name__ for feature in hooks.features)} compare layers "
            "token by token, or pool them with the student's mask, and a teacher with another "
            "tokenizer has other tokens. Drop features, or use a teacher with the student's "
            "tokenizer."
        )
    if hooks.features and hooks.teachers[0].module is None:
        raise ValueError(
            f"{type(hooks.features[0]).__name__} needs a teacher with layers; "
            f"{type(hooks.teachers[0]).__name__} has none."
        )
