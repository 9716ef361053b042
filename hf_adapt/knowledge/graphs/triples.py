"""Triples of text from whatever holds them, as three columns of numbers and the texts numbered."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from hf_adapt.knowledge.graphs.text_files import (
    SEPARATORS,
    SHOWN,
    explain,
    kind_of,
    naming,
    read_columns,
)
from hf_adapt.knowledge.strings import CHUNK


@dataclass(frozen=True)
class Column:
    """One column of text: what each row says, as a number in the list of what is said.

    Args:
        codes: A number for each row, int32.
        values: Arrow strings; some may be in no row.
    """

    codes: npt.NDArray[np.int32]
    values: Any


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN or pandas' NA; the texts 'NA', 'nan' and '' are not missing."""
    if isinstance(value, (float, np.floating)):
        return bool(np.isnan(value))
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def read_triples(
    triples: Any, columns: tuple[str, str, str], separator: str | None = None
) -> list[Column]:
    """The columns head, relation and tail of a file, a table or an iterable.

    Args:
        triples: As [`KnowledgeGraph.from_triples`] takes them.
        columns: The names of the three columns.
        separator: Between the cells of a text file.

    Raises:
        ValueError: If a row is malformed (with its number), or the columns are not there.
        TypeError: If it is nothing that triples can be read from.
    """
    if isinstance(triples, (str, Path)):
        return read_file(Path(triples), columns, separator)
    return _encode(_table(triples, columns), columns, f"The {type(triples).__name__} of triples")


def without(columns: list[Column], entities: Collection[str]) -> list[Column]:
    """The triples whose head and tail are none of some entities."""
    if not entities:
        return columns
    keep = np.ones(len(columns[0].codes), bool)
    for column in (columns[0], columns[2]):
        found = pc.is_in(column.values, pa.array(sorted(entities), pa.large_string()))
        keep &= ~np.asarray(found)[column.codes]
    return [Column(column.codes[keep], column.values) for column in columns]


def read_file(path: Path, columns: Sequence[str], separator: str | None = None) -> list[Column]:
    """Columns of a csv, tsv or parquet file.

    Raises:
        ValueError: If the file's ending is none of these, or its content is malformed.
    """
    kind = kind_of(path)
    if kind in (".parquet", ".pq"):
        schema = pa.parquet.read_schema(path)
        _check_columns(schema.names, columns, str(path))
        table = pa.parquet.read_table(path, columns=list(columns))
        return _encode(table, columns, str(path))
    if kind not in SEPARATORS and separator is None:
        other = {".ttl": "rdf", ".nt": "rdf", ".rdf": "rdf", ".owl": "rdf", ".obo": "obo"}.get(kind)
        hint = "a folder that was saved is read by KnowledgeGraph.load(...)" * path.is_dir()
        hint = f"KnowledgeGraph.from_{other}(...) reads {kind}" if other else hint
        raise ValueError(
            f"{path}: expected a file ending in .csv, .tsv, .txt (with or without .gz) or .parquet"
            f"{'; ' if hint else ', or separator= for another text file'}{hint}."
        )
    table = read_columns(path, columns, separator)
    try:
        return _encode(table, columns, str(path))
    except ValueError:
        explain(path, columns, separator)  # raises with the numbers of the lines
        raise


def _check_columns(there: Sequence[str], columns: Sequence[str], source: str) -> None:
    for name in columns:
        if name not in there:
            near = difflib.get_close_matches(name, list(there), n=3, cutoff=0.4)
            raise ValueError(
                f"{source}: there is no column {name!r}. Its columns are "
                f"{', '.join(map(repr, list(there)[:12]))}{f'; near: {near}' if near else ''}. "
                f"{naming(columns)}"
            )


def _table(triples: Any, columns: tuple[str, str, str]) -> Any:
    """What is in memory as an Arrow table of the three columns."""
    source = f"The {type(triples).__name__} of triples"
    if isinstance(triples, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ValueError(
            f"A {type(triples).__name__} holds several tables; pass one of its splits: "
            f"{', '.join(f'triples[{name!r}]' for name in triples)}."
        )
    if isinstance(triples, datasets.Dataset):
        _check_columns(triples.column_names, columns, source)
        return triples.select_columns(list(columns)).with_format("arrow")[:]
    if isinstance(triples, np.ndarray):
        if triples.ndim != 2 or triples.shape[1] != 3:
            raise ValueError(f"{source}: expected the shape (triples, 3), got {triples.shape}.")
        return _array_table(columns, [triples[:, i] for i in range(3)], source)
    if isinstance(triples, Mapping):
        _check_columns(list(triples), columns, source)
        return _array_table(columns, [triples[name] for name in columns], source)
    if hasattr(triples, "columns") and hasattr(triples, "iloc"):  # pandas
        _check_columns(list(triples.columns), columns, source)
        frame = triples[list(columns)]
        return _array_table(columns, [frame[name] for name in columns], source)
    if hasattr(triples, "__arrow_c_stream__"):  # pyarrow, polars
        table = pa.table(triples)
        _check_columns(table.column_names, columns, source)
        return table.select(list(columns))
    if isinstance(triples, Iterable):
        return _row_table(triples, columns)
    raise TypeError(
        f"Triples cannot be read from a {type(triples).__name__}: expected a path, a "
        "datasets.Dataset, a pandas DataFrame, or rows of (head, relation, tail)."
    )


def _array_table(columns: Sequence[str], values: Sequence[Any], source: str) -> Any:
    arrays = []
    for name, value in zip(columns, values, strict=True):
        try:
            arrays.append(pa.array(value, from_pandas=True))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"{source}: the column {name!r} must hold text or whole numbers only; {error}."
            ) from error
    return pa.table(arrays, list(columns))


def _row_table(rows: Iterable[Any], columns: tuple[str, str, str]) -> Any:
    """Rows of three cells, of which only some are Python objects at a time."""
    cell = pa.dictionary(pa.int32(), pa.large_string())
    schema = pa.schema([(name, cell) for name in columns])
    tables, first = [], 0
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        try:  # at once, where all cells are text; looked at one by one where they are not
            if not all(type(row) in (tuple, list) and len(row) == 3 for row in chunk):
                raise TypeError
            arrays = [pa.array(column, pa.large_string()) for column in zip(*chunk, strict=True)]
        except (TypeError, ValueError):  # pyarrow's own errors are of both kinds
            _check_rows(first, chunk, columns)
            cells = [[str(cell) for cell in _cells(row, columns)] for row in chunk]
            arrays = [pa.array(column, pa.large_string()) for column in zip(*cells, strict=True)]
        encoded = [array.dictionary_encode().cast(cell) for array in arrays]
        tables.append(pa.table(encoded, schema=schema))
        first += len(chunk)
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _cells(row: Any, columns: tuple[str, str, str]) -> Sequence[Any]:
    return [row[name] for name in columns] if isinstance(row, Mapping) else row


def _check_rows(first: int, rows: list[Any], columns: tuple[str, str, str]) -> None:
    """Raise a ValueError that shows the malformed rows, if there are any."""
    count, shown = 0, list[str]()
    for number, row in enumerate(rows, first):
        problem = _row_problem(row, columns)
        if problem is not None:
            count += 1
            if len(shown) < SHOWN:
                shown.append(f"  triples[{number}]: {problem}")
    if count:
        raise ValueError(
            "\n".join(
                [f"{count:,} malformed rows among triples[{first}:{first + len(rows)}].", *shown]
            )
            + f"\nA triple is three texts or whole numbers: ({', '.join(columns)})."
        )


def _row_problem(row: Any, columns: tuple[str, str, str]) -> str | None:
    if isinstance(row, Mapping):
        missing = [name for name in columns if name not in row]
        if missing:
            return f"expected the keys {', '.join(columns)}, got {', '.join(map(str, row))}"
        row = [row[name] for name in columns]
    if isinstance(row, (str, bytes)) or not isinstance(row, (Sequence, np.ndarray)):
        return f"expected (head, relation, tail), got {row!r:.60}"
    if len(row) != 3:
        return f"expected 3 cells (head, relation, tail), got {len(row)}: {row!r:.60}"
    for name, cell in zip(columns, row, strict=True):
        if isinstance(cell, bool) or not isinstance(cell, (str, int, np.integer)):
            return f"the {name} must be text or a whole number, got {cell!r:.60}"
        if isinstance(cell, str) and not cell.strip():
            return f"the {name} is empty: {row!r:.60}"
    return None


def _encode(table: Any, columns: Sequence[str], source: str) -> list[Column]:
    """The columns of an Arrow table, without white space around the texts."""
    return [encode(table.column(name), name, source) for name in columns]


def encode(array: Any, name: str, source: str) -> Column:
    """An Arrow column of text or whole numbers, without white space around the texts.

    Args:
        array: An Arrow array or chunked array.
        name: Of the column, for errors.
        source: Of the column, for errors.

    Raises:
        ValueError: If cells are empty (their rows are named) or of another type.
    """
    if len(array) == 0:
        return Column(np.zeros(0, np.int32), pa.array([], pa.large_string()))
    if isinstance(array, pa.Array):
        array = pa.chunked_array([array])
    if pa.types.is_dictionary(array.type):
        array = array.unify_dictionaries()
    else:
        kept = pa.types.is_string(array.type)  # as it is: a copy of all the texts would be large
        array = (array if kept else _text(array, name, source)).dictionary_encode()
    array = array.combine_chunks()
    values = _text(array.dictionary, name, source)
    trimmed = pc.utf8_trim_whitespace(values).dictionary_encode()  # may make two texts one
    codes = pc.fill_null(array.indices.cast(pa.int32()), -1).to_numpy(zero_copy_only=False)
    empty = pc.index(trimmed.dictionary, "").as_py()
    renumbered = np.asarray(trimmed.indices.to_numpy(), np.int32)
    present = renumbered[codes] if len(renumbered) else codes
    present = np.where(codes < 0, -1, present) if array.null_count else present
    rows = np.flatnonzero((present < 0) | (present == empty) if empty >= 0 else present < 0)
    if len(rows):
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        raise ValueError(
            f"{source}: the column {name!r} is empty in the rows "
            f"{', '.join(map(str, rows[:SHOWN].tolist()))}{more} (counted from 0). Fill or remove "
            "them."
        )
    return Column(present.astype(np.int32), trimmed.dictionary)


def _text(array: Any, name: str, source: str) -> Any:
    """The same as Arrow strings of any length."""
    kind = array.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not is_text and not pa.types.is_integer(kind) and str(kind) != "string_view":
        raise ValueError(
            f"{source}: the column {name!r} must hold text or whole numbers, got {kind}. Make it "
            "text first."
        )
    return array.cast(pa.large_string())
