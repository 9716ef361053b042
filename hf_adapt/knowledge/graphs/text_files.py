"""Text files: lines with their numbers, and the rows of csv and tsv files, which pyarrow reads."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

logger = logging.getLogger(__name__)

SHOWN = 5
"""How many malformed lines or rows an error shows; it counts them all."""

WORDS = frozenset(
    "alias aliases concept cui definition definitions description descriptions edge entity from "
    "gloss h head id iri key label labels name names node o object p predicate qid r rel relation "
    "s source subject surface synonym synonyms t tail target term text title to type uri".split()
)
"""Words of cells that name a column in the first row of a file, and are hardly ever an entity."""

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}


def kind_of(path: Path) -> str:
    """Return the file's ending in lower case, without `.gz`: `.tsv`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a number with its noun: "1 triple", "2,000 triples"."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


class Malformed:
    """Collects what is wrong with a source, and raises it as one error."""

    def __init__(self, source: Any, noun: str = "line", place: str = "line {:,}") -> None:
        self.source, self.noun, self.place, self.count = source, noun, place, 0
        self._shown: list[str] = []

    def add(self, number: int, problem: str) -> None:
        """Add one malformed line."""
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"  {self.place.format(number)}: {problem}")

    def raise_if_any(self, fix: str) -> None:
        """Raise a ValueError that shows the first lines, if there are any."""
        if self.count:
            more = [f"  and {self.count - SHOWN:,} more"] if self.count > SHOWN else []
            what = counted(self.count, f"malformed {self.noun}")
            raise ValueError("\n".join([f"{self.source}: {what}.", *self._shown, *more, fix]))


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open a file's bytes, decompressed if its name ends in `.gz`, without a byte order mark."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file.")
    if not path.exists():
        there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"There is no file {path}. {path.parent} holds {', '.join(there[:8]) or 'nothing'}."
        )
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            if file.peek(3).startswith(codecs.BOM_UTF8):
                file.read(3)
            yield cast(IO[bytes], file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not a whole gzip file: {error}. Get it again, or give it a name without "
            ".gz if it is not compressed."
        ) from error


def raw_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    r"""Iterate over the lines of a file with their numbers; \n, \r\n and \r alone end lines."""
    return enumerate((line for lines in file for line in lines.splitlines(keepends=True)), 1)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Iterate over the lines of a UTF-8 file with their numbers, without line ends."""
    bad = Malformed(path)
    with open_binary(path) as file:
        for number, raw in raw_lines(file):
            try:
                yield number, raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                byte = f"0x{error.object[error.start]:02x} at position {error.start + 1}"
                bad.add(number, f"expected UTF-8, got byte {byte}")
    bad.raise_if_any("Save the file as UTF-8.")


class TextTable:
    """The rows of a csv or tsv file; blank lines are not rows.

    Cells may be in quotation marks. Between tabs these are characters like any other, unless all
    cells of the first row are in them. Where they quote, a stray one would silently join lines to
    one cell, so every cell that begins with one must also end with one.
    """

    def __init__(self, path: Path, separator: str | None) -> None:
        self.path, self.separator = path, separator or SEPARATORS.get(kind_of(path), "\t")
        if len(self.separator.encode()) != 1:
            raise ValueError(
                f"separator={separator!r}: expected one character, such as ',' or '\\t'."
            )
        with open_binary(path) as file:
            lines = (line.rstrip(b"\r\n") for _, line in raw_lines(file))
            cells = next(filter(None, lines), b"").split(b"\t")
        self.quoted = self.separator != "\t" or all(
            len(cell) > 1 and cell[:1] == cell[-1:] == b'"' for cell in cells
        )
        if self.quoted and self._has_marks():
            for _ in self._rows():  # pyarrow takes what the file says, stray marks too
                pass
        if (first := next(self._rows(), None)) is None:
            raise ValueError(f"{path} is empty: expected one row on each line.")
        self.line, self.first = first[0], [cell.strip() for cell in first[1]]

    def _has_marks(self) -> bool:
        with open_binary(self.path) as file:
            return any(b'"' in block for block in iter(partial(file.read, 1 << 20), b""))

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """The first line and the cells of each row, by Python's own reader, which is slow."""
        line, limit = 1, csv.field_size_limit(1 << 30)
        try:
            with open_binary(self.path) as file:
                reader = csv.reader(
                    io.TextIOWrapper(cast(Any, file), encoding="utf-8", newline=""),
                    delimiter=self.separator,
                    quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
                    strict=True,
                )
                for cells in reader:
                    if cells:
                        yield line, cells
                    line = reader.line_num + 1
        except UnicodeDecodeError:
            for _ in text_lines(self.path):  # raises with the numbers of the lines
                pass
            raise
        except csv.Error as error:
            problem = "unexpected end of data: a quotation mark is opened here and never closed"
            if "expected after" in str(error):
                problem = f"{self.separator!r} expected after the closing quotation mark"
            bad = Malformed(self.path)
            bad.add(line, problem)
            bad.raise_if_any("Correct this line; a mark inside of a quoted cell is doubled.")
        finally:
            csv.field_size_limit(limit)

    def read(self, columns: Sequence[str], header: bool) -> Any:
        """Return some columns as an Arrow table of strings; NA, null and nan are texts."""
        try:
            with open_binary(self.path) as file:
                return pa.csv.read_csv(
                    file,
                    pa.csv.ReadOptions(
                        column_names=self.first if header else list(columns),
                        skip_rows_after_names=self.line if header else 0,
                        block_size=1 << 24,
                    ),
                    pa.csv.ParseOptions(
                        delimiter=self.separator,
                        quote_char='"' if self.quoted else False,
                        newlines_in_values=self.quoted,
                    ),
                    pa.csv.ConvertOptions(
                        column_types=dict.fromkeys(columns, pa.string()),
                        include_columns=list(columns),
                        null_values=[],
                        strings_can_be_null=False,
                    ),
                )
        except pa.ArrowInvalid as error:
            self.explain(columns, header)
            raise ValueError(f"{self.path}: {error}") from error

    def explain(self, columns: Sequence[str], header: bool) -> None:
        """Read again, slowly, and raise a ValueError with the malformed lines, if there are any."""
        names, bad = self.first if header else list(columns), Malformed(self.path)
        for number, (line, cells) in enumerate(self._rows()):
            text = repr(self.separator.join(cells)[:60])
            if len(cells) != len(names):
                expected = f"expected {len(names)} columns ({', '.join(names)})"
                bad.add(line, f"{expected}, got {len(cells)}: {text}")
                continue
            empty = [name for name in columns if not cells[names.index(name)].strip()]
            if empty and (number or not header):
                bad.add(line, f"the column {empty[0]!r} is empty: {text}")
        bad.raise_if_any(
            "Correct or remove these lines; separator= says what is between the columns "
            f"(now {self.separator!r})."
        )


# ---- whether the first row of a text file names its columns ----


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
    """Return whether the first row names all of these columns."""
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
    """Check a first row that was read as a row, if it has nothing in common with the others."""
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
