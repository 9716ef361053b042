"""Where a text is in another: whole, a window of it, or a cut end of it; in linear time."""

from __future__ import annotations

from typing import NamedTuple

TRIES = 32
"""Occurrences that are looked at for one that is not inside a word."""


class Overlap(NamedTuple):
    """Equal parts of a row and a text.

    Args:
        at: Where the part begins in the row.
        of: Where it begins in the text.
        length: Its length.
    """

    at: int
    of: int
    length: int


def find_whole(row: str, text: str, start: int) -> tuple[int, bool]:
    """Where the whole text is, rather not beginning or ending inside a word; -1 if nowhere.

    Args:
        row: What the row spells.
        text: The text, not empty.
        start: The first character of the row that may be part of it.

    Returns:
        The position, and whether it is between words.
    """
    position = first = row.find(text, start)
    for _ in range(TRIES):
        if position < 0:
            break
        end = position + len(text)
        around = row[max(position - 1, 0) : position], row[end : end + 1]
        if not any(character.isascii() and character.isalnum() for character in around):
            return position, True
        position = row.find(text, position + 1)
    return first, False


def find_part(run: str, text: str) -> Overlap | None:
    """The longest part of a text that a run has because the text was cut.

    The run is a window of the text, or it begins with the text's end, or ends with its beginning.

    Args:
        run: Characters, or ids as characters.
        text: The same of the text.
    """
    if not run:
        return None
    if (position := text.find(run)) >= 0:
        return Overlap(0, position, len(run))
    head, tail = shared_length(run, text), shared_length(text, run)
    if head >= tail:
        return Overlap(len(run) - head, 0, head) if head else None
    return Overlap(0, len(text) - tail, tail)


def shared_length(one: str, other: str) -> int:
    """The length of the longest end of `one` that `other` begins with, in linear time.

    Reference:
        Knuth, Morris & Pratt 1977, "Fast pattern matching in strings".
    """
    size = min(len(one), len(other))
    other, borders, matched = other[:size], [0], 0
    for item in other[1:]:
        while matched and other[matched] != item:
            matched = borders[matched - 1]
        matched += other[matched] == item
        borders.append(matched)
    matched = 0
    for item in one[len(one) - size :]:
        while matched and other[matched] != item:
            matched = borders[matched - 1]
        matched += other[matched] == item
    return matched
