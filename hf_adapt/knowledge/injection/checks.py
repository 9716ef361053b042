"""What is refused before a training with knowledge begins: trainers and columns."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets

from hf_adapt.engine.auxiliary import preserved_random_state
from hf_adapt.knowledge.linking.mapping import TOKEN_MENTIONS

if TYPE_CHECKING:
    from transformers import Trainer

PREFERENCES = {"chosen", "rejected"}
"""What the columns of preference data are called, or begin with."""


def refuse_trainer(trainer: Trainer, what: str) -> None:
    """Refuse a Trainer whose rows are not one sequence of tokens each.

    Args:
        trainer: The Trainer, before its dataloader exists.
        what: What needs one, for the message.

    Raises:
        ValueError: If it trains on preferences or encodes each text column by itself.
    """
    name = type(trainer).__name__
    columns = columns_of(trainer.train_dataset) or ()
    if {column.split("_")[0] for column in columns} >= PREFERENCES:
        raise ValueError(
            f"{name} trains on preference data (columns {', '.join(columns)}): a row is two "
            f"sequences, and {what} needs rows of one. Use it in a training on single sequences: "
            "SFTTrainer on the prompts and chosen answers before the preferences are trained, or "
            "a Trainer with a ...ForSequenceClassification model on labelled rows in place of a "
            "reward trainer."
        )
    if hasattr(trainer, "collect_features"):
        raise ValueError(
            f"{name} encodes each text column by itself, and {what} needs rows of one sequence. "
            "Train the transformers model inside with a Trainer of transformers, on rows with "
            "input_ids."
        )


def check_text_columns(trainer: Trainer, columns: Sequence[str]) -> None:
    """Refuse datasets without a column that `text_column` names.

    Args:
        trainer: The Trainer.
        columns: The columns that were named.

    Raises:
        ValueError: Naming the dataset, and a column of nearly that name.
    """
    for name, dataset in _datasets(trainer):
        found = columns_of(dataset)
        if found is not None:
            check_has_text(found, columns, f"the {name} does not have")


def check_has_text(found: Collection[str], columns: Sequence[str], which: str) -> None:
    """Refuse rows without a column that `text_column` names.

    Args:
        found: The columns that there are.
        columns: The columns that were named.
        which: Who lacks it, for the message: "the train_dataset does not have".

    Raises:
        ValueError: Naming a column of nearly that name.
    """
    if TOKEN_MENTIONS in found:  # placed already
        return
    for column in columns:
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"text_column names {column!r}, which {which}.{hint} There is "
                f"{', '.join(found)}. Keep the text as a column when you tokenise. Without "
                "text_column=, the column 'text' is read where there is one, and else what the "
                "tokens decode to."
            )


def _datasets(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """The datasets of a run with their names."""
    yield "train_dataset", trainer.train_dataset
    several: Any = trainer.eval_dataset
    if isinstance(several, Mapping):
        for name, dataset in several.items():
            yield f"eval_dataset[{name!r}]", dataset
    elif several is not None:
        yield "eval_dataset", several


def columns_of(dataset: Any) -> list[str] | None:
    """The columns of the rows that a dataset gives; None where only the rows can tell."""
    names = getattr(dataset, "column_names", None)
    is_transformed = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
    if isinstance(names, list) and not is_transformed:
        return names
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) > 0:
        with preserved_random_state():
            row = dataset[0]
        return list(row) if isinstance(row, Mapping) else None
    return None
