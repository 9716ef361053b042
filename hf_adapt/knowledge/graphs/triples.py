"""Triples of text from any source, as three dictionary-encoded Arrow columns."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from hf_adapt.knowledge.graphs.text_files import (
    SEPARATORS,
    SHOWN,
    Malformed,
    TextTable,
    check_columns,
    check_first_row,
    has_header,
    kind_of,
)
from hf_adapt.storage.string_table import CHUNK

Column = Any
"""A `pyarrow.DictionaryArray` of strings without nulls; its dictionary may have unused values."""


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN or pandas' NA; the texts 'NA', 'nan' and '' are not missing."""
    if isinstance(value, (float, np.floating)):
        return bool(np.isnan(value))
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def read_triples(
    triples: Any, columns: Sequence[str], separator: str | None = None
) -> list[Column]:
    """Read the columns head, relation and tail of a file, a table or an iterable."""
    if isinstance(triples, (str, Path)):
        return read_file(Path(triples), columns, separator)
    source = f"The {type(triples).__name__} of triples"
    return _encode(_table(triples, columns, source), columns, source)


def without(columns: list[Column], entities: Collection[str]) -> list[Column]:
    """Return the triples with neither head nor tail among these entities."""
    if not entities:
        return columns
    unwanted = pa.array(sorted(entities), pa.large_string())
    found = [pc.is_in(columns[i].dictionary, unwanted).take(columns[i].indices) for i in (0, 2)]
    keep = pc.invert(pc.or_(*found))
    return [column.filter(keep) for column in columns]


def read_file(path: Path, columns: Sequence[str], separator: str | None = None) -> list[Column]:
    """Read some columns of a csv, tsv or parquet file.

    A text file whose first row has the names of all `columns` may have others, in any order;
    without such a row it has exactly these columns.
    """
    kind = kind_of(path)
    if kind in (".parquet", ".pq"):
        check_columns(pa.parquet.read_schema(path).names, columns, str(path))
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
    rows = TextTable(path, separator)
    header = has_header(rows, columns)
    table = rows.read(columns, header)
    if not header:
        check_first_row(rows, table)
    try:
        return _encode(table, columns, str(path))
    except ValueError:
        rows.explain(columns, header)  # raises with the numbers of the lines
        raise


def _table(triples: Any, columns: Sequence[str], source: str) -> Any:
    """What is in memory as an Arrow table of the three columns."""
    if isinstance(triples, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ValueError(
            f"A {type(triples).__name__} holds several tables; pass one of its splits: "
            f"{', '.join(f'triples[{name!r}]' for name in triples)}."
        )
    if isinstance(triples, datasets.Dataset):
        check_columns(triples.column_names, columns, source)
        return triples.select_columns(list(columns)).with_format("arrow")[:]
    if isinstance(triples, np.ndarray):
        if triples.ndim != 2 or triples.shape[1] != 3:
            raise ValueError(f"{source}: expected the shape (triples, 3), got {triples.shape}.")
        triples = dict(zip(columns, triples.T, strict=True))
    if isinstance(triples, Mapping) or hasattr(triples, "iloc"):  # a mapping, pandas
        check_columns(list(triples.keys()), columns, source)
        return pa.table({name: _array(triples[name], name, source) for name in columns})
    if hasattr(triples, "__arrow_c_stream__"):  # pyarrow, polars
        table = pa.table(triples)
        check_columns(table.column_names, columns, source)
        return table.select(list(columns))
    if isinstance(triples, Iterable):
        return _row_table(triples, columns)
    raise TypeError(
        f"Triples cannot be read from a {type(triples).__name__}: expected a path, a "
        "datasets.Dataset, a pandas DataFrame, or rows of (head, relation, tail)."
    )


def _array(values: Any, name: str, source: str) -> Any:
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"{source}: the column {name!r} must hold text or whole numbers only; {error}."
        ) from error


def _row_table(rows: Iterable[Any], columns: Sequence[str]) -> Any:
    """A table of rows of three cells, of which only a chunk are Python objects at a time."""
    kind = pa.dictionary(pa.int32(), pa.large_string())
    schema = pa.schema([(name, kind) for name in columns])
    tables, first, iterator = [schema.empty_table()], 0, iter(rows)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        try:  # all at once if all cells are text; otherwise they are looked at one by one
            if not all(type(row) in (tuple, list) and len(row) == 3 for row in chunk):
                raise TypeError
            arrays = [pa.array(column, pa.large_string()) for column in zip(*chunk, strict=True)]
        except (TypeError, ValueError):  # pyarrow's own errors are of both kinds
            bad = Malformed(f"triples[{first}:{first + len(chunk)}]", "row", "triples[{}]")
            for number, row in enumerate(chunk, first):
                if problem := _row_problem(row, columns):
                    bad.add(number, problem)
            bad.raise_if_any(f"A triple is three texts or whole numbers: ({', '.join(columns)}).")
            cells = [[str(cell) for cell in _cells(row, columns)] for row in chunk]
            arrays = [pa.array(column, pa.large_string()) for column in zip(*cells, strict=True)]
        encoded = [array.dictionary_encode().cast(kind) for array in arrays]
        tables.append(pa.table(encoded, schema=schema))
        first += len(chunk)
    return pa.concat_tables(tables)


def _cells(row: Any, columns: Sequence[str]) -> Sequence[Any]:
    return [row[name] for name in columns] if isinstance(row, Mapping) else row


def _row_problem(row: Any, columns: Sequence[str]) -> str | None:
    if isinstance(row, Mapping) and not set(columns) <= set(row):
        return f"expected the keys {', '.join(columns)}, got {', '.join(map(str, row))}"
    row = _cells(row, columns)
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
    return [encode(table.column(name), name, source) for name in columns]


def encode(array: Any, name: str, source: str) -> Column:
    """Encode an Arrow column of text or whole numbers, without white space around the texts."""
    if isinstance(array, list):
        array = pa.array(array, pa.large_string())
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
    codes = trimmed.indices.take(array.indices)
    blank = pa.scalar(pc.index(trimmed.dictionary, "").as_py(), codes.type)
    empty = pc.fill_null(pc.equal(codes, blank), True)
    if len(rows := pc.indices_nonzero(empty)):
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        raise ValueError(
            f"{source}: the column {name!r} is empty in the rows "
            f"{', '.join(map(str, rows[:SHOWN].to_pylist()))}{more} (counted from 0). Fill or "
            "remove them."
        )
    return pa.DictionaryArray.from_arrays(codes, trimmed.dictionary)


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
