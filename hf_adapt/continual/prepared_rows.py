"""Rows of the past as the Trainer prepares its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import datasets

from hf_adapt.engine.trainer import AdaptationMixin

if TYPE_CHECKING:
    from transformers import Trainer

Collator = Callable[[list[Any]], Mapping[str, Any]]
"""Makes a batch of rows."""


def prepared_rows(trainer: Trainer, rows: Any) -> tuple[Any, Collator]:
    """Rows, and a collator for them, without the columns that the Trainer's model does not take."""
    own: Any = super(AdaptationMixin, trainer)  # type: ignore[misc]  # not what observers want
    if isinstance(rows, datasets.Dataset):
        return own._remove_unused_columns(rows, description="memory"), trainer.data_collator
    collator: Collator = own._get_collator_with_removed_columns(
        trainer.data_collator, description="memory"
    )
    return rows, collator
