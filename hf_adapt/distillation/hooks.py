"""How teachers are asked, and the hooks that a user overrides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_adapt.distillation.cache import CachedTeacher, Signal
from hf_adapt.distillation.checks import num_positions
from hf_adapt.distillation.divergences import Divergence, named_divergence
from hf_adapt.distillation.features import Captured, FeatureLoss
from hf_adapt.distillation.heads import Head
from hf_adapt.distillation.teachers import NOT_FOR_TEACHERS, Teacher, as_teacher
from hf_adapt.distillation.tokenizers import Retokenizer, paired_positions, same_vocabulary
from hf_adapt.engine.parts import Part
from hf_adapt.models.capture import Extract, capturing
from hf_adapt.models.copies import WeightsInUse


@dataclass
class Lesson:
    """What a teacher says of one part of a batch.

    Attributes:
        signal: Its predictions of the items.
        seen: What the taps on its layers saw.
        item_mask: Which of the student's items it speaks of, if not all that are distilled.
    """

    signal: Signal
    seen: Captured = field(default_factory=dict)
    item_mask: torch.Tensor | None = None


class TeacherHooks:
    """What is distilled, what a teacher sees and how its answers are compared, step by step.

    Args:
        teacher: One teacher or several, of whatever kind.
        divergence: A name or a function.
        features: Terms on layers, whose taps see the teacher's forward.
        teacher_processing_class: The teacher's tokenizer, if it is another one.
        text_column: The column with the text, or two for pairs.

    Raises:
        ValueError: If there is no teacher.
    """

    def __init__(
        self,
        teacher: Any,
        divergence: str | Divergence,
        features: Sequence[FeatureLoss],
        teacher_processing_class: Any,
        text_column: str | Sequence[str] | None,
    ) -> None:
        given = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        if not given:
            raise ValueError("Distillation needs at least one teacher, got an empty list.")
        self.teachers: list[Teacher] = [as_teacher(one) for one in given]
        self.divergence_function = named_divergence(divergence)
        self.features = list(features)
        self.teacher_processing_class = teacher_processing_class
        self.text_column = text_column
        self.hooks: Any = self
        self.hooks_class: type = TeacherHooks
        self.head = Head("rows")
        self._student = nn.Module()  # until `bind`
        self._label_names: set[str] = {"labels"}
        self._added_inputs: set[str] = set()
        self._classes: int | None = None
        self._retokenizer: Retokenizer | None = None
        self._independent: set[int] = set()  # ids of the teachers' models that were looked at
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    # ---- the hooks: override any of them ----

    def item_mask(
        self, inputs: Mapping[str, Any], domain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Which items are distilled, (B,) or (B, T) bool; known before the forward."""
        return self.head.item_mask(inputs, domain)

    def teacher_inputs(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """What the teacher sees: the student's inputs without labels, or its own tokens."""
        if self._retokenizer is not None and self.head.kind != "causal_lm":
            return self._retokenizer.rows(inputs, columns)
        drop = {*self._label_names, *NOT_FOR_TEACHERS, *self._added_inputs}
        given = {key: value for key, value in inputs.items() if key not in drop}
        if self._feeds_decoder and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = self._decoder_inputs(inputs)
        return given

    @property
    def _feeds_decoder(self) -> bool:
        """Whether the decoder predicts the labels, which the model shifts for it."""
        return self.head.is_encoder_decoder and self.head.kind == "tokens"

    def teacher_forward(self, teacher: Any, inputs: Mapping[str, Any]) -> Any:
        """The teacher's outputs; called without gradients."""
        return teacher(**inputs)

    def select_logits(
        self, outputs: Any, inputs: Mapping[str, Any], mask: torch.Tensor
    ) -> torch.Tensor:
        """The logits (N, C) of the items in the student's or the teacher's outputs."""
        return self.head.select(outputs, inputs, mask)

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """How far the student is from its teacher, (N,)."""
        return self.divergence_function(student_logits, teacher_logits, temperature)

    def distillation_loss(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, int]:
        """The sum over the items, and their number."""
        values = self.hooks.divergence(student_logits, teacher_logits, temperature)
        return values.sum(), len(values)

    @property
    def is_cross_tokenizer(self) -> bool:
        """Whether language models with two vocabularies are compared."""
        return self._retokenizer is not None and self.head.kind == "causal_lm"

    def bind(
        self,
        student: nn.Module,
        label_names: Sequence[str] = (),
        processing_class: Any = None,
    ) -> None:
        """Take from a student what is needed to ask the teachers.

        Args:
            student: The model, or one with the same head.
            label_names: Inputs that are labels, besides `"labels"`.
            processing_class: The student's tokenizer.

        Raises:
            ValueError: If the teacher has another tokenizer and the head cannot do with that.
        """
        self._label_names = {*label_names, "labels"}
        self._classes = None
        self._independent = {id(student)}
        if self._student is not student:
            self._student, self.head = student, Head.of(student)
        self._retokenizer = None
        theirs = self.teacher_processing_class
        if theirs is not None and not same_vocabulary(processing_class, theirs):
            positions = num_positions(self.teachers[0].module)
            self._retokenizer = Retokenizer(processing_class, theirs, self.text_column, positions)
            if self.head.kind not in ("rows", "labels", "values", "causal_lm") or (
                self.head.is_encoder_decoder
            ):
                raise ValueError(
                    "A teacher with another tokenizer works for classification of rows and for "
                    f"causal language models; {type(student).__name__} predicts per token. Use a "
                    "teacher with the student's tokenizer."
                )

    def _overridden(self, *hooks: str) -> list[str]:
        """Names of the user's versions of these hooks."""
        pairs = ((type(self), TeacherHooks), (type(self.hooks), self.hooks_class))
        found = [
            getattr(own, hook)
            for hook in hooks
            for own, base in pairs
            if getattr(own, hook) is not getattr(base, hook)
        ]
        return list(dict.fromkeys(getattr(version, "__qualname__", "?") for version in found))

    def _overrides(self, *hooks: str) -> bool:
        """Whether the user has a version of one of these hooks."""
        return bool(self._overridden(*hooks))

    # ---- asking a teacher ----

    def ask(self, inputs: Mapping[str, Any], domain: torch.Tensor | None = None) -> list[Signal]:
        """What each teacher says of a batch; a cached one keeps it. [`bind`] comes first.

        Args:
            inputs: The student's inputs.
            domain: (B,) long, 0 for source rows; None if all are.
        """
        if domain is None:
            size = len(self.hooks.item_mask(inputs))
            domain = torch.zeros(size, dtype=torch.long)
        part = Part(inputs, domain)
        return [self._lesson(teacher, part).signal for teacher in self.teachers]

    def _lesson(self, teacher: Teacher, part: Part) -> Lesson:
        """The teacher's predictions and features for a part."""
        mask = self.hooks.item_mask(part.inputs, part.domain)
        if self.is_cross_tokenizer:
            return self._foreign_lesson(teacher, part, mask)
        with torch.no_grad():
            inputs = self.hooks.teacher_inputs({**part.inputs, **part.extra}, part.columns)
            if isinstance(teacher, CachedTeacher):
                counts = self._row_counts(mask)

                def compute() -> torch.Tensor:
                    return self._asked(teacher.teacher, inputs, part.inputs, mask)

                ragged = self.head.kind == "spans"
                return Lesson(teacher.signal(inputs, mask, counts, compute, ragged))
            with capturing(self._teacher_taps()) as take:
                signal = self._asked(teacher, inputs, part.inputs, mask)
                return Lesson(signal, take())

    def _teacher_taps(self) -> dict[nn.Module, Extract | None]:
        return {m: e for feature in self.features for m, e in feature.teacher_taps.items()}

    def _row_counts(self, mask: torch.Tensor) -> list[int]:
        return self.head.row_counts(mask, self._num_labels)

    @property
    def _num_labels(self) -> int:
        return int(getattr(getattr(self._student, "config", None), "num_labels", 1))

    def _called(self, teacher: Any, inputs: Mapping[str, Any]) -> Any:
        module = getattr(teacher, "module", None)
        is_new = module is not None and id(module) not in self._independent
        watched = WeightsInUse(self._student) if is_new else nullcontext()
        with torch.no_grad(), self._autocast(), watched:
            outputs = self.hooks.teacher_forward(teacher, inputs)
        if isinstance(watched, WeightsInUse):
            watched.check(teacher.name)
            self._independent.add(id(module))
        logits = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "logits", None)
        if isinstance(logits, torch.Tensor) and logits.requires_grad:
            raise ValueError(
                "The teacher's predictions require a gradient: it turned gradients on again, which "
                "would keep its whole graph in memory. Compute them under torch.no_grad(), or "
                "detach them."
            )
        return outputs

    def _asked(
        self,
        teacher: Any,
        inputs: Mapping[str, Any],
        student_inputs: Mapping[str, Any],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        outputs = self._called(teacher, inputs)
        logits: torch.Tensor = self.hooks.select_logits(outputs, student_inputs, mask)
        return logits

    def _foreign_lesson(self, teacher: Teacher, part: Part, mask: torch.Tensor) -> Lesson:
        """The predictions of a language model with another tokenizer, position by position."""
        assert self._retokenizer is not None
        inputs, theirs = self._retokenizer.completions(part.inputs, mask)
        own_mask, their_mask = paired_positions(mask, theirs)
        with torch.no_grad():
            outputs = self._called(teacher, inputs)
            signal = self.hooks.select_logits(outputs, inputs, their_mask)
        return Lesson(signal, item_mask=own_mask)

    def _decoder_inputs(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What the decoder is fed, made of the labels as the model itself makes it."""
        prepare = getattr(self._student, "prepare_decoder_input_ids_from_labels", None)
        if not callable(prepare) or "labels" not in inputs:
            raise ValueError(
                f"{type(self._student).__name__} needs decoder_input_ids, and they cannot be made: "
                "there are no labels, or it does not say how. Put them into the batch "
                "(DataCollatorForSeq2Seq(model=model) does)."
            )
        made: torch.Tensor = prepare(labels=inputs["labels"])
        return made
