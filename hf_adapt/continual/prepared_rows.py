"""Rows of the past as the Trainer prepares its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import datasets
import torch

from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.streams import check_rows
from hf_adapt.engine.trainer import AdaptationMixin

if TYPE_CHECKING:
    from transformers import Trainer

Collator = Callable[[list[Any]], Mapping[str, Any]]
"""Makes a batch of rows."""


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
