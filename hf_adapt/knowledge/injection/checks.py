"""What is refused before a training with knowledge begins: trainers and columns."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.supported import refuse_answers, refuse_sentence_trainer
from hf_adapt.knowledge.graphs.triples import is_missing
from hf_adapt.knowledge.linking.mapping import TOKEN_MENTIONS, text_of

if TYPE_CHECKING:
    from transformers import Trainer


def refuse_trainer(trainer: Trainer) -> None:
    """Refuse a Trainer whose rows are not one sequence of tokens each.

    Args:
        trainer: The Trainer, before its dataloader exists.

    Raises:
        ValueError: If it compares answers or encodes each text column by itself.
    """
    refuse_answers(
        trainer,
        "knowledge injection needs rows of one sequence",
        "Use it in a training on single sequences: SFTTrainer on the prompts and chosen answers "
        "before the preferences are trained, or a Trainer with a ...ForSequenceClassification "
        "model on labelled rows in place of a reward trainer.",
    )
    refuse_sentence_trainer(
        trainer,
        "Knowledge injection",
        "Train the transformers model inside with a Trainer of transformers, on rows with "
        "input_ids.",
    )


def check_text_columns(trainer: Trainer, columns: Sequence[str]) -> None:
    """Refuse datasets without a column that `text_column` names, or without text in it.

    What only reading the rows would tell is checked as they come.

    Args:
        trainer: The Trainer.
        columns: The columns that were named.

    Raises:
        ValueError: Naming the dataset, and a column of nearly that name or a row.
    """
    for name, dataset in _datasets(trainer):
        found = dataset_columns(dataset)
        if found is not None:
            check_has_text(found, columns, f"the {name} does not have")
            # What a transform makes of the cells is not what is stored.
            if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
                _check_cells(dataset, columns, name)


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


def check_text(row: Mapping[str, Any], columns: Sequence[str], place: str) -> None:
    """Refuse a row without a text in the columns that `text_column` names.

    Of several columns, some may be empty: a pair may lack its second text.

    Args:
        row: The row, which has these columns.
        columns: The columns that were named.
        place: What to call the row, for the message.

    Raises:
        ValueError: Naming the column and what it has.
    """
    if row.get(TOKEN_MENTIONS) is not None:  # placed already
        return
    wrong = [column for column in columns if text_of(row[column]) is None]
    other = [column for column in wrong if not is_missing(row[column])]
    if other or len(wrong) == len(columns):
        column = (other or wrong)[0]
        cell = row[column]
        found = "no text" if is_missing(cell) else f"{type(cell).__name__} {cell!r:.60}"
        raise ValueError(
            f"text_column names {column!r}, which must hold a text or a list of words; {place} has "
            f"{found}. Name another column, fill it in, or leave the row out (dataset.filter)."
        )


def _check_cells(dataset: datasets.Dataset, columns: Sequence[str], name: str) -> None:
    """Look at the rows one by one where their column does not say that they are all text."""
    if TOKEN_MENTIONS in dataset.column_names:
        return
    start = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(10_000):
        if not all(_is_all_text(table[column]) for column in columns):
            for number, row in enumerate(table.to_pylist(), start):
                check_text(row, columns, f"row {number:,} of the {name}")
        start += len(table)


def _is_all_text(column: Any) -> bool:
    if column.null_count:
        return False
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _is_all_text(pc.list_flatten(column))
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _datasets(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """The datasets of a run with their names."""
    yield "train_dataset", trainer.train_dataset
    several: Any = trainer.eval_dataset
    if isinstance(several, Mapping):
        for name, dataset in several.items():
            yield f"eval_dataset[{name!r}]", dataset
    elif several is not None:
        yield "eval_dataset", several
