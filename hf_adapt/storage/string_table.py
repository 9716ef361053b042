"""Millions of strings in one Arrow array, which may be memory-mapped."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

CHUNK = 65536
"""Number of strings that are Python objects at the same time."""


class StringTable:
    """A list of strings in an Arrow array, with a search for the position of a string.

    A string becomes a Python object only when it is read: a million names of 20 bytes take 28 MB
    instead of 80.

    Args:
        array: An Arrow array of strings without nulls.

    Example:
        >>> table = StringTable.of(["été", "winter", "été"])
        >>> table[0], len(table), table.find("winter"), table.find("spring")
        ('été', 3, 1, -1)
    """

    def __init__(self, array: Any) -> None:
        array = array.cast(pa.large_string())  # before combining: a small one ends at 2 GB
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
        self.array = array

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringTable:
        """Build the table from an iterable, of which only a chunk is in memory at a time."""
        iterator, chunks = iter(strings), list[Any]()
        while chunk := list(itertools.islice(iterator, CHUNK)):
            chunks.append(pa.array(chunk, pa.large_string()))
        return cls(pa.chunked_array(chunks, pa.large_string()))

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found: str | list[str]
        found = (
            self.array[index].to_pylist() if isinstance(index, slice) else self.array[index].as_py()
        )
        return found

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), CHUNK):
            yield from self[first : first + CHUNK]

    @cached_property
    def _order(self) -> npt.NDArray[Any]:
        """The positions in alphabetical order: a search without a dictionary."""
        order = np.asarray(pc.sort_indices(self.array).to_numpy())
        return order.astype(np.int32 if len(self) < 2**31 else np.int64)

    def find(self, string: str) -> int:
        """Return the first position of a string, or -1 if the table does not have it."""
        place = self._place(string)
        if place < len(self) and self[int(self._order[place])] == string:
            return int(self._order[place])
        return -1

    def _place(self, string: str) -> int:
        # Arrow sorts by UTF-8 bytes, Python by code points, which is the same order.
        return bisect.bisect_left(self._order, string, key=lambda index: self[int(index)])

    def around(self, string: str, number: int) -> list[str]:
        """Return the strings before and after this one in alphabetical order."""
        place = self._place(string)
        return [self[int(i)] for i in self._order[max(0, place - number) : place + number]]

    def find_all(self, strings: Any) -> npt.NDArray[np.int64]:
        """Return the positions of strings (a list or an Arrow array), -1 for unknown ones."""
        if not isinstance(strings, (pa.Array, pa.ChunkedArray)):
            strings = pa.array(strings, pa.large_string())
        found = pc.index_in(strings.cast(pa.large_string()), value_set=self.array)
        return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)

    def take(self, positions: npt.NDArray[np.int64]) -> StringTable:
        """Return a table of the strings at these positions, in this order."""
        return StringTable(self.array.take(pa.array(positions)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the strings alone, without the order that the search has made."""
        return StringTable, (self.array,)
