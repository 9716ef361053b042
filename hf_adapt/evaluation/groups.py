"""Accuracy by group, and that of the worst one, with intervals."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_adapt.alignment.predictions import LANGUAGE_MODELS, refuse_heads, refuse_other_problems
from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.mixins import EvaluationObserver
from hf_adapt.evaluation.arrays import Array, as_array, extra

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

FEWEST_ITEMS = 30
"""With fewer the accuracy of a group is called uncertain."""


@dataclass(frozen=True)
class Group:
    """The accuracy of one group.

    Args:
        name: The group's value in the data.
        accuracy: From 0 to 1.
        count: Number of its items that have a label.
        low: Lower end of the 95 % interval (Wilson).
        high: Upper end.
    """

    name: str
    accuracy: float
    count: int
    low: float
    high: float

    @classmethod
    def of(cls, name: str, right: int, count: int) -> Group:
        """The group with so many right answers.

        Reference:
            Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
        """
        ends = extra("scipy.stats").binomtest(right, count).proportion_ci(0.95, method="wilson")
        return cls(name, right / count, count, float(ends.low), float(ends.high))

    @property
    def is_uncertain(self) -> bool:
        """Whether it has too few items."""
        return self.count < FEWEST_ITEMS

    def __str__(self) -> str:
        few = "; uncertain, few items" if self.is_uncertain else ""
        return (
            f"{self.name}: {self.accuracy:.1%} ({self.low:.1%} to {self.high:.1%}, "
            f"n={self.count}{few})"
        )


@dataclass(frozen=True)
class GroupAccuracy:
    """The accuracy of each group.

    Args:
        groups: The groups, the largest first.
    """

    groups: Sequence[Group]

    @property
    def worst(self) -> Group:
        """The group of lowest accuracy; the larger one of equals."""
        return min(self.groups, key=lambda group: group.accuracy)

    @property
    def average(self) -> float:
        """The accuracy over all items."""
        return sum(g.accuracy * g.count for g in self.groups) / sum(g.count for g in self.groups)

    @property
    def doubt(self) -> str | None:
        """Why the worst group may not be worse than the others; None if it is."""
        worst = self.worst
        others = GroupAccuracy([group for group in self.groups if group is not worst])
        if not others.groups:
            return "it is the only group"
        if worst.high >= others.average:
            return f"its interval contains the accuracy of the others, {others.average:.1%}"
        return "it has few items" if worst.is_uncertain else None

    def __str__(self) -> str:
        doubt = f" (may not be the worst: {self.doubt})" if self.doubt else ""
        return "\n".join([*map(str, self.groups), f"worst: {self.worst.name}{doubt}"])


def group_accuracy(
    predictions_or_logits: Array, labels: Array, groups: Sequence[Any] | Array
) -> GroupAccuracy:
    """The accuracy of each group of items, with an interval that says how much it can be trusted.

    The worst of many small groups looks bad by chance alone: read `doubt` beside `worst`.

    Reference:
        Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts",
        arXiv:1911.08731 (the worst group's accuracy).

    Args:
        predictions_or_logits: Predicted classes, or scores of each class.
        labels: The right classes; items with -100 do not count.
        groups: The group of each item: names or numbers, or None for an item that is in no group.

    Shape:
        - predictions_or_logits: (N,) or (N, C); labels, groups: (N,).

    Raises:
        ValueError: If the lengths differ, or no item has a label.

    Example:
        >>> found = group_accuracy([0, 1, 1, 0], [0, 1, 0, 1], ["north", "north", "south", "south"])
        >>> print(found)
        north: 100.0% (34.2% to 100.0%, n=2; uncertain, few items)
        south: 0.0% (0.0% to 65.8%, n=2; uncertain, few items)
        worst: south (may not be the worst: it has few items)
    """
    guess, truth = (
        as_array(values, name, min(max(np.ndim(values), 1), 2))
        for name, values in (("predictions", predictions_or_logits), ("labels", labels))
    )
    guess = guess.argmax(-1) if guess.ndim == 2 else guess
    names = [None if each is None else group_name(each) for each in groups]  # type: ignore[union-attr]
    if guess.ndim != 1 or not guess.shape == truth.shape == (len(names),):
        raise ValueError(
            "Expected predictions (N,) or logits (N, C), and a label and a group of each; got "
            f"{guess.shape}, {truth.shape} and {len(names)} groups."
        )
    counted = truth != IGNORED
    if not any(label and name is not None for label, name in zip(counted, names, strict=True)):
        raise ValueError(
            f"Expected labels and groups, got {IGNORED} (no label) or None (no group) for all "
            f"{len(truth)} items."
        )
    tally = GroupTally()
    tally.add(row for row in zip(names, guess == truth, counted, strict=True) if row[0] is not None)
    return tally.result


def group_name(value: Any) -> str:
    """The name of a group: `str` of a plain value."""
    return str(value.item() if isinstance(value, (torch.Tensor, np.generic)) else value)


class GroupTally:
    """Counts of right answers and of items by group."""

    def __init__(self) -> None:
        self._right, self._count = Counter[str](), Counter[str]()

    def add(self, rows: Any) -> None:
        """Add rows of (group, number right, number of items)."""
        for name, right, count in rows:
            self._right[name] += int(right)
            self._count[name] += int(count)

    @property
    def is_empty(self) -> bool:
        """Whether no item with a label was seen."""
        return not any(self._count.values())

    @property
    def result(self) -> GroupAccuracy:
        """The accuracies; a group without labels is left out."""
        found = [Group.of(n, self._right[n], count) for n, count in self._count.items() if count]
        return GroupAccuracy(sorted(found, key=lambda group: (-group.count, group.name)))


class WorstGroupAccuracy(EvaluationObserver):
    """Adds the accuracy of each group, and of the worst, to the Trainer's own evaluation.

    A column of the evaluated rows says which group each row is in (a dialect, a hospital, a source
    domain). The model does not see it. Rows without a label do not count; a tagger's items are its
    labelled tokens. `metric_for_best_model="eval_worst_group_accuracy"` chooses by the worst group.

    Args:
        groups: The column's name; its values are names or numbers, or None for a row that is in no
            group.
        max_groups: So many of the largest groups have a metric of their own; all count in the
            worst.

    Logs:
        `eval_worst_group_accuracy`, and `eval_group_<value>_accuracy`, where every character of the
        value that is no letter or digit is `_`.

    Raises:
        ValueError: If the rows have no such column, or the model predicts no exclusive classes.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=source, eval_dataset=source_dev, callbacks=[
            AdaptationCallback(WorstGroupAccuracy(groups="dialect"))])
        ```
    """

    def __init__(self, groups: str, max_groups: int = 20) -> None:
        self.groups = groups
        self.columns = (groups,)
        self.max_groups = max_groups
        self.result: GroupAccuracy | None = None
        """That of the last evaluation."""
        self._tally = GroupTally()
        self._has_column = self._has_warned = False

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes, and evaluation rows without the column."""
        self._check(trainer)
        self._has_warned = False
        given = trainer.eval_dataset
        named = isinstance(given, Mapping) and not hasattr(given, "column_names")
        for rows in given.values() if named else [given]:  # type: ignore[union-attr]
            known = None if rows is None else dataset_columns(rows)
            if known is not None and self.groups not in known:
                raise ValueError(self._missing(known))

    def _check(self, trainer: Trainer) -> None:
        extra("scipy.stats")  # rather than at the first evaluation
        refuse_other_problems(trainer.model, type(self).__name__)
        refuse_heads(trainer.model, type(self).__name__, *LANGUAGE_MODELS, "question_answering")

    def _missing(self, columns: Collection[str] = ()) -> str:
        have = f"; they have {', '.join(map(repr, columns))}" if columns else ""
        return (
            f"WorstGroupAccuracy(groups={self.groups!r}) found no column {self.groups!r} in the "
            f"rows that are evaluated{have}. Keep it when you tokenize (no remove_columns), or "
            "name the right one."
        )

    def begin_evaluation(self, trainer: Trainer, prefix: str) -> None:
        """Begin to count."""
        self._check(trainer)
        self._trainer, self._tally, self._has_column = trainer, GroupTally(), False

    def observe(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], outputs: Any
    ) -> None:
        """Count the right answers of one batch."""
        values = columns.get(self.groups, ())
        names = [None if value is None else group_name(value) for value in values]
        label_names = (*self._trainer.label_names, "labels")
        labels = next((inputs[name] for name in label_names if name in inputs), None)
        logits = next((x for x in _tensors(outputs) if x.ndim >= 2), None)
        if logits is None or labels is None or labels.shape != logits.shape[:-1]:
            counts = [(0, 0)] * len(names)  # rows of `predict` have no labels
        else:
            right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
            pairs = torch.stack([right, labels != IGNORED], -1)
            counts = pairs.reshape(len(labels), -1, 2).sum(1).tolist()
        rows = [(name, *count) for name, count in zip(names, counts, strict=True)]
        if (accelerator := self._trainer.accelerator).num_processes > 1:
            rows = accelerator.gather_for_metrics(rows, use_gather_object=True)
        self._tally.add(row for row in rows if row[0] is not None)
        self._has_column = self._has_column or any(row[0] is not None for row in rows)

    def end_evaluation(self, metrics: Mapping[str, float], prefix: str) -> Mapping[str, float]:
        """The accuracies.

        Raises:
            ValueError: If no row had the column.
        """
        if not self._has_column:
            raise ValueError(self._missing())
        if self._tally.is_empty:
            self.result = None
            return {}
        self.result = self._tally.result
        if self.result.doubt and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The worst group of %r is %s, but %s.",
                self.groups,
                self.result.worst,
                self.result.doubt,
            )
        shown = self.result.groups[: self.max_groups]
        named = zip(_metric_names([group.name for group in shown]), shown, strict=True)
        return {
            **{f"{prefix}_group_{name}_accuracy": group.accuracy for name, group in named},
            f"{prefix}_worst_group_accuracy": self.result.worst.accuracy,
        }


def _tensors(outputs: Any) -> list[torch.Tensor]:
    given = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [value for value in given if isinstance(value, torch.Tensor)]


def _metric_names(values: Sequence[str]) -> list[str]:
    """Names of metrics; a number tells values apart that would have one name."""
    names: list[str] = []
    for value in values:
        plain = re.sub(r"\W", "_", value)[:40] or "_"
        tries = itertools.chain([plain], (f"{plain}_{number}" for number in itertools.count(2)))
        names.append(next(name for name in tries if name not in names))
    return names
