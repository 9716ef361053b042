"""Warnings of the first steps: a teacher that only guesses, a term that stays 0."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F

from hf_adapt.distillation.heads import Head
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.parts import Part

logger = logging.getLogger(__name__)

ZEROS = 3
"""The number of logs without any loss that are suspicious; a learning rate that starts at 0 gives
two with a teacher that starts as the student."""


class ZeroTerm:
    """Warns of a distillation term that is 0 in all of the first logs.

    Args:
        name: The name of the objective.
        teachers: The names of the teachers.
    """

    def __init__(self, name: str, teachers: str) -> None:
        self.name, self.teachers = name, teachers
        self._zeros: int | None = 0

    def observe(self, value: float | None) -> None:
        """Look at the logged value of the term, if it was logged."""
        if value is None or self._zeros is None:
            return
        self._zeros = self._zeros + 1 if value == 0.0 else None
        if self._zeros == ZEROS:
            self._zeros = None
            logger.warning(
                "loss/%s was exactly 0 in the first %d logs, so nothing is learnt from the teacher "
                "(%s). Does it predict with the student's own weights (the student itself, or a "
                "function that runs it), or does item_mask choose no items?",
                self.name,
                ZEROS,
                self.teachers,
            )


class TeacherSanity:
    """Warns of a teacher that is no better than guessing on the first labelled items.

    Args:
        name: The name of the teacher.
        batches: The smallest number of micro-batches to look at.
        items: The smallest number of labelled items. The check ends after 16 times `batches`.
    """

    def __init__(self, name: str, batches: int = 4, items: int = 16) -> None:
        self.name, self.batches, self.items = name, batches, items
        self.is_done = False
        self._seen = 0
        self._sum: torch.Tensor | None = None
        self._count: torch.Tensor | None = None

    def observe(
        self, head: Head, part: Part, mask: torch.Tensor, logits: torch.Tensor, progress: float
    ) -> None:
        """Add the teacher's own loss on a micro-batch; warn after the last."""
        if self.is_done or head.kind in ("spans", "labels", "values") or progress > 0.5:
            return
        labels = part.inputs.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.shape[:1] != mask.shape[:1]:
            return
        chosen = labels[mask] if labels.shape == mask.shape else None
        if head.kind == "rows" and labels.ndim == 1 and not labels.is_floating_point():
            chosen = labels[mask]
        if chosen is None or len(chosen) != len(logits) or chosen.is_floating_point():
            return
        fitting = chosen.to(logits.device).clamp(max=logits.shape[-1] - 1)
        value = F.cross_entropy(
            logits.detach().float(), fitting, ignore_index=IGNORED, reduction="sum"
        )
        self.add(value, chosen.ne(IGNORED).sum(), logits.shape[-1])

    def add(self, loss: torch.Tensor, count: torch.Tensor, classes: int) -> None:
        """Add the teacher's own loss on a micro-batch; warn after the last.

        Args:
            loss: Sum over the labelled items.
            count: Their number.
            classes: Number of classes.
        """
        self._seen += 1
        self._sum = loss if self._sum is None else self._sum + loss
        self._count = count if self._count is None else self._count + count
        if self._seen < self.batches or int(self._count) < self.items:
            self.is_done = self._seen >= 16 * self.batches
            return
        self.is_done = True
        mean, guessing = float(self._sum / self._count), math.log(classes)
        if mean > guessing:
            logger.warning(
                "The teacher (%s) is no better than guessing on the first %d labelled items: its "
                "loss is %.3f, that of equal odds %.3f. Are its labels in the same order, its "
                "tokenizer the same, its head trained?",
                self.name,
                int(self._count),
                mean,
                guessing,
            )
