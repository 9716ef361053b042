"""Whether the rows of each task fit its head: checked on some of them, before training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from hf_adapt.engine.labels import IGNORED, length_of
from hf_adapt.engine.pairing import is_map_style, rows_at
from hf_adapt.multitask.mixture import Mixture, StreamedMixture

SEEN = 64
"""Rows of each task that are looked at."""
SOUGHT = 10_000
"""Rows of a stream among which a task's are looked for."""


@dataclass(frozen=True)
class HeadOf:
    """What the labels of a task must fit.

    Attributes:
        kind: The kind of the head.
        size: Its size; None where it is that of a vocabulary.
        problem: Its `problem_type`, if it was given.
        reads_rows: Whether it learns the labels as the rows have them; a collator of the user's
            may turn names into numbers.
    """

    kind: str | None
    size: int | None
    problem: str | None = None
    reads_rows: bool = True


def rows_of_tasks(data: Any, column: str, tasks: Sequence[str]) -> dict[str, list[Any]]:
    """Some rows of each task.

    Raises:
        ValueError: If a task has no rows, or rows are of no task.
    """
    if isinstance(data, Mixture | StreamedMixture):
        if data.column != column or set(data.names) != set(tasks):
            raise ValueError(
                f"The mixture has the tasks {', '.join(map(repr, data.names))} in the column "
                f"{data.column!r}, and MultiTask was given {', '.join(map(repr, tasks))} and the "
                f"column {column!r}."
            )
        if without := [n for n, rows in zip(data.names, data.quotas(0), strict=True) if not rows]:
            raise ValueError(
                f"The mixture has no row of {', '.join(map(repr, without))} in an epoch of "
                f"{data.size}: give each task a share (sampling=), or leave it out."
            )
        return {name: data.first_rows(name, SEEN) for name in data.names}
    found: dict[str, list[Any]] = {task: [] for task in tasks}
    for row in _some_rows(data, column):
        given = row.get(column) if isinstance(row, Mapping) else None
        if given not in found:
            raise ValueError(
                f"A training row has {given!r} in its column {column!r}, and the tasks are "
                f"{', '.join(map(repr, tasks))}. mix({{'name': dataset, ...}}) fills the column in."
            )
        if len(found[given]) < SEEN:
            found[given].append(row)
        if all(found.values()) and not isinstance(data, datasets.Dataset):
            break
    lacking = [task for task, own in found.items() if not own]
    if lacking and (is_map_style(data) or tasks[0] in lacking):
        raise ValueError(
            f"No row of the task{'s' * (len(lacking) > 1)} {', '.join(map(repr, lacking))} among "
            f"the {'' if is_map_style(data) else 'first '}rows of train_dataset."
        )
    return found


def _some_rows(data: Any, column: str) -> Iterator[Any]:
    """Some rows of each task of a dataset that knows its columns, else one after another."""
    if isinstance(data, datasets.Dataset) and column in data.column_names:
        names = np.asarray(data.with_format(None).select_columns(column)[column][:], dtype=object)
        for name in dict.fromkeys(names.tolist()):
            yield from rows_at(data, np.flatnonzero(names == name)[:SEEN].tolist())
    elif is_map_style(data):
        yield from (data[i] for i in range(len(data)))
    else:
        yield from itertools.islice(iter(data), SOUGHT)


def check_labels(task: str, rows: Sequence[Mapping[str, Any]], head: HeadOf) -> None:
    """Refuse labels that a head cannot learn.

    Args:
        task: Its name.
        rows: Rows as the task's collator sees them.
        head: What they must fit.

    Raises:
        ValueError: Saying what was found and expected.
    """
    for row in rows:
        label = next((row[name] for name in ("labels", "label", "label_ids") if name in row), None)
        if label is None:
            continue  # of question answering
        if problem := _problem(label, row, head):
            raise ValueError(
                f"The labels of the task {task!r} do not fit its head ({head.kind}"
                f"{'' if head.size is None else f' of size {head.size}'}): a row has {problem}. "
                "See TaskSpec(num_labels=, problem_type=, head=, labels_column=)."
            )


def _problem(label: Any, row: Mapping[str, Any], head: HeadOf) -> str | None:
    """What is wrong with a label."""
    values = np.asarray(label.cpu() if isinstance(label, torch.Tensor) else label)
    shown = f"{values.tolist()!r:.60}"
    if values.dtype.kind not in "biuf":
        return f"{shown}, which is no number" if head.reads_rows else None
    whole = values[values != IGNORED]
    if head.kind == "sequence_classification":
        several = head.problem == "multi_label_classification"
        is_float = values.dtype.kind == "f"
        if head.problem == "regression" or (head.size == 1 and not several):
            return None if values.size == head.size else f"{shown}, not {head.size} number(s)"
        if several or (is_float and values.ndim == 1):
            if values.shape != (head.size,):
                return f"{shown}, not a vector of {head.size} numbers"
            return None if is_float else f"{shown}, whose numbers must be floats (0.0 and 1.0)"
        if values.ndim or is_float:
            return f"{shown}, not the number of one class"
    elif head.kind in ("token_classification", "masked_lm", "causal_lm"):
        if values.ndim != 1 or (length_of(row) or values.size) != values.size:
            return f"{shown}, not one for each of its {length_of(row)} tokens"
    if head.size is not None and whole.size and not (0 <= whole.min() <= whole.max() < head.size):
        return f"{shown}, and classes go from 0 to {head.size - 1}"
    return None
