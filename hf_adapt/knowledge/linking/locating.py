"""Where a sequence lies in another that has all, a window or a cut end of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BASE = np.uint64(0x9E3779B97F4A7C15)
ALPHANUMERIC = [byte for byte in range(128) if chr(byte).isalnum()]


class Overlap(NamedTuple):
    """Equal parts of two sequences, in items.

    Args:
        at: Where the part begins in the row.
        of: Where it begins in the text.
        length: Its length.
    """

    at: int
    of: int
    length: int


def find(sequence: bytes, part: bytes, start: int, size: int) -> int:
    """Like `bytes.find` from item `start` on, for items of `size` bytes; -1 if it is not there."""
    place = sequence.find(part, start * size)
    while place >= 0 and place % size:
        place = sequence.find(part, place + 1)
    return place // size if place >= 0 else -1


def find_whole(row: bytes, text: bytes, start: int, size: int) -> Overlap | None:
    """The whole text in the row; rather where it does not begin or end inside a word.

    Args:
        row: The row.
        text: The text, not empty.
        start: The first item of the row that may be part of it.
        size: Bytes of an item; of 1, they are UTF-8.
    """
    place = find(row, text, start, size)
    if place >= 0 and size == 1:
        place = _between_words(row, text, place)
    return Overlap(place, 0, len(text) // size) if place >= 0 else None


def _between_words(row: bytes, text: bytes, first: int) -> int:
    """The first place of the text from `first` on that is not inside a word, else `first`."""
    end = first + len(text)
    if not (row[max(first - 1, 0) : first].isalnum() or row[end : end + 1].isalnum()):
        return first
    sums, powers = _hashes(np.frombuffer(row, np.uint8))
    wanted = _hashes(np.frombuffer(text, np.uint8))[0][-1]
    last = len(row) - len(text) + 1
    places = np.flatnonzero(sums[len(text) :] - sums[:last] == wanted * powers[:last])
    letters = np.isin(np.frombuffer(b" " + row + b" ", np.uint8), ALPHANUMERIC)
    places = places[~(letters[places] | letters[places + len(text) + 1])]
    later = (place for place in places[places >= first].tolist() if row.startswith(text, place))
    return next(later, first)


def _hashes(items: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Polynomial hashes of all beginnings, which wrap at 2^64, and the powers in them.

    Places that may be equal are found all at once: comparing one after another would be quadratic
    in a text that repeats itself.
    """
    powers = np.concatenate([[np.uint64(1)], np.cumprod(np.full(len(items), BASE))])
    return np.concatenate([[np.uint64(0)], np.cumsum(items * powers[1:])]), powers


def find_part(
    row: bytes, runs: Sequence[tuple[int, int]], text: bytes, start: int, size: int
) -> Overlap | None:
    """The longest part of a text that is in a row because the text was cut.

    A run of the row lies inside the text (a window of it), or begins with the text's end, or ends
    with its beginning (a template around the text, cut).

    Args:
        row: The row.
        runs: First item and end of each run of it without special tokens.
        text: The text.
        start: The first item of the row that may be part of it.
        size: Bytes of an item.
    """
    best: Overlap | None = None
    for first, end in runs:
        first = max(first, start)
        if end <= first:
            continue
        found = _overlap(row[first * size : end * size], text, size)
        if found is not None and (best is None or found.length > best.length):
            best = Overlap(first + found.at, found.of, found.length)
    return best


def _overlap(run: bytes, text: bytes, size: int) -> Overlap | None:
    place = find(text, run, 0, size)
    if place >= 0:
        return Overlap(0, place, len(run) // size)
    ends_run = _tail_in_head(run, text, size)
    ends_text = _tail_in_head(text, run, size)
    found = []
    if ends_run is not None:
        found.append(Overlap(ends_run, 0, len(run) // size - ends_run))
    if ends_text is not None:
        found.append(Overlap(0, ends_text, len(text) // size - ends_text))
    return max(found, key=lambda overlap: overlap.length, default=None)


def _tail_in_head(one: bytes, other: bytes, size: int) -> int | None:
    """Where the longest end of `one` begins that is a beginning of `other`."""
    length = min(len(one), len(other)) // size
    items = np.uint8 if size == 1 else np.uint32
    beginnings, powers = _hashes(np.frombuffer(other, items, length))
    ends, _ = _hashes(np.frombuffer(one, items)[len(one) // size - length :])
    same = ends[-1] - ends == beginnings[::-1] * powers
    for shift in np.flatnonzero(same[:-1]).tolist():
        place: int = len(one) // size - length + shift
        if other.startswith(one[place * size :]):
            return place
    return None
