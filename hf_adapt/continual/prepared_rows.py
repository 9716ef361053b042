"""Rows of the past: as the Trainer prepares its own, and in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import default_data_collator

from hf_adapt.engine.collating import label_columns
from hf_adapt.engine.columns import dataset_columns, named_inputs
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.pairing import is_map_style, rows_at
from hf_adapt.engine.streams import check_rows
from hf_adapt.engine.trainer import AdaptationMixin
from hf_adapt.engine.training import unwrapped_model
from hf_adapt.models.heads import HeadName, has_head
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

CLASSIFIERS: tuple[HeadName, ...] = (
    "sequence_classification",
    "token_classification",
    "image_classification",
    "audio_classification",
)

CLASS_COLUMNS = ("labels", "label")
"""The columns in which a class is looked for."""

Collator = Callable[[list[Any]], Mapping[str, Any]]
"""Makes a batch of rows."""

LABELS = label_columns(("start_positions", "end_positions"), None)
"""Columns and inputs that hold labels."""


def rows_of(given: Any, name: str) -> Any:
    """The rows of a memory, or rows as they are.

    Args:
        given: A [`ReplayMemory`], or rows.
        name: What to call them, for messages.

    Raises:
        TypeError: If they are none.
        ValueError: If there are none.
    """
    kinds = (datasets.Dataset, torch.utils.data.Dataset)  # a Subset has a `dataset` too
    rows = given if isinstance(given, kinds) else getattr(given, "dataset", given)
    check_rows(rows, name)
    several = isinstance(rows, list | tuple) and any(isinstance(each, kinds) for each in rows)
    if several or isinstance(rows, Mapping):
        raise TypeError(
            f"{name} is a {type(rows).__name__} of data sets: join them, "
            "datasets.concatenate_datasets([...]), or ReplayMemory.merge([...]) of memories."
        )
    if hasattr(rows, "__len__") and not len(rows):
        raise ValueError(f"{name} has no rows: pass prepared rows of the past.")
    return rows


def check_tokenised(trainer: Trainer, rows: Any) -> None:
    """Refuse texts where the Trainer's own rows are tokens.

    Raises:
        ValueError: If they are.
    """
    ours, theirs = dataset_columns(trainer.train_dataset), dataset_columns(rows)
    if "input_ids" in (ours or ()) and "input_ids" not in (theirs or ours or ()):
        raise ValueError(
            f"The model reads tokenised rows, and the rows of the past have "
            f"{', '.join(theirs or ())}. Tokenise them as train_dataset was. (A random or balanced "
            "memory of raw rows is tokenised by a Trainer that does so with its own.)"
        )


def prepared_rows(trainer: Trainer, rows: Any) -> tuple[Any, Collator]:
    """Rows, and a collator for them, without the columns that the Trainer's model does not take."""
    assert isinstance(trainer, AdaptationMixin)
    check_tokenised(trainer, rows)
    own: Any = super(AdaptationMixin, trainer)  # without what observers want to see
    if isinstance(rows, datasets.Dataset):
        return own._remove_unused_columns(rows, description="memory"), trainer.data_collator
    collator: Collator = own._get_collator_with_removed_columns(
        trainer.data_collator, description="memory"
    )
    return rows, collator


def row_batches(
    rows: Any,
    collator: Collator | None,
    model: nn.Module,
    batch_size: int,
    max_rows: int | None,
    seed: int,
) -> tuple[int | None, Iterator[Callable[[], Mapping[str, Any]]]]:
    """The number of batches, where it is known, and what makes each."""
    if isinstance(rows, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        rows = list(islice(rows, max_rows))
    if isinstance(rows, Mapping) or not (is_map_style(rows) or hasattr(rows, "__iter__")):
        raise TypeError(
            f"rows is a {type(rows).__name__}: expected a prepared dataset, a list of rows, or an "
            "iterable of batches."
        )
    if not is_map_style(rows):
        return None, _given_batches(rows, max_rows)
    chosen = list(range(len(rows)))
    if max_rows is not None and max_rows < len(rows):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        chosen = sorted(order[:max_rows].tolist())
    chunks = [chosen[at : at + batch_size] for at in range(0, len(chosen), batch_size)]
    collate = default_data_collator if collator is None else collator
    names = named_inputs(model)

    def batch(chunk: list[int]) -> Mapping[str, Any]:
        read = rows_at(rows, chunk)
        if collator is None and names is not None:
            kept = {*names, *LABELS}
            read = [{k: v for k, v in row.items() if k in kept} for row in read]
        return collate(read)

    return len(chunks), (partial(batch, chunk) for chunk in chunks)


def _given_batches(batches: Any, max_rows: int | None) -> Iterator[Callable[[], Mapping[str, Any]]]:
    seen = 0
    for batch in batches:
        yield partial(dict, batch)
        seen += len(next(iter(batch.values())))
        if max_rows is not None and seen >= max_rows:
            return


def check_labels(trainer: Trainer, rows: Any) -> None:
    """Refuse labels of a memory that the model does not predict, or that are named otherwise.

    Raises:
        ValueError: Saying which.
    """
    column = next((name for name in CLASS_COLUMNS if name in (dataset_columns(rows) or ())), None)
    if column is None or not is_map_style(rows):
        return  # the engine says what is missing
    train = trainer.train_dataset
    ours, theirs = (
        each.features.get(column) if isinstance(each, datasets.Dataset) else None
        for each in (train, rows)
    )
    if isinstance(ours, datasets.ClassLabel) and isinstance(theirs, datasets.ClassLabel):
        if ours.names != theirs.names:
            raise ValueError(
                f"The labels of the memory are {theirs.names} and those of train_dataset "
                f"{ours.names}: a number would mean another class. Give both the same label names, "
                "with numbers of their own for the classes of each task."
            )
    first, old = (_first_label(each, column) for each in (train, rows))
    if first is not None and np.ndim(first) != np.ndim(old):
        raise ValueError(
            f"A label of train_dataset is {str(first)[:40]}, and one of the memory "
            f"{str(old)[:40]}: one of them is of rows and the other of tokens or of several "
            "classes. A memory holds rows of the same kind of task."
        )
    kinds = [np.asarray(label).dtype.kind for label in (first, old)]
    if first is not None and sorted(kinds) == ["f", "i"]:
        raise ValueError(
            f"A label of train_dataset is {first!s:.40}, and one of the memory {old!s:.40}: a loss "
            "takes numbers of classes or measured values. Cast the memory's: "
            f"memory.cast_column({column!r}, train_dataset.features[{column!r}])."
        )
    model = unwrapped_model(trainer)
    classes = getattr(getattr(unwrapped_base(model), "config", None), "num_labels", None)
    if not classes or classes < 2 or not has_head(model, *CLASSIFIERS):
        return
    if isinstance(rows, datasets.Dataset) and column in rows.column_names:
        values = rows.with_format("numpy")[column]
    else:  # a transform makes them
        values = [rows_at(rows, [place])[0][column] for place in range(min(len(rows), 1000))]
    flat = np.concatenate([np.atleast_1d(value) for value in values])
    wrong = flat[(flat >= classes) | ((flat < 0) & (flat != IGNORED))]
    if np.issubdtype(flat.dtype, np.integer) and len(wrong):
        raise ValueError(
            f"The memory has the label {int(wrong[0])}, and the model predicts {classes} classes. "
            "Load it with num_labels= of both tasks together, the old classes first."
        )


def _first_label(rows: Any, column: str) -> Any:
    """The label of a data set's first row; None where it is not known."""
    if not is_map_style(rows) or column not in (dataset_columns(rows) or ()):
        return None
    return rows[0][column]
