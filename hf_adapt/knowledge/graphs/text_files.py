"""Columns of text files: read fast, and read again line by line to say what is wrong with them."""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

logger = logging.getLogger(__name__)

SHOWN = 5
"""How many malformed lines an error shows; it counts them all."""

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}

HEADER_WORDS = frozenset(
    "alias aliases concept cui definition definitions description descriptions edge entity from "
    "gloss h head id iri key label labels name names node o object p predicate qid r rel relation "
    "s source subject surface synonym synonyms t tail target term text title to type uri".split()
)
"""Words of cells that name a column in the first line of a file, and are hardly ever an entity."""


def kind_of(path: Path) -> str:
    """The file's ending in lower case, without `.gz`: `.tsv`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number with its noun: "1 triple", "2,000 triples"."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed where its name ends in `.gz`, without a byte order mark.

    Raises:
        FileNotFoundError: If there is none; says what is in the folder instead.
        ValueError: If it is not a whole gzip file though its name says so, as soon as that shows.
    """
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
    r"""Each line of a file with its number; \n, \r\n and \r alone end lines."""
    return enumerate((line for lines in file for line in lines.splitlines(keepends=True)), 1)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line of a UTF-8 file with its number, without its end.

    Raises:
        ValueError: If bytes are not UTF-8; names the lines.
    """
    bad = Malformed(path)
    with open_binary(path) as file:
        for number, raw in raw_lines(file):
            try:
                yield number, raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                bad.add(number, _encoding_problem(error))
    bad.raise_if_any("Save the file as UTF-8.")


def _encoding_problem(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"expected UTF-8, got byte 0x{byte:02x} at position {error.start + 1}"


class Malformed:
    """Collects what is wrong with a file, and raises it as one error.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._shown: list[str] = []

    def add(self, line: int, problem: str) -> None:
        """One more malformed line."""
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"  line {line:,}: {problem}")

    def raise_if_any(self, fix: str) -> None:
        """Raise a ValueError that shows the first lines, if there are any."""
        if self.count:
            more = [f"  and {self.count - SHOWN:,} more"] if self.count > SHOWN else []
            lines = counted(self.count, "malformed line")
            raise ValueError("\n".join([f"{self.path}: {lines}.", *self._shown, *more, fix]))


def read_columns(path: Path, columns: Sequence[str], separator: str | None = None) -> Any:
    """Some columns of a csv or tsv file, as an Arrow table of strings.

    A first line that holds all the names of `columns` is a header, and other columns are left out.
    Without such a line the file has exactly these columns, in this order. Nothing is taken for a
    missing value: NA, null and nan are entities like any other.

    Args:
        path: The file, UTF-8; `.gz` is decompressed.
        columns: Their names.
        separator: Between the cells; by the file's ending where it is None. Cells may be in
            quotation marks; between tabs these are characters like any other, unless all the
            cells of the first line are in them.

    Raises:
        ValueError: With the number of each malformed line, or if the columns are not there.
    """
    if separator is None:
        separator = SEPARATORS.get(kind_of(path), "\t")
    number, first, quoted = _first_row(path, separator)
    header = set(columns) <= set(first)
    if not header:
        _check_without_header(path, number, first, columns, separator)
    elif twice := [name for name in columns if first.count(name) > 1]:
        raise ValueError(f"{path}, line {number}: the column {twice[0]!r} is there twice.")
    names = first if header else list(columns)
    skipped = number if header else 0
    marks, lines = _counts(path) if quoted else (0, 0)
    if marks % 2:  # pyarrow would take the rest for one cell
        explain(path, columns, separator)
    try:
        with open_binary(path) as file:  # pyarrow itself knows no .GZ, and less of what is wrong
            table = pa.csv.read_csv(
                pa.PythonFile(file, mode="r"),
                pa.csv.ReadOptions(column_names=names, skip_rows=skipped, block_size=1 << 24),
                pa.csv.ParseOptions(
                    delimiter=separator,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                ),
                pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()),
                    include_columns=list(columns),
                    null_values=[],
                    strings_can_be_null=False,
                ),
            )
    except pa.ArrowInvalid as error:
        explain(path, columns, separator)
        raise ValueError(f"{path}: {error}") from error
    if not header:
        _check_first_row(path, number, first, table, separator)
    if marks and table.num_rows + header < lines:  # cells of several lines, or open quotations
        explain(path, columns, separator)
    return table


def _counts(path: Path) -> tuple[int, int]:
    """How many quotation marks there are, and how many lines that are not blank."""
    marks = lines = 0
    with open_binary(path) as file:
        for _, raw in raw_lines(file):
            marks += raw.count(b'"')
            lines += not raw.isspace()
    return marks, lines


def explain(path: Path, columns: Sequence[str], separator: str | None) -> None:
    """Read a file again, slowly, and raise the numbers of its malformed lines, if any."""
    separator = separator or SEPARATORS.get(kind_of(path), "\t")
    bad = Malformed(path)
    _, _, quoted = _first_row(path, separator)
    with open_binary(path) as file:
        rows = _rows(file, separator, quoted, bad)
        number, first = next(rows)
        header = set(columns) <= set(first)
        width = len(first) if header else len(columns)
        wanted = [first.index(name) for name in columns] if header else range(width)
        names = ", ".join(first if header else columns)
        if not header:
            rows = itertools.chain([(number, first)], rows)
        for number, row in rows:
            if len(row) != width:
                text = separator.join(row)
                bad.add(
                    number,
                    f"expected {width} columns ({names}), got {len(row)}: {text[:60]!r}",
                )
                continue
            for column, index in zip(columns, wanted, strict=True):
                if not row[index].strip():
                    bad.add(number, f"the column {column!r} is empty: {separator.join(row)[:60]!r}")
    bad.raise_if_any(
        "Correct or remove these lines; separator= says what is between the columns "
        f"(now {separator!r})."
    )


def _rows(
    file: IO[bytes], separator: str, quoted: bool, bad: Malformed
) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not blank, and its number."""

    def decoded() -> Iterable[str]:
        for number, raw in raw_lines(file):
            try:
                yield raw.decode()
            except UnicodeDecodeError as error:
                bad.add(number, _encoding_problem(error))
                yield raw.decode("utf-8", "replace")

    if not quoted:
        for number, line in enumerate(decoded(), 1):
            if line := line.rstrip("\r\n"):
                yield number, line.split(separator)
        return
    reader = csv.reader(decoded(), delimiter=separator, strict=True)
    while True:
        number = reader.line_num + 1  # a quoted cell may go on over several lines
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            opened = ": a quotation mark is opened here and never closed"
            bad.add(number, f"{error}{opened if 'end of data' in str(error) else ''}")
            continue
        if row:
            yield number, row


def _first_row(path: Path, separator: str) -> tuple[int, list[str], bool]:
    """Number and cells of the first line that is not blank, and whether cells are quoted."""
    if len(separator) != 1:
        raise ValueError(f"separator={separator!r}: expected one character, such as ',' or '\\t'.")
    for quoted in (False, True):
        bad = Malformed(path)
        with open_binary(path) as file:
            for number, row in _rows(file, separator, quoted, bad):
                if quoted or (separator == "\t" and not all(map(_is_quoted, row))):
                    return number, [cell.strip() for cell in row], quoted
                break
    bad.raise_if_any("Correct or remove these lines.")
    raise ValueError(f"{path} is empty: expected one row on each line.")


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _check_first_row(path: Path, line: int, first: list[str], table: Any, separator: str) -> None:
    """The first row is one like the others, unless it has nothing in common with them."""
    columns, cells = table.column_names, [column[0].as_py() for column in table.columns]
    others = table.slice(1).columns
    # A relation may be there again as a relation, and an entity as a head or a tail.
    places = [(1,), (0, 2), (0, 2)] if len(cells) == 3 else [range(len(cells))] * len(cells)
    order = (1, 0, 2) if len(cells) == 3 else range(len(cells))
    for own, at in zip(order, places, strict=True):
        if any(pc.index(others[i], cells[own]).as_py() >= 0 for i in at):
            return
    num_names = sum(map(_is_header, first))
    if num_names == len(first):
        _raise_columns(path, line, first, columns)
    if len(cells) != 3 or table.num_rows == 1:
        return
    shown = ", ".join(repr(cell.strip()) for cell in cells)
    fix = (
        f"If these are the names of the columns, pass head={cells[0]!r}, relation={cells[1]!r}, "
        f"tail={cells[2]!r}."
    )
    # Where each other relation is there twice, the first row is the odd one out.
    counts = others[1].value_counts().field("counts")
    if num_names == 2 and table.num_rows > 3 and pc.min(counts).as_py() > 1:
        raise ValueError(
            f"{path}, line {line}: {shown} look like the names of the columns: no other row has "
            f"this relation or one of these entities. {fix} If they are a triple, put the line "
            f"{separator.join(columns)!r} before it."
        )
    logger.warning(
        "%s, line %d: %s are read as a triple, but no other row has the relation or one of the "
        "entities. %s",
        path,
        line,
        shown,
        fix,
    )


def _check_without_header(
    path: Path, line: int, first: list[str], columns: Sequence[str], separator: str
) -> None:
    """The first line is a row, unless its number of cells is another."""
    if len(first) != len(columns) and len(first) > 1:
        _raise_columns(path, line, first, columns)
    if len(first) == 1:
        raise ValueError(
            f"{path}, line {line}: expected {len(columns)} columns ({', '.join(columns)}), got 1: "
            f"{first[0][:60]!r}. The separator is {separator!r}; pass separator= for another."
        )


def _is_header(cell: str) -> bool:
    """Whether a cell names a column: `head`, `entity_id`."""
    words = re.findall(r"[^\W_]+", cell.lower())
    return bool(words) and HEADER_WORDS.issuperset(words)


def _raise_columns(path: Path, line: int, first: list[str], columns: Sequence[str]) -> NoReturn:
    raise ValueError(
        f"{path}, line {line}: expected a header with the columns {', '.join(columns)}, or exactly "
        f"{len(columns)} columns without a header; got {', '.join(map(repr, first[:8]))}. "
        f"{naming(columns)}"
    )


def naming(columns: Sequence[str]) -> str:
    """The advice for a file whose columns have other names."""
    if len(columns) == 3:  # of triples, which may be called anything
        return (
            "Name the file's columns (head=..., relation=..., tail=...), or call them "
            f"{', '.join(columns)}."
        )
    return f"Call the columns {' and '.join(columns)}."
