"""Tables of vectors in files of other programs: numpy, safetensors, word2vec text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.graphs.text_files import SHOWN, Malformed, counted, text_lines
from hf_adapt.storage.string_table import StringTable

logger = logging.getLogger(__name__)


def read_npy(path: Path) -> npt.NDArray[Any]:
    """Map the array of a .npy file into memory."""
    try:
        table: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npy file of numbers: {error}.") from error
    if not np.issubdtype(table.dtype, np.floating):
        raise ValueError(
            f"{path}: expected floating numbers, got {table.dtype}. Save array.astype('float32')."
        )
    return table


def read_safetensors(path: Path, name: str | None) -> torch.Tensor:
    """Map a 2-D tensor of a .safetensors file into memory."""
    try:
        with safe_open(path, "pt") as file:
            about = {key: file.get_slice(key) for key in file.keys()}
            shapes = {key: about[key].get_shape() for key in about}
            tables = [key for key in about if len(shapes[key]) == 2] if name is None else [name]
            if len(tables) != 1 or tables[0] not in about:
                there = ", ".join(f"{key} {shapes[key]}" for key in list(about)[:8])
                raise ValueError(
                    f"{path}: expected one tensor of the shape (entities, dimension)"
                    f"{'' if name is None else f' called {name!r}'}; its tensors are "
                    f"{there or 'none'}. Pass name='...' with one of them."
                )
            if (kind := about[tables[0]].get_dtype()) not in ("F16", "F32", "F64", "BF16"):
                raise ValueError(f"{path}: expected floating numbers in {tables[0]!r}, got {kind}.")
            tensor: torch.Tensor = file.get_tensor(tables[0])
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}.") from error
    return tensor


def read_text(
    path: Path, graph: KnowledgeGraph, missing: Literal["zero", "error"]
) -> tuple[npt.NDArray[np.float32], int]:
    """Read the vectors of a graph's entities in word2vec's text format; also how many were found.

    The file is read twice: for the words, and for the numbers of those that are wanted. So a file
    with many more words than entities takes no more memory than the entities' vectors. pyarrow's
    reader cannot read it, because words may contain the space that separates the numbers.
    """
    first, dimension, count = _layout(path)
    words = _words(path, first, dimension)
    if len(words) < count:
        logger.warning(
            f"{path} has {counted(len(words), 'vector')}, and its first line says {count:,}: the "
            "file may be cut off. Get it again if it should have them all."
        )
    every = range(len(graph))
    labels = pa.array(map(graph.label, every), pa.large_string())
    rows = words.find_all(pa.array(map(graph.key, every), pa.large_string()))
    for spelling in (labels, pc.replace_substring(labels, " ", "_")):
        rows = np.where(rows >= 0, rows, words.find_all(spelling))
    _report(path, graph, rows, words, missing)
    table, bad = np.zeros((len(graph), dimension), np.float32), Malformed(path)
    found, owner = np.flatnonzero(rows >= 0), np.full(len(words), -1)
    owner[rows[found[::-1]]] = found[::-1]  # of entities with one label the first
    for entity, line in zip(owner.tolist(), _split(path, first, dimension), strict=True):
        if entity >= 0:
            try:
                table[entity] = np.array(line[2].split(), np.float32)
            except ValueError as error:
                bad.add(line[0], str(error))
    bad.raise_if_any("A line is a word and its numbers, with spaces between.")
    twins = found[owner[rows[found]] != found]
    table[twins] = table[owner[rows[twins]]]
    return table, len(found)


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
    if blank := pc.sum(pc.equal(words.array, "")).as_py():
        logger.warning("%s: left out %s whose word is blank.", path, counted(blank, "vector"))
    again = pa.array(words.find_all(words.array) != np.arange(len(words)))
    repeated = words.array.filter(pc.and_(again, pc.not_equal(words.array, "")))
    if len(repeated):
        number, first = counted(len(repeated), "vector"), repeated[0].as_py()
        logger.warning(
            "%s: left out %s whose word was there before, such as %r.", path, number, first
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
    shown = ", ".join(repr(graph.key(int(entity))) for entity in without[:SHOWN])
    if found == 0 or (missing == "error" and len(without)):
        raise ValueError(
            f"{path} has vectors of {found:,} of the graph's {len(rows):,} entities; without one "
            f"are {shown}{' …' * (len(without) > SHOWN)}. Its words must be the entities' keys or "
            "labels; missing='zero' gives those without one zeros."
        )
    logger.info("%s: vectors of %d of %d entities, the rest zero.", path, found, len(rows))
    distinct = pc.unique(words.array)
    num_words = len(distinct) - (pc.index(distinct, "").as_py() >= 0)
    if unknown := num_words - len(np.unique(rows[rows >= 0])):
        logger.warning("%s: %d of its %d words are no entity's.", path, unknown, num_words)
