"""Rows of the past: as the Trainer prepares its own, and in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from transformers import default_data_collator

from hf_adapt.engine.columns import dataset_columns, named_inputs
from hf_adapt.engine.pairing import is_map_style, rows_at
from hf_adapt.engine.streams import check_rows
from hf_adapt.engine.trainer import AdaptationMixin

if TYPE_CHECKING:
    from transformers import Trainer

Collator = Callable[[list[Any]], Mapping[str, Any]]
"""Makes a batch of rows."""

LABELS = {"label", "labels", "label_ids", "start_positions", "end_positions"}
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
