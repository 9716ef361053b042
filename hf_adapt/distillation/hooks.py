"""The hooks that a user overrides: what is distilled, from whom, and how it is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from hf_adapt.distillation.checks import num_positions
from hf_adapt.distillation.divergences import Divergence, named_divergence
from hf_adapt.distillation.features import FeatureLoss
from hf_adapt.distillation.heads import Head, decoder_inputs
from hf_adapt.distillation.teachers import NOT_FOR_TEACHERS, Teacher, as_teacher
from hf_adapt.distillation.tokenizers import Retokenizer, same_vocabulary
from hf_adapt.engine.parts import Part

HOOKS = (
    "item_mask",
    "teacher_inputs",
    "teacher_forward",
    "select_logits",
    "divergence",
    "distillation_loss",
)
"""The methods of [`TeacherHooks`] that a user may override."""

TeacherWeights = Sequence[float] | Callable[[Mapping[str, Any], list[torch.Tensor]], torch.Tensor]
"""A factor for each teacher, or a function (inputs, logits of each) -> (K,) or (K, N)."""


class TeacherHooks:
    """The teachers, and the hooks that say what is distilled and how it is compared.

    Args:
        teacher: One teacher or several, of any kind.
        divergence: A name or a function.
        teacher_weights: With several teachers, a factor for each, or a function.
        features: Losses on layers, which are captured in the teacher's forward.
        teacher_processing_class: The teacher's tokenizer, if it differs from the student's.
        text_column: The column with the text, or two columns for pairs.

    Raises:
        ValueError: If there is no teacher, or the options do not fit each other.
    """

    def __init__(
        self,
        teacher: Any,
        divergence: str | Divergence,
        teacher_weights: TeacherWeights | None = None,
        features: Sequence[FeatureLoss] = (),
        teacher_processing_class: Any = None,
        text_column: str | Sequence[str] | None = None,
    ) -> None:
        given = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        if not given:
            raise ValueError("Distillation needs at least one teacher, got an empty list.")
        self.teachers: list[Teacher] = [as_teacher(one) for one in given]
        self.divergence_function = named_divergence(divergence)
        self.teacher_weights = teacher_weights
        self.features = list(features)
        self.teacher_processing_class = teacher_processing_class
        self.text_column = text_column
        self._check_teachers()
        self.student = nn.Module()  # until `bind`
        self.head = Head("rows")
        self.label_names: set[str] = {"labels"}
        self.student_only_inputs: set[str] = set()
        self.num_classes: int | None = None
        self.retokenizer: Retokenizer | None = None
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.independent: set[int] = set()  # ids of models that do not use the student's weights

    def _check_teachers(self) -> None:
        number, weights = len(self.teachers), self.teacher_weights
        if weights is not None and not callable(weights) and len(weights) != number:
            raise ValueError(
                f"{len(weights)} teacher_weights for {number} teachers: give one each."
            )
        if number > 1 and (self.features or self.teacher_processing_class is not None):
            raise ValueError(
                "features and teacher_processing_class need one teacher, not a list of "
                f"{number}. Distil from the others in a second Distillation with another name= "
                "and ce_weight=1 (the objectives' factors multiply)."
            )
        if self.features and self.teachers[0].is_cached:
            raise ValueError(
                "A cached teacher stores predictions, not hidden states: features need the teacher "
                "itself. Drop features, or pass the model."
            )
        names = [feature.name for feature in self.features]
        if len(set(names)) < len(names) or "logits" in names:
            raise ValueError(f"features are named {names}: give each a name= of its own.")
        if self.text_column is not None and self.teacher_processing_class is None:
            raise ValueError(
                "text_column is read by a teacher with its own tokenizer: pass "
                "teacher_processing_class= too."
            )

    # ---- the hooks ----

    def item_mask(
        self, inputs: Mapping[str, Any], domain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Choose the items that are distilled; called before the forward.

        Args:
            inputs: The student's inputs, with labels.
            domain: (B,) long, 0 for source rows; None if all are.

        Shape:
            - output: (B,) bool for rows; (B, T) bool for tokens, at the position of the label.
        """
        return self.head.item_mask(inputs, domain)

    def teacher_inputs(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Make the teacher's inputs: the student's without labels, or the teacher's own tokens.

        Args:
            inputs: The student's inputs, with labels.
            columns: The values of `text_column`, one for each row, where it was given.
        """
        if self.retokenizer is not None and self.head.kind != "causal_lm":
            return self.retokenizer.rows(inputs, columns)
        drop = {*self.label_names, *NOT_FOR_TEACHERS, *self.student_only_inputs}
        given = {key: value for key, value in inputs.items() if key not in drop}
        if self.head.feeds_decoder and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = decoder_inputs(self.student, inputs)
        return given

    def teacher_forward(self, teacher: Any, inputs: Mapping[str, Any]) -> Any:
        """Run the teacher; called without gradients.

        Args:
            teacher: Called with the inputs as keywords; `teacher.module` is the model.
            inputs: The output of `teacher_inputs`.
        """
        return teacher(**inputs)

    def select_logits(
        self, outputs: Any, inputs: Mapping[str, Any], mask: torch.Tensor
    ) -> torch.Tensor:
        """Select the logits (N, C) of the items; called for the student and for the teacher.

        Args:
            outputs: The model's outputs.
            inputs: The student's inputs, with labels.
            mask: The output of `item_mask`.
        """
        return self.head.select(outputs, inputs, mask)

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Compute the divergence of each item: (N, C) and (N, C) to (N,)."""
        return self.divergence_function(student_logits, teacher_logits, temperature)

    def distillation_loss(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, int]:
        """Compute the sum of the divergence over the items, and their number."""
        values = self.divergence(student_logits, teacher_logits, temperature)
        return values.sum(), len(values)

    def overridden(self, *hooks: str) -> list[str]:
        """The names of the user's versions of these hooks."""
        versions = [(getattr(self, hook), getattr(TeacherHooks, hook)) for hook in hooks]
        return [
            getattr(version, "__qualname__", "?")
            for version, default in versions
            if getattr(version, "__func__", None) is not default
        ]

    # ---- the student ----

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
            ValueError: If the teacher has another tokenizer and the head does not support that.
        """
        self.label_names = {*label_names, "labels"}
        self.num_classes = None
        self.independent = {id(student)}
        if self.student is not student:
            self.student, self.head = student, Head.of(student)
        self.retokenizer = None
        theirs = self.teacher_processing_class
        if theirs is None or same_vocabulary(processing_class, theirs):
            return
        positions = num_positions(self.teachers[0].module)
        self.retokenizer = Retokenizer(processing_class, theirs, self.text_column, positions)
        rows_or_lm = self.head.kind in ("rows", "labels", "values", "causal_lm")
        if not rows_or_lm or self.head.is_encoder_decoder:
            raise ValueError(
                "A teacher with another tokenizer works for classification of rows and for "
                f"causal language models; {type(student).__name__} predicts per token. Use a "
                "teacher with the student's tokenizer."
            )

    @property
    def is_cross_tokenizer(self) -> bool:
        """Whether language models with two vocabularies are compared."""
        return self.retokenizer is not None and self.head.kind == "causal_lm"

    @property
    def num_labels(self) -> int:
        """The number of labels in the student's configuration."""
        return int(getattr(getattr(self.student, "config", None), "num_labels", 1))

    def items(self, part: Part) -> torch.Tensor:
        """The items of a micro-batch that are distilled; `item_mask` is called once for it."""
        key = (self, "item_mask")
        if key not in part.cache:
            self.head = self.head.with_labels(part.inputs.get("labels"))
            part.cache[key] = self.item_mask(part.inputs, part.domain)
        return cast(torch.Tensor, part.cache[key])
