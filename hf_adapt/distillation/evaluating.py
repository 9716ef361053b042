"""Student against teacher on the rows of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EvalPrediction

from hf_adapt.distillation.divergences import forward_kl
from hf_adapt.distillation.heads import Head, output_logits
from hf_adapt.engine.collating import COLUMNS, DOMAIN
from hf_adapt.evaluation.distillation import calibration_error_from, retained_share

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.distillation.objective import Distillation

logger = logging.getLogger(__name__)

BINS = 15
"""Of the calibration error."""


class TeacherComparison:
    """Sums over an evaluation, over all processes.

    Args:
        trainer: The Trainer that evaluates.
        distillation: Its objective, asked for the teacher and its hooks.
    """

    def __init__(self, trainer: Trainer, distillation: Distillation) -> None:
        self.trainer, self.distillation = trainer, distillation
        self._rows: list[torch.Tensor] = []
        self._teacher_logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._retains = trainer.compute_metrics is not None
        # What compute_metrics sees beside predictions and labels is not collected twice.
        more = getattr(trainer.args, "include_for_metrics", None)
        if self._retains and (more or getattr(trainer.args, "batch_eval_metrics", False)):
            logger.warning(
                "With include_for_metrics or batch_eval_metrics the teacher's own metrics and the "
                "share retained are not computed."
            )
            self._retains = False
        distillation.prepare_evaluation(trainer)
        if distillation.is_cross_tokenizer and not distillation.is_said_apart:
            distillation.is_said_apart = True
            logger.warning(
                "evaluate_distillation: language models with different tokenizers have no classes "
                "in common, so nothing is compared. Read loss/distillation in the log instead."
            )

    def see(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], logits: Any
    ) -> None:
        """Compare one batch.

        Args:
            inputs: The student's inputs, with labels.
            columns: The columns beside the batch.
            logits: What the student predicted.
        """
        given = self.trainer._prepare_inputs(
            {key: value for key, value in inputs.items() if key not in (COLUMNS, DOMAIN)}
        )
        pair = self.distillation.evaluated(given, columns, logits)
        if pair is None:
            return
        student, teacher, labels, counts, outputs = pair
        whole = whole_logits(outputs, self.distillation.head)
        table = _per_item(student, teacher, labels)
        rows = torch.stack([part.sum(0) for part in torch.split(table, counts)])
        gathered = self.trainer.accelerator.gather_for_metrics(rows)
        self._rows.append(gathered.cpu())
        if self._retains and whole is not None:
            if self.trainer.preprocess_logits_for_metrics is not None:
                given_labels: Any = given.get("labels")
                whole = self.trainer.preprocess_logits_for_metrics(whole, given_labels)
            padded = self.trainer.accelerator.pad_across_processes(whole, dim=1, pad_index=-100)
            everyone = self.trainer.accelerator.gather_for_metrics(padded)
            if everyone.is_floating_point():
                everyone = everyone.float()  # numpy knows no bfloat16
            self._teacher_logits.append(everyone.cpu().numpy())
            own = given.get("labels")
            if isinstance(own, torch.Tensor):
                own = self.trainer.accelerator.pad_across_processes(own, dim=1, pad_index=-100)
                self._labels.append(self.trainer.accelerator.gather_for_metrics(own).cpu().numpy())

    def metrics(self, own: Mapping[str, float], prefix: str) -> dict[str, float]:
        """What the evaluation adds to its metrics.

        Args:
            own: The student's metrics.
            prefix: Of their names.
        """
        if not self._rows:
            return {}
        total = torch.cat(self._rows).double().sum(0)
        items, labelled = float(total[0]), float(total[3])
        found = {}
        if items:
            found["agreement"] = float(total[1]) / items
            found["teacher_kl"] = float(total[2]) / items
        if labelled:
            found["calibration_error"] = calibration_error_from(total[4:].view(3, BINS).numpy())
        found |= self._retained(own, prefix)
        return {f"{prefix}_{name}": value for name, value in found.items()}

    def _retained(self, own: Mapping[str, float], prefix: str) -> dict[str, float]:
        compute = self.trainer.compute_metrics
        if compute is None or not self._teacher_logits or not self._labels:
            return {}
        prediction = EvalPrediction(
            predictions=_stacked(self._teacher_logits), label_ids=_stacked(self._labels)
        )
        found = {}
        for name, value in compute(prediction).items():
            plain = name.removeprefix(f"{prefix}_")
            mine = own.get(f"{prefix}_{plain}")
            if isinstance(value, (int, float, np.number)):
                found[f"teacher_{plain}"] = float(value)
                if isinstance(mine, (int, float, np.number)) and 0 < value < np.inf:
                    found[f"retained_{plain}"] = retained_share(float(mine), float(value))
        return found


def _stacked(batches: list[np.ndarray]) -> np.ndarray:
    """Batches as one array, padded with -100 where their lengths differ."""
    if batches[0].ndim < 2:
        return np.concatenate(batches)
    longest = max(batch.shape[1] for batch in batches)
    padded = [
        np.pad(
            batch,
            [(0, 0), (0, longest - batch.shape[1])] + [(0, 0)] * (batch.ndim - 2),
            constant_values=-100,
        )
        for batch in batches
    ]
    return np.concatenate(padded)


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


def item_labels(head: Head, inputs: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor | None:
    """The label of each item, or None where items have none of one class."""
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return None
    if head.kind == "rows" and labels.ndim == 1:
        return labels[mask]
    if head.kind in ("tokens", "causal_lm") and labels.shape == mask.shape:
        return labels[mask]
    return None


def whole_logits(outputs: Any, head: Head) -> torch.Tensor | None:
    """The teacher's logits as `compute_metrics` sees the student's; None for spans."""
    return None if head.kind == "spans" else output_logits(outputs)
