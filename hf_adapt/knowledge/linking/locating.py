"""Where a sequence lies in another that has all, a window or a cut end of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
    first = place = find(row, text, start, size)
    while place >= 0 and size == 1:
        around = row[max(place - 1, 0) : place], row[place + len(text) : place + len(text) + 1]
        if not any(byte.isalnum() for byte in around):
            break
        place = find(row, text, place + 1, size)
    place = place if place >= 0 else first
    return Overlap(place, 0, len(text) // size) if place >= 0 else None


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
    few = 8 * size
    place = find(one, other[:size], max(0, (len(one) - len(other)) // size), size)
    while place >= 0:
        at = place * size
        # A glance first: whole ends of long texts are not copied at each equal letter.
        if other.startswith(one[at : at + few]) and other.startswith(one[at:]):
            return place
        place = find(one, other[:size], place + 1, size)
    return None
