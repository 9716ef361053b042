"""Text files: lines with their numbers, and the rows of csv and tsv files, which pyarrow reads."""

from __future__ import annotations

import codecs
import gzip
import mmap
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

SHOWN = 5
"""How many malformed lines or rows an error shows; it counts them all."""

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}


def kind_of(path: Path) -> str:
    """Return the file's ending in lower case, without `.gz`: `.tsv`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a number with its noun: "1 triple", "2,000 triples"."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


class Malformed:
    """Collects what is wrong with a source, and raises it as one error.

    Args:
        source: What is read: a file, or what an error calls it.
        noun: What is malformed.
        place: How a number names one of them.
    """

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
    """Open a file's bytes, decompressed if its name ends in `.gz`, without a byte order mark.

    Raises:
        FileNotFoundError: If there is no such file; lists what is in the folder.
        ValueError: If it is not a complete gzip file though its name says so.
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
    r"""Iterate over the lines of a file with their numbers; \n, \r\n and \r alone end lines."""
    return enumerate((line for lines in file for line in lines.splitlines(keepends=True)), 1)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Iterate over the lines of a UTF-8 file with their numbers, without line ends.

    Raises:
        ValueError: If bytes are not UTF-8, with the numbers of the lines.
    """
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

    Args:
        path: The file, UTF-8; `.gz` is decompressed.
        separator: Between the cells; by the file's ending if it is None.

    Raises:
        ValueError: If the file is empty, or its quotation marks are malformed.
    """

    def __init__(self, path: Path, separator: str | None) -> None:
        self.path, self.separator = path, separator or SEPARATORS.get(kind_of(path), "\t")
        if len(self.separator.encode()) != 1:
            raise ValueError(
                f"separator={separator!r}: expected one character, such as ',' or '\\t'."
            )
        self._data: Any = _content(path)
        mark = re.escape(self.separator.encode())
        line = re.search(rb"[^\r\n]++", self._data)
        if line is None:
            raise ValueError(f"{path} is empty: expected one row on each line.")
        marked = [len(c) > 1 and c[:1] == c[-1:] == b'"' for c in line[0].split(b"\t")]
        self.quoted = self.separator != "\t" or all(marked)
        self._cell = self._row = rb"[^\r\n]++"
        if self.quoted:
            self._cell = rb'(?:"[^"]*+"(?:"[^"]*+")*+|(?!")[^%b\r\n]*+)' % mark
            self._row = rb"(?:%b%b)*+%b" % (self._cell, mark, self._cell)
            self._check_quotation_marks(mark)
        first = next(self._rows(0))
        self._start, self._end = first.span()
        (self.line,) = self._lines([self._start])
        try:
            text = first[0].decode()
        except UnicodeDecodeError:
            self._check_encoding()
            raise
        cells = text.split(self.separator)
        if self.quoted:
            cells = re.findall(f"(?:^|{mark.decode()})({self._cell.decode()})", text)
            cells = [c[1:-1].replace('""', '"') if c.startswith('"') else c for c in cells]
        self.first = [cell.strip() for cell in cells]

    def read(self, columns: Sequence[str], header: bool) -> Any:
        """Return some columns as an Arrow table of strings.

        Nothing is taken for a missing value: NA, null and nan are texts like any other.

        Args:
            columns: Their names, which are all of the file's if it has no header.
            header: Whether the first row names the columns.

        Raises:
            ValueError: With the number of each malformed line.
        """
        names, start = self._body(columns, header)
        try:
            return self._parse(start, names, columns)
        except pa.ArrowInvalid as error:
            self.explain(columns, header)
            raise ValueError(f"{self.path}: {error}") from error

    def explain(self, columns: Sequence[str], header: bool) -> None:
        """Read again, slowly, and raise a ValueError with the malformed lines, if there are any."""
        self._check_encoding()
        names, start = self._body(columns, header)
        problems: dict[int, str] = {}

        def skip(row: Any) -> str:
            expected = f"expected {len(names)} columns ({', '.join(names)})"
            problems[row.number - 1] = f"{expected}, got {row.actual_columns}: {row.text[:60]!r}"
            return "skip"

        table = self._parse(start, names, columns, skip)
        places = [row.start() for row in self._rows(start)]
        rows = np.delete(np.arange(len(places)), list(problems))
        for name in columns:
            for i in np.flatnonzero(pc.equal(pc.utf8_trim_whitespace(table[name]), "")).tolist():
                text = self.separator.join(cells[i].as_py() for cells in table.columns)
                problems[int(rows[i])] = f"the column {name!r} is empty: {text[:60]!r}"
        bad = Malformed(self.path)
        malformed = sorted(problems)
        lines = self._lines([places[row] for row in malformed])
        for row, line in zip(malformed, lines, strict=True):
            bad.add(line, problems[row])
        bad.raise_if_any(
            "Correct or remove these lines; separator= says what is between the columns "
            f"(now {self.separator!r})."
        )

    def _body(self, columns: Sequence[str], header: bool) -> tuple[list[str], int]:
        """The names of all columns, and where the first row after the header begins."""
        return (self.first, self._end) if header else (list(columns), self._start)

    def _parse(
        self, start: int, names: Sequence[str], columns: Sequence[str], on_invalid: Any = None
    ) -> Any:
        """The one call of pyarrow's reader."""
        if start == len(self._data):
            return pa.table({name: pa.array([], pa.string()) for name in columns})
        return pa.csv.read_csv(
            pa.BufferReader(pa.py_buffer(self._data).slice(start)),
            pa.csv.ReadOptions(
                column_names=names,
                block_size=1 << 24,
                use_threads=on_invalid is None,  # several threads do not number the rows
            ),
            pa.csv.ParseOptions(
                delimiter=self.separator,
                quote_char='"' if self.quoted else False,
                newlines_in_values=self.quoted,
                invalid_row_handler=on_invalid,
            ),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=list(columns),
                null_values=[],
                strings_can_be_null=False,
            ),
        )

    def _rows(self, start: int) -> Iterator[re.Match[bytes]]:
        return (row for row in re.compile(self._row).finditer(self._data, start) if row[0])

    def _check_quotation_marks(self, mark: bytes) -> None:
        if self._data.find(b'"') < 0:
            return
        good = re.match(rb"(?:%b(?:[%b\r\n]|\Z))*+" % (self._cell, mark), self._data)
        place = good.end() if good else 0
        if place == len(self._data):
            return
        text = self._data[place : place + 60].splitlines()[0].decode("utf-8", "replace")
        problem = "unexpected end of data: a quotation mark is opened here and never closed"
        if self._data.find(b'"', place + 1) >= 0:
            problem = f"{self.separator!r} expected after the closing quotation mark"
        bad = Malformed(self.path)
        bad.add(self._lines([place])[0], f"{problem}: {text!r}")
        bad.raise_if_any("Correct this line; a quotation mark inside of a quoted cell is doubled.")

    def _check_encoding(self) -> None:
        for _ in text_lines(self.path):
            pass

    def _lines(self, places: Sequence[int]) -> list[int]:
        """The numbers of the lines in which these places are, which are in order."""
        data = np.frombuffer(self._data, np.uint8, max(places, default=0))
        is_end = data == ord("\n")
        is_end[:-1] |= (data[:-1] == ord("\r")) & ~is_end[1:]
        is_end[-1:] |= data[-1:] == ord("\r")
        numbers: list[int] = (np.searchsorted(np.flatnonzero(is_end), places) + 1).tolist()
        return numbers


def _content(path: Path) -> bytes | mmap.mmap:
    """All bytes of a file, memory-mapped where they lie on disk as they are."""
    with open_binary(path) as file:
        if path.name.lower().endswith(".gz") or file.tell() or not path.stat().st_size:
            return file.read()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
