"""Tables of vectors in files of others: numpy, safetensors, word2vec text."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.knowledge.graphs.text_files import Malformed, counted, text_lines
from hf_adapt.knowledge.strings import StringTable

if TYPE_CHECKING:
    from hf_adapt.knowledge.graphs.graph import KnowledgeGraph

logger = logging.getLogger(__name__)

FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16}


def read_npy(path: Path) -> npt.NDArray[Any]:
    """The array of a .npy file, memory-mapped.

    Raises:
        ValueError: If it is not one, or not of floating numbers.
    """
    try:
        table: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npy file of numbers: {error}.") from error
    if not np.issubdtype(table.dtype, np.floating):
        raise ValueError(
            f"{path}: expected floating numbers, got {table.dtype}. Save array.astype('float32')."
        )
    return table


def read_safetensors(path: Path, name: str | None) -> tuple[npt.NDArray[Any], bool]:
    """A 2-D tensor of a .safetensors file, memory-mapped, and whether it is bfloat16.

    Reference:
        The format: 8 bytes with the header's length, a JSON header, the tensors' bytes.

    Raises:
        ValueError: If there is not exactly one, or none of this name.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}.") from error
    header.pop("__metadata__", None)
    tables = [key for key, about in header.items() if len(about["shape"]) == 2]
    chosen = name if name is not None else (tables[0] if len(tables) == 1 else None)
    if chosen not in header:
        there = [f"{key} {about['shape']}" for key, about in list(header.items())[:8]]
        raise ValueError(
            f"{path}: expected one tensor of the shape (entities, dimension)"
            f"{'' if name is None else f' called {name!r}'}; its tensors are "
            f"{', '.join(there) or 'none'}. Pass name='...' with one of them."
        )
    about = header[chosen]
    if about["dtype"] not in FLOATS:
        raise ValueError(f"{path}: expected floating numbers in {chosen!r}, got {about['dtype']}.")
    try:
        table = np.memmap(
            path,
            dtype=FLOATS[about["dtype"]],
            mode="r",
            offset=8 + length + about["data_offsets"][0],
            shape=tuple(about["shape"]),
        )
    except ValueError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}.") from error
    return table, about["dtype"] == "BF16"


def read_text(
    path: Path, graph: KnowledgeGraph, missing: Literal["zero", "error"]
) -> tuple[npt.NDArray[np.float32], int]:
    """The vectors of a graph's entities in word2vec's text format, and how many were found.

    The file is read twice: for the words, and for the numbers of those that are wanted. So a file
    of many more words than entities takes no more memory than the entities' vectors.

    Raises:
        ValueError: If lines are malformed, or entities are missing and `missing` is `"error"`.
    """
    first, dimension, count = _layout(path)
    words = _words(path, first, dimension)
    if len(words) < count:
        logger.warning(
            "%s has %s, and its first line says %s: the file may be cut off. Get it again if it "
            "should have them all.",
            path,
            counted(len(words), "vector"),
            f"{count:,}",
        )
    keys, labels = words.find_all(_keys(graph)), words.find_all(_labels(graph))
    spelled = words.find_all(pc.replace_substring(_labels(graph), " ", "_"))
    rows = np.where(keys >= 0, keys, np.where(labels >= 0, labels, spelled))
    found = int(np.count_nonzero(rows >= 0))
    _report(path, graph, rows, words, missing)
    table = np.zeros((len(graph), dimension), np.float32)
    order = np.argsort(rows, kind="stable")[len(graph) - found :]  # entities by their line
    bad, place = Malformed(path), 0
    for row, (number, _, numbers) in enumerate(_split(path, first, dimension)):
        if place == found or row != rows[order[place]]:
            continue
        try:
            vector = np.array(numbers.split(), np.float32)
        except ValueError as error:
            bad.add(number, str(error))
            vector = np.zeros(dimension, np.float32)
        while place < found and row == rows[order[place]]:  # several entities of one label
            table[order[place]] = vector
            place += 1
    bad.raise_if_any("A line is a word and its numbers, with spaces between.")
    return table, found


def _keys(graph: KnowledgeGraph) -> Any:
    return pa.array((graph.key(i) for i in range(len(graph))), pa.large_string())


def _labels(graph: KnowledgeGraph) -> Any:
    return pa.array((graph.label(i) for i in range(len(graph))), pa.large_string())


def _layout(path: Path) -> tuple[int, int, int]:
    """The first line with a vector, the vectors' dimension, and their number if it is said."""
    for number, line in text_lines(path):
        cells = line.split()
        if number == 1 and len(cells) == 2 and cells[0].isdigit() and cells[1].isdigit():
            return 2, int(cells[1]), int(cells[0])
        if "\t" in line:
            return number, len(line.partition("\t")[2].split()), 0
        numbers = 0
        while numbers < len(cells) - 1 and _is_number(cells[-1 - numbers]):
            numbers += 1
        if line[:1].isspace():  # a blank word, before nothing but numbers
            numbers += bool(cells) and _is_number(cells[0])
        if numbers:
            return number, numbers, 0
        raise ValueError(
            f"{path}, line {number}: expected a word and its numbers, got {line[:60]!r}."
        )
    raise ValueError(f"{path} is empty: expected a word and its numbers on each line.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _split(path: Path, first: int, dimension: int) -> Iterator[tuple[int, str, str]]:
    """The number of each line, its word, which may have spaces or be blank, and its numbers."""
    bad = Malformed(path)
    for number, line in text_lines(path):
        line = line.rstrip()
        if number < first or not line:
            continue
        if "\t" in line:
            word, _, numbers = line.partition("\t")
        else:
            cells = line.rsplit(" ", dimension)
            word, numbers = cells[0], " ".join(cells[1:])
        if numbers.count(" ") != dimension - 1:
            bad.add(number, f"expected a word and {dimension} numbers, got {line[:60]!r}")
            continue
        yield number, word, numbers
    bad.raise_if_any("Correct or remove these lines; all vectors have one dimension.")


def _words(path: Path, first: int, dimension: int) -> StringTable:
    """The words in the order of their lines; of one that is there again, the first counts."""
    words = StringTable.of(word.strip() for _, word, _ in _split(path, first, dimension))
    blank = int(np.count_nonzero(np.diff(words.offsets) == 0))
    if blank:
        number = counted(blank, "vector")
        logger.warning("%s: left out %s whose word is blank.", path, number)
    if again := len(words) - len(pc.unique(words.arrow())) - max(0, blank - 1):
        repeated = np.flatnonzero(words.find_all(words.arrow()) != np.arange(len(words)))
        shown = next(word for row in repeated.tolist() if (word := words[row]))
        number = counted(again, "vector")
        logger.warning(
            "%s: left out %s whose word was there before, such as %r.", path, number, shown
        )
    return words


def _report(
    path: Path,
    graph: KnowledgeGraph,
    rows: npt.NDArray[np.int64],
    words: StringTable,
    missing: Literal["zero", "error"],
) -> None:
    """Say how many entities were found; an error if none was, or `missing` does not allow it."""
    without = np.flatnonzero(rows < 0)
    found = len(rows) - len(without)
    shown = ", ".join(repr(graph.key(int(entity))) for entity in without[:5])
    if found == 0 or (missing == "error" and len(without)):
        raise ValueError(
            f"{path} has vectors of {found:,} of the graph's {len(rows):,} entities; without one "
            f"are {shown}{' …' * (len(without) > 5)}. Its words must be the entities' keys or "
            "labels; missing='zero' gives those without one zeros."
        )
    logger.info("%s: vectors of %d of %d entities, the rest zero.", path, found, len(rows))
    distinct = pc.unique(words.arrow())
    num_words = len(distinct) - (pc.index(distinct, "").as_py() >= 0)
    if unknown := num_words - len(np.unique(rows[rows >= 0])):
        logger.warning("%s: %d of its %d words are no entity's.", path, unknown, num_words)
