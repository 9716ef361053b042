"""A language model's losses from hidden states, inside the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_adapt.distillation.chunked import ChunkedDistillation, ChunkedLoss
from hf_adapt.distillation.divergences import Divergence
from hf_adapt.distillation.heads import Head, output_logits
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.mixins import FusedLoss
from hf_adapt.models.structure import unwrapped_base


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for a while; its hooks still run."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@dataclass(frozen=True)
class FusedHeads:
    """Student's and teacher's output projections, and how their tokens are counted.

    The student's projection computes the losses instead of logits. It does so inside the model's
    forward, so DDP and FSDP see its weight used where they expect it.

    Attributes:
        student: The student's projection.
        teacher: The teacher's projection.
        teacher_model: The teacher.
        head: What both predict.
    """

    student: nn.Linear
    teacher: nn.Linear
    teacher_model: nn.Module
    head: Head

    @classmethod
    def of(cls, student: nn.Module, teacher: nn.Module, head: Head) -> FusedHeads | None:
        """Both heads, or None if one is not a plain projection of hidden states."""
        if head.kind not in ("causal_lm", "tokens"):
            return None
        own, theirs = _projection(student), _projection(teacher)
        if own is None or theirs is None:
            return None
        return cls(own, theirs, teacher, head)

    def teacher_hidden(self, call: Callable[[], Any]) -> torch.Tensor:
        """What the teacher's projection is given; it computes no logits."""
        seen: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        with replaced_forward(self.teacher, keep):
            _only_projected(call())
        return seen[0]

    def _at_predictions(self, values: torch.Tensor, nothing: float) -> torch.Tensor:
        """What belongs to a token, at the place of its prediction: the token before it in a LM."""
        if self.head.kind != "causal_lm":
            return values
        return nn.functional.pad(values[:, 1:], (0, 1), value=nothing)

    def teacher_loss(
        self, hidden: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The teacher's own loss: its sum over the labels, their number, and that of classes."""
        labels = self._at_predictions(labels, IGNORED)
        labels = labels.clamp(max=self.teacher.out_features - 1)
        hidden = hidden[:, -labels.shape[1] :]
        own = ChunkedDistillation()(hidden, self.teacher, hidden, self.teacher, labels, kd_factor=0)
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
        temperature: float,
        divergence: Divergence,
        vocabulary: int | None,
        byte_budget: int | None,
    ) -> FusedLoss:
        """Run the student; its projection gives both losses.

        Args:
            model: The student as the Trainer wrapped it.
            inputs: Its inputs, without labels.
            teacher_hidden: (B, T, H) before the teacher's projection.
            labels: (B, T), -100 where there is none.
            mask: (B, T) which tokens are distilled, at the position of the label.
            base_factor: Factor of the sum of the cross-entropy.
            term_factor: Factor of the sum of the divergence.
            temperature: Of the divergence.
            divergence: What to compute of the logits.
            vocabulary: Number of classes that are compared; None for all.
            byte_budget: Memory for pieces of logits.
        """
        results: list[ChunkedLoss] = []
        labels, mask = self._at_predictions(labels, IGNORED), self._at_predictions(mask, False)
        chunked = ChunkedDistillation(temperature, divergence, vocabulary, byte_budget)
        tokens = labels.shape[1]

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            result = chunked(
                hidden[:, -tokens:],  # a learned prompt comes first
                self.student,
                teacher_hidden[:, -tokens:],
                self.teacher,
                labels,
                ce_factor=base_factor,
                kd_factor=term_factor,
                kd_mask=mask,
            )
            results.append(result)
            # A tensor of its own: FSDP2 hangs its backward on what a module returns.
            return result.loss.expand(*hidden.shape[:-1], 1).contiguous()

        with replaced_forward(self.student, compute):
            outputs = model(**inputs)
        # From the outputs, so that what DDP does to them it does to the loss.
        loss = _only_projected(outputs)[0, 0, 0].float()
        return FusedLoss(loss, results[0].ce_sum, results[0].kd_sum, outputs)


def _only_projected(outputs: Any) -> torch.Tensor:
    """What stands for the logits, (B, T, 1).

    Raises:
        ValueError: If the model has done more with it, such as add a bias of its own, of (1, V).
    """
    logits = output_logits(outputs)
    if logits.shape[-1] != 1:
        raise ValueError(
            f"the model does more to its logits than project: {tuple(logits.shape)} came of one "
            "value for each token"
        )
    return logits


def _projection(model: nn.Module) -> nn.Linear | None:
    """The output projection, if it is a plain one that nothing else has taken over."""
    get = getattr(unwrapped_base(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    return head
