"""Normalization: names and texts as they are compared, and the way back to a text's offsets."""

from __future__ import annotations

import functools
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035"
    "\u3038-\u303c\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
# Vowels and finals of decomposed Hangul: letters, but NFC joins them to what is before.
JAMO = "\u1160-\u11ff"
JOINERS = "\u200c\u200d"
# Two regional indicators are a flag; a black flag and tags are that of a country's part.
FLAGS = "[\U0001f1e6-\U0001f1ff]{2}|\U0001f3f4[\U000e0020-\U000e007f]+"
SOFT_HYPHEN = "\u00ad"
# Each is one character for one, so that no offset moves.
PUNCTUATION = [(odd, "'") for odd in "\u2018\u2019\u201b\u02bc\uff07"]
PUNCTUATION += [(odd, "-") for odd in "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"]
RULES = 3
"""Raised whenever names or texts fold otherwise, so that no cache of older rules is read."""
find_unspaced = re.compile(f"[{UNSPACED}]").search
_odd_space = re.compile(r"[^\S ]")
_odd_ascii_space = {code: " " for code in range(128) if chr(code).isspace()}
_spaces = re.compile(r"\s{2,}")
# Chinese and Japanese characters, and punctuation: tokens of their own.
SIGNS = "\u3001-\u3029\u3041-\u3096\u309b-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff01-\uff0f"
_other_than_signs = re.compile(f"[^{SIGNS}]+").finditer


class Folded(NamedTuple):
    """A text as it is compared."""

    text: str
    starts: list[int] | None = None
    origins: list[int] | None = None
    inside: frozenset[int] = frozenset()

    def origin(self, offset: int) -> int:
        """The offset in the text that it was made of, for one that is not in `inside`."""
        if self.starts is None or self.origins is None:
            return offset
        block = bisect_right(self.starts, offset) - 1
        return self.origins[block] + offset - self.starts[block]


def fold(text: str, ignore_case: bool) -> Folded:
    """Fold a text without losing track of its offsets.

    Canonically equal strings ('é' as one character or as two) fold alike, and with `ignore_case`
    so do strings that differ in case alone ('ß' and 'SS' too). A soft hyphen after a character or a
    space is left out.

    Args:
        text: Any text.
        ignore_case: Whether case differences are folded away.

    Example:
        >>> folded = fold("İzmir  Bay", ignore_case=True)
        >>> folded.text, folded.origin(7)
        ('i̇zmir bay', 7)
    """
    folded = text.casefold() if ignore_case else text
    is_ascii = text.isascii()
    if not folded.isprintable():  # whitespace other than a space is never printable
        odd = _odd_ascii_space
        folded = folded.translate(odd) if is_ascii else _odd_space.sub(" ", folded)
    # A character folds to one or more, so an equal length means one to one.
    plain = is_ascii or (SOFT_HYPHEN not in text and unicodedata.is_normalized("NFC", folded))
    if plain and len(folded) == len(text):
        return Folded(folded) if "  " not in folded else _without_runs(folded)
    return _fold_blocks(text, ignore_case)


def fold_punctuation(text: str) -> str:
    """The text with plain apostrophes and hyphens, of the same length.

    Names and texts are compared so; tokens, which spell what the text has, are not.
    """
    if not text.isascii():
        for odd, plain in PUNCTUATION:
            text = text.replace(odd, plain)  # faster than a table: most texts have few of them
    return text


def fold_names(names: Sequence[str], ignore_case: bool) -> list[str]:
    """Names as they are compared: folded, without whitespace around them."""
    text = "\n".join(names)
    if (
        text.isascii()
        and text.replace("\n", "").isprintable()
        and text.count("\n") == len(names) - 1
        and not any(spaces in text for spaces in ("  ", " \n", "\n "))
        and text.strip(" ") == text
    ):
        return (text.casefold() if ignore_case else text).split("\n")
    return [fold(fold_punctuation(name), ignore_case).text.strip(" ") for name in names]


def _without_runs(text: str) -> Folded:
    """Each run of spaces as one."""
    pieces: list[str] = []
    starts, origins = [0], [0]
    end = moved = 0
    for run in _spaces.finditer(text):
        pieces.append(text[end : run.start() + 1])
        end = run.end()
        moved += end - run.start() - 1
        starts.append(end - moved)
        origins.append(end)
    return Folded("".join([*pieces, text[end:]]), starts, origins)


def _fold_blocks(text: str, ignore_case: bool) -> Folded:
    """Fold piece by piece: whitespace, characters with their marks, and what is between them."""

    def folded(part: str) -> str:
        return unicodedata.normalize("NFC", part.casefold() if ignore_case else part)

    pieces: list[str] = []
    starts, origins, inside = [0], [0], set[int]()

    def add(made: str, size: int, is_one: bool = False) -> None:
        start = starts[-1]
        if is_one or len(made) != size:
            inside.update(range(start + 1, start + len(made)))
        pieces.append(made)
        starts.append(start + len(made))
        origins.append(origins[-1] + size)

    def add_plain(part: str) -> None:
        made = _odd_space.sub(" ", folded(part))
        if len(made) == len(part):
            add(made, len(part))
            return
        for character in part:
            add(_odd_space.sub(" ", folded(character)), 1)

    end = 0
    for unit in _units()(text):
        if unit.start() > end:
            add_plain(text[end : unit.start()])
        part, end = unit.group(), unit.end()
        made = " " if part[0].isspace() else part[0] + part[1:].replace(SOFT_HYPHEN, "")
        # With a soft hyphen 'ß' is as long as "ss", and still one character.
        add(folded(made), len(part), is_one=SOFT_HYPHEN in part)
    if end < len(text):
        add_plain(text[end:])
    return Folded("".join(pieces), starts, origins, frozenset(inside))


@functools.cache
def _units() -> Callable[[str], Iterator[re.Match[str]]]:
    # No more than 30 marks at once, as in Unicode's stream-safe format: to order them costs the
    # square of their number.
    marks = _marks()
    return re.compile(
        rf"\s[\s{SOFT_HYPHEN}]+|\S[{marks}{SOFT_HYPHEN}]{{1,30}}|[{marks}]{{1,30}}|\S?[{JAMO}]+"
    ).finditer


@functools.cache
def _marks() -> str:
    """Combining marks as the inside of a character class; `re` has no name for them."""
    ranges: list[list[int]] = []
    for code in (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)):
        if unicodedata.category(chr(code))[0] == "M":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return JOINERS + "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


@functools.cache
def token_splitter(ascii_only: bool, whole_words: bool) -> Callable[[str], list[str]]:
    """Splits a folded text into [gap, token, gap, token, …, gap]; a gap is empty or a space.

    A token is a word with its combining marks, a character of a script without spaces, a flag of
    two characters, or any other single character. A match begins and ends with a token. Without
    `whole_words` each character, with its marks, is a token.
    """
    if ascii_only:
        return re.compile(r"([A-Za-z0-9_]+|\S)" if whole_words else r"(\S)").split
    marks = _marks()
    letters = rf"[^\W{UNSPACED}]"
    word = rf"{letters}+(?:[{marks}]+{letters}*)*|" if whole_words else ""
    return re.compile(rf"({word}\w[{marks}]*|{FLAGS}|\S)").split


@functools.cache
def ascii_letters() -> bytes:
    """A table for `bytes.translate`: 1 for what makes up a word, else 0."""
    return bytes(chr(code).isalnum() or chr(code) == "_" for code in range(128)) + bytes(128)


def inner_offsets(folded: Folded, whole_words: bool) -> bytearray:
    """For each offset of a folded text 1 if no match may begin or end there, else 0.

    That is inside of a token, as `token_splitter` makes them, or of a character of the text that
    was folded.
    """
    text = folded.text
    inner = bytearray(len(text) + 1)
    if text.isascii() and whole_words:
        # Both sides are letters: as two numbers of a bit each character, in one operation.
        letters = int.from_bytes(text.encode().translate(ascii_letters()), "little")
        inner = bytearray((letters & (letters << 8)).to_bytes(len(text) + 1, "little"))
    elif not text.isascii():
        find_tokens = _long_tokens(whole_words)
        for part in _other_than_signs(text):  # of Chinese text, next to nothing
            for token in find_tokens(text, max(0, part.start() - 1), part.end()):
                start, end = token.span()
                inner[start + 1 : end] = b"\1" * (end - start - 1)
    for offset in folded.inside:
        inner[offset] = 1
    return inner


@functools.cache
def _long_tokens(whole_words: bool) -> Callable[[str, int, int], Iterator[re.Match[str]]]:
    """Tokens of more than one character."""
    marks = _marks()
    letters = rf"[^\W{UNSPACED}]"
    word = rf"{letters}+(?:[{marks}]+{letters}*)+|{letters}{{2,}}|" if whole_words else ""
    return re.compile(rf"{word}\w[{marks}]+|{FLAGS}").finditer
