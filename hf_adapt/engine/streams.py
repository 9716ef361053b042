"""Streams: rows that travel with the training rows, and how."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch

from hf_adapt.engine.progress import Schedule

HF_DATASETS = (datasets.Dataset, datasets.IterableDataset)
SPLITS = (datasets.DatasetDict, datasets.IterableDatasetDict)

StreamLabels = Literal["hide", "keep"]
StreamForward = Literal["joint", "separate"]


TRAINING = "train"
"""The name of the training rows among the streams."""

TARGET = "target"
"""The stream of the target domains' rows."""


@dataclass(eq=False)
class Stream:
    """Rows that travel with the training rows: a target domain, a memory of the past, another task.

    Each training row brings rows of the stream along. What the script set up stays as it is:
    `per_device_train_batch_size` counts training rows, and an epoch is one pass over them.

    Args:
        dataset: The rows, prepared (tokenised) like `train_dataset`; labels may be missing where
            they are hidden. A list or dict of datasets that take turns, each a domain of its own.
            None for the rows of `train_dataset` whose `domain` column is not the source's.
        ratio: Rows that each training row brings along; fractions are allowed (0.5: every second
            row brings one).
        labels: `"hide"`: the labels are hidden from the model, the loss and every adaptation.
            `"keep"`: the rows are trained on with a loss of their own, normalised by the number
            of their own labels; they go through the model in a forward of their own.
        forward: `"joint"`: the rows go through the model together with the training rows.
            `"separate"`: in a forward of their own, so that the training loss sees training rows
            alone (for losses that do not ignore the label -100, or that couple the rows of a
            batch).
        weight: Factor of the stream's own loss, or a schedule of it; with `labels="keep"`.
        source_domain: Which value of a `domain` column in `train_dataset` is the source (0 or
            "source" by default); with `dataset=None`.
        priors: What is known of how frequent each class is among its rows, for the methods that use
            it: see [`hf_adapt.alignment.priors`].

    Raises:
        TypeError: If the dataset is none.
        ValueError: If an option is out of range or unknown.

    Example:
        >>> rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [0]})
        >>> Stream(rows, ratio=0.5, labels="keep").is_separate
        True
    """

    dataset: Any = None
    ratio: float = 1.0
    labels: StreamLabels = "hide"
    forward: StreamForward = "joint"
    weight: float | Schedule = 1.0
    source_domain: int | str | None = None
    priors: Any = None

    def __post_init__(self) -> None:
        if self.dataset is not None:
            check_rows(self.dataset, "dataset")
        if not self.ratio > 0:
            raise ValueError(
                f"ratio={self.ratio} must be positive: the number of the stream's rows that each "
                "training row brings along (0.5 is one for every second training row)."
            )
        for option, kind in (("labels", StreamLabels), ("forward", StreamForward)):
            if (value := getattr(self, option)) not in get_args(kind):
                known = " or ".join(map(repr, get_args(kind)))
                raise ValueError(f"{option}={value!r} is unknown: use {known}.")
        if not callable(self.weight) and not self.weight >= 0:
            raise ValueError(f"weight={self.weight} must be a number >= 0 or a schedule.")
        if self.weight != 1.0 and self.labels == "hide":
            raise ValueError(
                "weight= is the factor of the loss on the stream's own labels, which are hidden. "
                "Pass labels='keep', or give the weight to the objective that sees the rows."
            )

    @property
    def is_separate(self) -> bool:
        """Whether its rows go through the model in a forward of their own."""
        return self.forward == "separate" or self.labels == "keep"

    @property
    def is_trained_on(self) -> bool:
        """Whether its own labels add a loss."""
        return self.labels == "keep" and self.weight != 0

    @property
    def domains(self) -> list[Any]:
        """Its datasets: one for each domain."""
        given = self.dataset
        if isinstance(given, Mapping) and not isinstance(given, HF_DATASETS):
            return list(given.values())
        several = isinstance(given, (list, tuple)) and len(given) > 0
        if several and not isinstance(given[0], Mapping):  # else it is a list of rows
            return list(given)
        return [given]

    @classmethod
    def of(cls, given: Any, name: str = "target_dataset") -> Stream:
        """A stream as it is; of datasets, a stream with the default options."""
        if isinstance(given, cls):
            return given
        check_rows(given, name)
        return cls(given)


@dataclass(frozen=True)
class Routing:
    """Which training rows are those of other tasks than the one that the Trainer's loss learns.

    Attributes:
        column: The column of the training rows that names the task of each.
        own: The task whose rows the Trainer's own collator and loss are for.
        collators: For each other task what makes a batch of its rows, labels included; None where
            the Trainer's own does, and its own loss is computed on them too.
        example: A row of the own task.
    """

    column: str
    own: str
    collators: Mapping[str, Callable[[list[Any]], Any] | None]
    example: Mapping[str, Any]

    def task(self, row: Any) -> str:
        """The task of a row.

        Raises:
            ValueError: If it names none of the tasks.
        """
        given = row.get(self.column) if isinstance(row, Mapping) else None
        if given != self.own and given not in self.collators:
            tasks = ", ".join(map(repr, [self.own, *self.collators]))
            raise ValueError(
                f"A training row has {given!r} in its column {self.column!r}, and the tasks are "
                f"{tasks}. mix({{'name': dataset, ...}}) fills the column in."
            )
        return str(given)


@dataclass(frozen=True)
class StreamTable:
    """Which streams a run has, and how their rows are collated.

    Attributes:
        names: The stream of each domain number; the training rows' is `"train"`, number 0.
        separate: The streams whose rows go through the model in a forward of their own.
        labelled: The streams whose labels are trained on.
        unread: The streams whose rows need no forward: their objectives make further ones.
        ratios: Rows of each stream per training row.
        routing: Which training rows belong to other tasks, each of which is a stream of its own.
    """

    names: tuple[str, ...] = (TRAINING,)
    separate: frozenset[str] = frozenset()
    labelled: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    ratios: Mapping[str, float] = field(default_factory=dict)
    routing: Routing | None = None

    def domains(self, streams: Collection[str]) -> list[int]:
        """The domain numbers of these streams, and 0 for the training rows."""
        return [i for i, name in enumerate(self.names) if i == 0 or name in streams]


def check_rows(given: Any, name: str) -> None:
    """Refuse what is no dataset, or more than one without saying so.

    Args:
        given: What was passed as rows.
        name: The argument's name, for the message.

    Raises:
        TypeError: If it is not a dataset.
        ValueError: If it is all the splits of one.
    """
    prepare = (
        "Load it, for example load_dataset('csv', data_files=..., split='train'), and tokenise it "
        "as the train_dataset was."
    )
    if isinstance(given, SPLITS):
        splits = [str(each) for each in given]
        raise ValueError(
            f"{name} is a {type(given).__name__} with the splits {', '.join(splits)}; all "
            "of them, a test split too, would be trained on as domains of their own. Choose one: "
            f"{name}=dataset[{splits[0] if splits else 'train'!r}], or load_dataset(..., "
            "split='train'). Several target domains are passed as a list or a plain dict."
        )
    if isinstance(given, (str, bytes, os.PathLike)):
        raise TypeError(
            f"{name}={str(given)[:80]!r} is a {type(given).__name__}, expected a dataset. {prepare}"
        )
    if isinstance(given, datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset):
        return
    if isinstance(given, Mapping):
        if not given or any(_is_column(each) for each in given.values()):
            raise TypeError(
                f"{name} is a {type(given).__name__} of columns ("
                f"{', '.join(map(str, given)) or 'none'}), expected a dataset, or a dict with a "
                "dataset for each domain. Use datasets.Dataset.from_dict(dict(columns))."
            )
        for each in given.values():
            check_rows(each, name)
    elif isinstance(given, (list, tuple)):
        for each in given:
            if not isinstance(each, Mapping | tuple) or isinstance(each, SPLITS):  # else a row
                check_rows(each, name)
    elif isinstance(given, (torch.Tensor, np.ndarray)):
        raise TypeError(f"{name} is a {type(given).__name__}, expected a dataset. {prepare}")
    elif hasattr(given, "iloc"):
        raise TypeError(
            f"{name} is a {type(given).__name__}, whose rows are not read by number. Use "
            "datasets.Dataset.from_pandas(frame, preserve_index=False), and tokenise it as the "
            "train_dataset was."
        )
    elif isinstance(given, torch.utils.data.DataLoader | Iterator) or not (
        hasattr(given, "__getitem__") or hasattr(given, "__iter__")
    ):
        raise TypeError(
            f"{name} is a {type(given).__name__}, expected a dataset: rows that can be "
            f"read by number, or again and again. {prepare}"
        )


def _is_column(value: Any) -> bool:
    """Whether it is a column of a table rather than a dataset."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return True
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], list | str | int | float)
    )
