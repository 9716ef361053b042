"""A language model's losses from hidden states, inside the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_adapt.distillation.divergences import Divergence
from hf_adapt.distillation.heads import Head, output_logits
from hf_adapt.distillation.hooks import TeacherHooks
from hf_adapt.distillation.language_models.chunked import ChunkedLoss, chunked_distillation_loss
from hf_adapt.distillation.teachers import ModelTeacher
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.mixins import FusedLoss
from hf_adapt.models.structure import unwrapped_base


class ChunkedOptions(NamedTuple):
    """The settings of [`chunked_distillation_loss`] that are not tensors."""

    temperature: float = 1.0
    divergence: str | Divergence = "forward_kl"
    vocabulary: int | None = None
    byte_budget: int | None = None


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for a while; its hooks still run."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@dataclass(frozen=True)
class OutputProjections:
    """The output projections of student and teacher, which compute losses in place of logits.

    The student's projection does so inside the model's forward, so DDP and FSDP see its weight
    used where they expect it.

    Attributes:
        student: The student's projection.
        teacher: The teacher's projection.
        head: The head of both models.
        teacher_values: A projection with the teacher's weights, where `teacher` has others: the
            module of a model that is run with weights that are not its own.
    """

    student: nn.Linear
    teacher: nn.Linear
    head: Head
    teacher_values: nn.Linear | None = None

    @classmethod
    def of(cls, student: nn.Module, teacher: nn.Module, head: Head) -> OutputProjections | None:
        """Both projections, or None if one is not a plain projection of hidden states."""
        if head.kind not in ("causal_lm", "tokens"):
            return None
        own, theirs = _projection(student), _projection(teacher)
        if own is None or theirs is None:
            return None
        return cls(own, theirs, head)

    def teacher_hidden(self, call: Callable[[], Any]) -> torch.Tensor:
        """The input of the teacher's projection, (B, T, H); no logits are computed."""
        captured: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            captured.append(hidden)
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        with replaced_forward(self.teacher, keep):
            _only_projected(call())
        return captured[0]

    def teacher_loss(
        self, hidden: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The teacher's own loss: the sum over the labels, their number, the number of classes."""
        labels = self._at_predictions(labels, IGNORED)
        labels = labels.clamp(max=self.teacher.out_features - 1)
        values = self.teacher_values or self.teacher
        own = chunked_loss(hidden, values, hidden, values, labels, ChunkedOptions(), kd_factor=0)
        return own.ce_sum, labels.ne(IGNORED).sum(), self.teacher.out_features

    def loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        teacher_hidden: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        base_factor: torch.Tensor,
        term_factor: torch.Tensor,
        options: ChunkedOptions,
    ) -> FusedLoss:
        """Run the student; its projection computes both losses.

        Args:
            model: The student as the Trainer wrapped it.
            inputs: Its inputs, without labels.
            teacher_hidden: (B, T, H), the input of the teacher's projection.
            labels: (B, T), -100 where there is none.
            mask: (B, T), the tokens that are distilled, at the position of the label.
            base_factor: Factor of the sum of the cross-entropy.
            term_factor: Factor of the sum of the divergence.
            options: Temperature, divergence, classes and memory.
        """
        results: list[ChunkedLoss] = []
        labels, mask = self._at_predictions(labels, IGNORED), self._at_predictions(mask, False)

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            result = chunked_loss(
                hidden,
                self.student,
                teacher_hidden,
                self.teacher_values or self.teacher,
                labels,
                options,
                ce_factor=base_factor,
                kd_factor=term_factor,
                kd_mask=mask.flatten(),
            )
            results.append(result)
            # A tensor of its own: FSDP2 hangs its backward on what a module returns.
            return result.loss.expand(*hidden.shape[:-1], 1).contiguous()

        with replaced_forward(self.student, compute):
            outputs = model(**inputs)
        # From the outputs, so that what DDP does to them it does to the loss.
        loss = _only_projected(outputs)[0, 0, 0].float()
        return FusedLoss(loss, results[0].ce_sum, results[0].kd_sum, outputs)

    def _at_predictions(self, values: torch.Tensor, absent: float) -> torch.Tensor:
        """The values of tokens at the position that predicts them: one earlier in a causal LM."""
        if self.head.kind != "causal_lm":
            return values
        return nn.functional.pad(values[:, 1:], (0, 1), value=absent)


def find_projections(hooks: TeacherHooks, logits_weight: float) -> OutputProjections | str:
    """The projections of student and teacher, or the reason why whole logits are needed."""
    teacher = hooks.teachers[0]
    if hooks.overridden("select_logits", "divergence", "distillation_loss", "teacher_forward"):
        return "a hook is overridden"
    if hooks.retokenizer is not None:
        return "the teacher has another tokenizer"
    if len(hooks.teachers) > 1 or not isinstance(teacher, ModelTeacher):
        kinds = ", ".join(type(one).__name__ for one in hooks.teachers)
        return f"the teacher is not one model ({kinds})"
    if logits_weight == 0 or hooks.teacher_weights is not None:
        return "logits_weight=0 or teacher_weights are given"
    assert teacher.module is not None
    found = OutputProjections.of(hooks.student, teacher.module, hooks.head)
    return "a head is not a plain projection of hidden states" if found is None else found


def chunked_loss(
    student_hidden: torch.Tensor,
    student: nn.Linear,
    teacher_hidden: torch.Tensor,
    teacher: nn.Linear,
    labels: torch.Tensor,
    options: ChunkedOptions,
    **factors: Any,
) -> ChunkedLoss:
    """The loss of a batch; virtual tokens of a learned prompt come first and have no labels."""
    tokens = labels.shape[1]
    return chunked_distillation_loss(
        student_hidden[:, -tokens:].flatten(0, -2),
        student.weight,
        teacher_hidden[:, -tokens:].flatten(0, -2),
        teacher.weight,
        labels.flatten(),
        student_bias=student.bias,
        teacher_bias=teacher.bias,
        **options._asdict(),
        **factors,
    )


def _only_projected(outputs: Any) -> torch.Tensor:
    """The result of the replaced projection in a model's outputs, (B, T, 1).

    Raises:
        ValueError: If the model changed its shape, for example by a bias of (1, V).
    """
    logits = output_logits(outputs)
    if logits.shape[-1] != 1:
        raise ValueError(
            f"the model does more to its logits than project: it returned {tuple(logits.shape)} "
            "for one value of each token"
        )
    return logits


def _projection(model: nn.Module) -> nn.Linear | None:
    """The output projection, if it is a plain one whose forward is not replaced already."""
    get = getattr(unwrapped_base(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    return head
