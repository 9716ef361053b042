"""Columns with the text of rows: texts, lists of words, one column or two for pairs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.engine.columns import dataset_columns


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


def check_cell(cell: Any, column: str, place: str) -> None:
    """Refuse a cell without a text.

    Raises:
        ValueError: Naming the place.
    """
    if isinstance(cell, str) or is_words(cell):
        return
    found = "no text" if is_missing(cell) else f"{type(cell).__name__} {cell!r:.60}"
    raise ValueError(
        f"Column {column!r} must hold a text or a list of words; {place} has {found}. Fill it in, "
        "or leave the row out (dataset.filter)."
    )


def text_of(cell: Any, column: str, place: str) -> str:
    """The text of a cell: as it is, or words with a space between.

    Raises:
        ValueError: If it has none.

    Example:
        >>> text_of(["good", "film"], "words", "row 0")
        'good film'
    """
    check_cell(cell, column, place)
    return cell if isinstance(cell, str) else " ".join(cell)


def check_dataset(dataset: Any, columns: Sequence[str], name: str) -> None:
    """Refuse a dataset without these columns, or with a row that has no text there.

    Of a stream, a list or rows that are made on the fly only the columns are looked at; their cells
    are checked as they come.

    Raises:
        ValueError: Naming a similar column, or the row.
    """
    there = dataset_columns(dataset, read_stream=True)
    if there is None:
        return
    check_columns(
        there,
        columns,
        name,
        "If it was removed when the rows were tokenised, keep it (`map(..., remove_columns=...)` "
        "without it).",
    )
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return
    for column, row in missing_cells(dataset, columns):
        check_cell(None, column, f"row {row} of {name}")


def check_columns(there: Sequence[str], columns: Sequence[str], name: str, fix: str) -> None:
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
    start = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(10_000):
        for column in columns:
            cells = table[column]
            has_words = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
            if cells.null_count or (has_words and pc.list_flatten(cells).null_count):
                for i, cell in enumerate(cells.to_pylist()):
                    if cell is None or (has_words and None in cell):
                        yield column, start + i
        start += len(table)


def named_datasets(train: Any, targets: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The training rows and all target rows, with what to call them."""
    yield "train_dataset", train
    for target in targets:
        if isinstance(target, Mapping):
            yield from ((f"target_dataset[{key!r}]", value) for key, value in target.items())
        elif isinstance(target, (list, tuple)):
            yield from ((f"target_dataset[{i}]", value) for i, value in enumerate(target))
        else:
            yield "target_dataset", target
