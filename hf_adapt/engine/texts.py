"""Columns with the text of rows: texts or lists of words, in one column or several."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.engine.columns import dataset_columns

KEEP_COLUMN = (
    "If it was removed when the rows were tokenised, keep it (`map(..., remove_columns=...)` "
    "without it)."
)


def column_names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in a `text_column=`: none, one, or two for pairs.

    Raises:
        ValueError: If there are more.

    Example:
        >>> column_names("text"), column_names(["premise", "hypothesis"])
        (('text',), ('premise', 'hypothesis'))
    """
    names = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    if len(names) > 2:
        raise ValueError(
            f"text_column={given!r} names {len(names)} columns: give one, or two for pairs."
        )
    return names


def is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing; an empty text is a text."""
    return cell is None or (isinstance(cell, float) and cell != cell)


def is_words(cell: Any) -> bool:
    """Whether a cell is a list of words."""
    return isinstance(cell, (list, tuple)) and all(isinstance(word, str) for word in cell)


def joined_text(cell: Any) -> str | None:
    """The text of a cell: as it is, or words with a space between; None for anything else.

    Example:
        >>> joined_text("a film"), joined_text(["good", "film"]), joined_text(3)
        ('a film', 'good film', None)
    """
    if isinstance(cell, str):
        return cell
    return " ".join(cell) if is_words(cell) else None


def check_cell(cell: Any, column: str, place: str) -> None:
    """Refuse a cell without a text.

    Raises:
        ValueError: Naming the place.
    """
    if joined_text(cell) is None:
        found = "no text" if is_missing(cell) else f"{type(cell).__name__} {cell!r:.60}"
        raise ValueError(
            f"Column {column!r} must hold a text or a list of words; {place} has {found}. Fill it "
            "in, leave the row out (dataset.filter), or name another column."
        )


def text_of(cell: Any, column: str, place: str) -> str:
    """The text of a cell.

    Raises:
        ValueError: If it has none.

    Example:
        >>> text_of(["good", "film"], "words", "row 0")
        'good film'
    """
    check_cell(cell, column, place)
    return joined_text(cell) or ""


def check_row(
    row: Mapping[str, Any], columns: Sequence[str], place: str, one_suffices: bool = False
) -> None:
    """Refuse a row without a text in its columns.

    Args:
        row: The row, which has these columns.
        columns: The text columns.
        place: What to call the row, for the message.
        one_suffices: Whether some of several columns may be empty.

    Raises:
        ValueError: Naming the column and what it holds.
    """
    wrong = [column for column in columns if joined_text(row[column]) is None]
    unfit = [column for column in wrong if not is_missing(row[column])]
    if unfit or (wrong and not (one_suffices and len(wrong) < len(columns))):
        column = (unfit or wrong)[0]
        check_cell(row[column], column, place)


def check_dataset(
    dataset: Any,
    columns: Sequence[str],
    name: str,
    *,
    one_suffices: bool = False,
    read_stream: bool = True,
) -> None:
    """Refuse a dataset without these columns, or with a row that has no text there.

    Of a stream, a list or rows that are made on the fly only the columns are looked at; their cells
    are checked as they come.

    Args:
        dataset: The dataset.
        columns: The text columns.
        name: What to call it, for the message.
        one_suffices: Whether some of several columns may be empty.
        read_stream: Whether the first row of a stream that does not tell its columns is read.

    Raises:
        ValueError: Naming a similar column, or the row.
    """
    there = dataset_columns(dataset, read_stream=read_stream)
    if there is None:
        return
    check_columns(there, columns, name, KEEP_COLUMN)
    # What a transform makes of the cells is not what is stored.
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        for number, row in _uncertain_rows(dataset, columns):
            check_row(row, columns, f"row {number} of {name}", one_suffices)


def check_columns(there: Collection[str], columns: Sequence[str], name: str, fix: str) -> None:
    """Refuse rows without these columns.

    Raises:
        ValueError: Naming those that there are, and a similar one.
    """
    for column in columns:
        if column not in there:
            near = difflib.get_close_matches(column, there, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"text_column={column!r} is missing: there is no column {column!r} in {name}, only "
                f"{', '.join(there)}.{hint} {fix}"
            )


def missing_cells(dataset: datasets.Dataset, columns: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The cells of these columns that hold nothing, or a word that is nothing, as (column, row)."""
    for number, row in _uncertain_rows(dataset, columns):
        for column in columns:
            cell = row[column]
            if cell is None or (isinstance(cell, list) and None in cell):
                yield column, number


def _uncertain_rows(
    dataset: datasets.Dataset, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of which their columns' types do not say that they are all text."""
    start = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(10_000):
        if not all(_is_all_text(table[column]) for column in columns):
            yield from enumerate(table.to_pylist(), start)
        start += len(table)


def _is_all_text(column: Any) -> bool:
    if column.null_count:
        return False
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _is_all_text(pc.list_flatten(column))
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def named_datasets(
    train: Any, targets: Sequence[Any], evaluated: Any = None
) -> Iterator[tuple[str, Any]]:
    """The training rows, all target rows and all evaluation rows, with what to call them."""
    yield "train_dataset", train
    for target in targets:
        if isinstance(target, (list, tuple)):
            yield from ((f"target_dataset[{i}]", value) for i, value in enumerate(target))
        else:
            yield from _named(target, "target_dataset")
    if evaluated is not None:
        yield from _named(evaluated, "eval_dataset")


def _named(given: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(given, Mapping):
        yield from ((f"{name}[{key!r}]", value) for key, value in given.items())
    else:
        yield name, given
