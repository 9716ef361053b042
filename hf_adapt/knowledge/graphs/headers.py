"""Whether the first row of a text file names its columns."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc

from hf_adapt.knowledge.graphs.text_files import TextTable

logger = logging.getLogger(__name__)

WORDS = frozenset(
    "alias aliases concept cui definition definitions description descriptions edge entity from "
    "gloss h head id iri key label labels name names node o object p predicate qid r rel relation "
    "s source subject surface synonym synonyms t tail target term text title to type uri".split()
)
"""Words of cells that name a column in the first row of a file, and are hardly ever an entity."""


def check_columns(there: Sequence[str], columns: Sequence[str], source: str) -> None:
    """Raise a ValueError if a table does not have all of these columns."""
    for name in columns:
        if name not in there:
            near = difflib.get_close_matches(name, list(there), n=3, cutoff=0.4)
            raise ValueError(
                f"{source}: there is no column {name!r}. Its columns are "
                f"{', '.join(map(repr, list(there)[:12]))}{f'; near: {near}' if near else ''}. "
                f"{_naming(columns)}"
            )


def has_header(rows: TextTable, columns: Sequence[str]) -> bool:
    """Return whether the first row names all of these columns.

    Raises:
        ValueError: If it does not, and is no row of these columns either.
    """
    first, place = rows.first, f"{rows.path}, line {rows.line}"
    if set(columns) <= set(first):
        if twice := [name for name in columns if first.count(name) > 1]:
            raise ValueError(f"{place}: the column {twice[0]!r} is there twice.")
        return True
    if len(first) == 1:
        raise ValueError(
            f"{place}: expected {len(columns)} columns ({', '.join(columns)}), got 1: "
            f"{first[0][:60]!r}. The separator is {rows.separator!r}; pass separator= for another."
        )
    if len(first) != len(columns):
        raise _unexpected(rows, columns)
    return False


def check_first_row(rows: TextTable, table: Any) -> None:
    """Check a first row that was read as a row, if it has nothing in common with the others.

    Raises:
        ValueError: If it certainly names the columns; a warning is logged if it may.
    """
    columns, cells = table.column_names, [column[0].as_py() for column in table.columns]
    others = table.slice(1).columns
    # A relation may be there again as a relation, and an entity as a head or a tail.
    places = [(0, 2), (1,), (0, 2)] if len(cells) == 3 else [range(len(cells))] * len(cells)
    for cell, at in zip(cells, places, strict=True):
        if any(pc.index(others[i], cell).as_py() >= 0 for i in at):
            return
    num_names = sum(map(_is_name, cells))
    if num_names == len(cells):
        raise _unexpected(rows, columns)
    if len(cells) != 3 or table.num_rows == 1:
        return
    shown = ", ".join(map(repr, rows.first))
    names = zip(("head", "relation", "tail"), rows.first, strict=True)
    fix = (
        "no other row has the relation or one of the entities. If these are the names of the "
        "columns, pass " + ", ".join(f"{column}={name!r}" for column, name in names)
    )
    # Where each other relation is there twice, the first row is the odd one out.
    counts = others[1].value_counts().field("counts")
    if num_names == 2 and table.num_rows > 3 and pc.min(counts).as_py() > 1:
        raise ValueError(
            f"{rows.path}, line {rows.line}: {shown} look like the names of the columns: {fix}. If "
            f"they are a triple, put the line {rows.separator.join(columns)!r} before it."
        )
    place = f"{rows.path}, line {rows.line}"
    logger.warning("%s: %s are read as a triple, but %s.", place, shown, fix)


def _is_name(cell: str) -> bool:
    """Whether a cell names a column: `head`, `entity_id`."""
    words = re.findall(r"[^\W_]+", cell.lower())
    return bool(words) and WORDS.issuperset(words)


def _unexpected(rows: TextTable, columns: Sequence[str]) -> ValueError:
    return ValueError(
        f"{rows.path}, line {rows.line}: expected a header with the columns {', '.join(columns)}, "
        f"or exactly {len(columns)} columns without a header; got "
        f"{', '.join(map(repr, rows.first[:8]))}. {_naming(columns)}"
    )


def _naming(columns: Sequence[str]) -> str:
    """What to do if the columns have other names."""
    if len(columns) == 3:  # of triples, which may be called anything
        return (
            "Name the file's columns (head=..., relation=..., tail=...), or call them "
            f"{', '.join(columns)}."
        )
    return f"Call the columns {' and '.join(columns)}."
