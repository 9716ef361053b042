"""The comparison of student and teacher on the rows of an evaluation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import EvalPrediction, Seq2SeqTrainer
from transformers.trainer_pt_utils import numpy_pad_and_concatenate

from hf_adapt.distillation.divergences import forward_kl
from hf_adapt.distillation.heads import output_logits
from hf_adapt.distillation.hooks import TeacherHooks
from hf_adapt.distillation.predictions import teacher_factors
from hf_adapt.distillation.teacher_outputs import call_teacher

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

BINS = 15
"""The number of bins of the calibration error."""


def check_evaluation(trainer: Trainer) -> None:
    """Refuse a Trainer whose evaluation returns no logits.

    Raises:
        ValueError: If it generates texts.
    """
    generates = getattr(trainer.args, "predict_with_generate", False)
    if generates and isinstance(trainer, Seq2SeqTrainer):
        raise ValueError(
            "The comparison with the teacher needs logits, and with predict_with_generate=True an "
            "evaluation generates texts. Set evaluate=False (evaluate_distillation=False of "
            "DistillationTrainer), or predict_with_generate=False."
        )


class Pair(NamedTuple):
    """The predictions of student and teachers on a batch.

    Attributes:
        student: Logits (N, C).
        teacher: Logits (N, C) of the teachers' weighted mixture.
        labels: The label of each item, or None.
        counts: The number of items of each row.
        outputs: The first teacher's outputs.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor | None
    counts: list[int]
    outputs: Any


def paired_predictions(
    hooks: TeacherHooks, inputs: Mapping[str, Any], columns: Mapping[str, Any], predicted: Any
) -> Pair:
    """The predictions of student and teachers on the items of an evaluation's batch.

    Args:
        hooks: The teachers and how they are asked.
        inputs: The student's inputs, with labels.
        columns: The columns of the rows, one value for each row.
        predicted: The student's logits, as `prediction_step` returns them.
    """
    hooks.head = hooks.head.with_labels(inputs.get("labels"))
    head, mask = hooks.head, hooks.item_mask(inputs)
    if head.kind == "spans":
        outputs: Any = dict(zip(("start_logits", "end_logits"), predicted, strict=False))
    else:
        outputs = predicted[0] if isinstance(predicted, (tuple, list)) else predicted
    student = hooks.select_logits(outputs, inputs, mask).float()
    given = hooks.teacher_inputs(inputs, columns)
    found = [call_teacher(hooks, teacher.source, given) for teacher in hooks.teachers]
    signals = [hooks.select_logits(one, inputs, mask).float().to(student.device) for one in found]
    factors = teacher_factors(hooks, inputs, signals, student)
    shares = torch.stack(
        [torch.as_tensor(one, device=student.device).expand(len(student)) for one in factors]
    ).clamp(min=0.0)
    logs = torch.stack([logits[:, : hooks.num_classes].log_softmax(-1) for logits in signals])
    mixture = (logs + (shares / shares.sum(0)).log().unsqueeze(-1)).logsumexp(0)
    student = student[:, : hooks.num_classes]
    if head.kind == "values":  # no classes to agree on
        student, mixture = student[:, :1], mixture[:, :1]
    counts = head.row_counts(mask, hooks.num_labels)
    return Pair(student, mixture, head.item_labels(inputs, mask), counts, found[0])


class TeacherComparison:
    """Sums over an evaluation, over all processes.

    Args:
        trainer: The Trainer that evaluates.
        hooks: The teachers and how they are asked.
    """

    def __init__(self, trainer: Trainer, hooks: TeacherHooks) -> None:
        self.trainer, self.hooks = trainer, hooks
        self._rows: list[torch.Tensor] = []
        self._teacher_logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._retains = trainer.compute_metrics is not None and hooks.head.kind != "spans"
        # What compute_metrics sees beside predictions and labels is not collected twice.
        more = getattr(trainer.args, "include_for_metrics", None)
        if self._retains and (more or getattr(trainer.args, "batch_eval_metrics", False)):
            logger.warning(
                "With include_for_metrics or batch_eval_metrics the teacher's own metrics and the "
                "share retained are not computed."
            )
            self._retains = False

    def observe(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], outputs: Any
    ) -> None:
        """Compare one batch.

        Args:
            inputs: The student's inputs, with labels, on the device.
            columns: The columns of the rows.
            outputs: The student's logits.
        """
        if self.hooks.is_cross_tokenizer:
            return
        pair = paired_predictions(self.hooks, inputs, columns, outputs)
        table = _per_item(pair.student, pair.teacher, pair.labels)
        rows = torch.stack([items.sum(0) for items in torch.split(table, pair.counts)])
        self._rows.append(self.trainer.accelerator.gather_for_metrics(rows).cpu())
        if self._retains:
            self._collect(output_logits(pair.outputs), inputs.get("labels"))

    def _collect(self, logits: torch.Tensor, labels: Any) -> None:
        """Collect what `compute_metrics` needs of the teacher, as the Trainer does."""
        accelerator = self.trainer.accelerator
        if self.trainer.preprocess_logits_for_metrics is not None:
            logits = self.trainer.preprocess_logits_for_metrics(logits, labels)
        padded = accelerator.pad_across_processes(logits, dim=1, pad_index=-100)
        gathered = accelerator.gather_for_metrics(padded)
        if gathered.is_floating_point():
            gathered = gathered.float()  # numpy has no bfloat16
        self._teacher_logits.append(gathered.cpu().numpy())
        if isinstance(labels, torch.Tensor):
            labels = accelerator.pad_across_processes(labels, dim=1, pad_index=-100)
            self._labels.append(accelerator.gather_for_metrics(labels).cpu().numpy())

    def metrics(self, own: Mapping[str, float], prefix: str) -> dict[str, float]:
        """The metrics that are added to an evaluation's.

        Args:
            own: The student's metrics.
            prefix: The prefix of their names.
        """
        if not self._rows:
            return {}
        total = torch.cat(self._rows).double().sum(0)
        items, labelled = float(total[0]), float(total[3])
        found = {}
        if items:
            found["agreement"] = float(total[1]) / items
            found["teacher_kl"] = float(total[2]) / items
        if labelled:  # Guo et al. 2017, Eq. 3, from sums over bins
            counts, confidences, correct = total[4:].view(3, BINS).numpy()
            found["calibration_error"] = float(np.abs(correct - confidences).sum() / counts.sum())
        found |= self._retained(own, prefix)
        return {f"{prefix}_{name}": value for name, value in found.items()}

    def _retained(self, own: Mapping[str, float], prefix: str) -> dict[str, float]:
        compute = self.trainer.compute_metrics
        if compute is None or not self._teacher_logits or not self._labels:
            return {}
        # Padded with -100 where lengths differ, as the Trainer does.
        logits, labels = (
            functools.reduce(numpy_pad_and_concatenate, batches)
            for batches in (self._teacher_logits, self._labels)
        )
        prediction = EvalPrediction(predictions=logits, label_ids=labels)
        found = {}
        for name, value in compute(prediction).items():
            plain = name.removeprefix(f"{prefix}_")
            mine = own.get(f"{prefix}_{plain}")
            if isinstance(value, (int, float, np.number)):
                found[f"teacher_{plain}"] = float(value)
                if isinstance(mine, (int, float, np.number)) and 0 < value < np.inf:
                    found[f"retained_{plain}"] = float(mine) / float(value)
        return found


def _per_item(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """For each item: 1, agreement, KL, 1 if labelled, and its bin of the calibration error.

    All 0 where there is one output, of which every prediction is the same class.

    Shape:
        - student, teacher: (N, C), labels: (N,); output: (N, 4 + 3 BINS), float64.
    """
    table = student.new_zeros(len(student), 4 + 3 * BINS, dtype=torch.float64)
    if not len(student) or student.shape[-1] < 2:
        return table
    table[:, 0] = 1
    table[:, 1] = student.argmax(-1).eq(teacher.argmax(-1))
    table[:, 2] = forward_kl(student, teacher)
    if labels is None:
        return table
    labelled = labels.ge(0) & labels.lt(student.shape[-1])
    confidence, predicted = student.float().softmax(-1).max(-1)
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    place = torch.nn.functional.one_hot(bins, BINS).double() * labelled.unsqueeze(1)
    table[:, 3] = labelled
    table[:, 4 : 4 + BINS] = place
    table[:, 4 + BINS : 4 + 2 * BINS] = place * confidence.unsqueeze(1)
    table[:, 4 + 2 * BINS :] = place * predicted.eq(labels).unsqueeze(1)
    return table
