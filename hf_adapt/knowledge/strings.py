"""Millions of strings in two arrays, which may be memory-mapped."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

CHUNK = 65536
"""How many strings are Python objects at a time when there are many."""


class StringTable:
    """A list of strings as one run of UTF-8 bytes and where each begins.

    It has no Python object for a string until one is asked for: a million names of 20 bytes take
    28 MB instead of 80.

    Args:
        blob: All the strings' bytes, uint8.
        offsets: Where each string begins, and where the last ends: int64, one more than strings.

    Raises:
        ValueError: If the offsets do not fit the bytes.

    Example:
        >>> table = StringTable.of(["été", "winter", "été"])
        >>> table[0], len(table), table.find("winter"), table.find("spring")
        ('été', 3, 1, -1)
    """

    def __init__(self, blob: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> None:
        if len(offsets) == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != len(blob):
            raise ValueError(
                f"The offsets of a string table must run from 0 to its {len(blob):,} bytes; got "
                f"{len(offsets):,} offsets that do not. The table is damaged: make it anew."
            )
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringTable:
        """From any strings, of which only some are held at a time."""
        chunks, chunk = [], list[str]()
        for string in strings:
            chunk.append(string)
            if len(chunk) == CHUNK:
                chunks.append(pa.array(chunk, pa.large_string()))
                chunk = []
        return cls.from_arrow(pa.chunked_array([*chunks, pa.array(chunk, pa.large_string())]))

    @classmethod
    def from_arrow(cls, strings: Any) -> StringTable:
        """From an Arrow array of strings without nulls."""
        strings = strings.cast(pa.large_string())  # first: 2 GB is the end of a small one
        if isinstance(strings, pa.ChunkedArray):
            strings = strings.combine_chunks()
        if len(strings) == 0:
            return cls(np.zeros(0, np.uint8), np.zeros(1, np.int64))
        _, offsets, blob = strings.buffers()
        starts = np.frombuffer(offsets, np.int64)[strings.offset :][: len(strings) + 1]
        data = np.frombuffer(blob, np.uint8) if blob is not None else np.zeros(0, np.uint8)
        return cls(data[starts[0] : starts[-1]].copy(), starts - starts[0])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            strings: list[str] = self.arrow()[first:last:step].to_pylist()
            return strings
        return self._bytes(index).decode()

    def _bytes(self, index: int) -> bytes:
        return self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), CHUNK):
            yield from self[first : first + CHUNK]

    def arrow(self) -> Any:
        """The same memory as an Arrow array."""
        # A view as plain ndarray: Arrow keeps it alive, and with it the memory map beneath.
        offsets = np.ascontiguousarray(self.offsets).view(np.ndarray)
        buffers = [pa.py_buffer(offsets), pa.py_buffer(self.blob.view(np.ndarray))]
        return pa.LargeStringArray.from_buffers(len(self), *buffers)

    @cached_property
    def _order(self) -> npt.NDArray[Any]:
        """The strings' numbers in the order of their bytes: a search without a dictionary."""
        order = np.asarray(pc.sort_indices(self.arrow()).to_numpy())
        return order.astype(np.int32 if len(self) < 2**31 else np.int64)

    def find(self, string: str) -> int:
        """The number of a string, -1 if it is not here; where it is twice, the first."""
        place = self._place(string)
        if place < len(self) and self[int(self._order[place])] == string:
            return int(self._order[place])
        return -1

    def _place(self, string: str) -> int:
        needle = string.encode("utf-8", "surrogatepass")
        return bisect.bisect_left(self._order, needle, key=lambda index: self._bytes(int(index)))

    def around(self, string: str, number: int) -> list[str]:
        """The strings next to this one in alphabetical order."""
        place = self._place(string)
        return [self[int(i)] for i in self._order[max(0, place - number) : place + number]]

    def find_all(self, strings: Any) -> npt.NDArray[np.int64]:
        """The numbers of many strings (a list or an Arrow array), -1 for those not here."""
        wanted = strings
        if not isinstance(strings, (pa.Array, pa.ChunkedArray)):
            wanted = pa.array(strings, pa.large_string())
        found = pc.fill_null(
            pc.index_in(wanted.cast(pa.large_string()), value_set=self.arrow()), -1
        )
        return np.asarray(found.to_numpy(), dtype=np.int64)

    def take(self, numbers: npt.NDArray[np.int64]) -> StringTable:
        """The strings of these numbers, in this order."""
        return StringTable.from_arrow(self.arrow().take(pa.array(numbers)))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made when needed: the pickle depends on the strings alone."""
        return {"blob": self.blob, "offsets": self.offsets}
