"""Finds the names of a dictionary in a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import accumulate, compress, islice
from typing import Any, Protocol

from hf_adapt.knowledge.linking.normalization import Folded, inner_offsets, token_splitter

Match = tuple[int, int, int]
"""Start and end in the folded text, and the number of the name."""
BEGINNING = -(1 << 62)
"""The code of what is only the beginning of names."""
CHUNK = 256
"""Names that are looked at together when a matcher is built."""


class Matcher(Protocol):
    """Finds names in a folded text."""

    def find(self, folded: Folded, overlapping: bool) -> list[Match]:
        """Matches by start; the leftmost, and of those the longest, unless `overlapping`."""
        ...


def leftmost_longest(matches: list[Match]) -> list[Match]:
    """Of matches that overlap, the first to begin; of those, the longest.

    Args:
        matches: Start, end with its sign turned round (so that the longest sorts first), number.

    Example:
        >>> leftmost_longest([(0, -3, 0), (0, -8, 1), (4, -12, 2), (9, -12, 3)])
        [(0, 8, 1), (9, 12, 3)]
    """
    matches.sort()
    kept: list[Match] = []
    free = 0
    for start, negative_end, number in matches:
        if start >= free:
            free = -negative_end
            kept.append((start, free, number))
    return kept


class WordMatcher:
    """Finds names word by word, in pure Python: the default.

    A dictionary holds every name and every beginning of a name that ends with a token; a smaller
    one holds the first tokens, so that a word that begins no name costs one look-up. Building takes
    about a microsecond a name.
    """

    def __init__(self, names: Mapping[str, int], whole_words: bool = True) -> None:
        self.whole_words = whole_words
        # A code is a name's number, or BEGINNING; names that others go on from have it negative.
        self._codes = dict(names)
        self._first = dict[str, int]()
        rows = iter(names.items())
        while chunk := list(islice(rows, CHUNK)):
            text = "".join([name for name, _ in chunk])
            if whole_words and text.isascii() and text.replace(" ", "").isalnum():
                self._add_plain(chunk)
                continue
            for name, number in chunk:
                if whole_words and name.isascii() and name.replace(" ", "").isalnum():
                    self._add_plain([(name, number)])
                else:
                    self._add_beginnings(name, number)

    def _add_plain(self, rows: list[tuple[str, int]]) -> None:
        """Names of ASCII letters and digits: each space ends a token, and only spaces do."""
        first, codes = self._first, self._codes
        for name, number in rows:
            space = name.find(" ")
            if space < 0:
                first[name] = -number if name in first else number
                continue
            # As `_goes_on` does it; a call for each would be a third of the time of building.
            head = name[:space]
            code = first.get(head)
            if code is None:
                first[head] = BEGINNING
            elif code > 0:
                first[head] = -code
            while (space := name.find(" ", space + 1)) >= 0:
                head = name[:space]
                code = codes.get(head)
                if code is None:
                    codes[head] = BEGINNING
                elif code > 0:
                    codes[head] = -code

    def _add_beginnings(self, name: str, number: int) -> None:
        pieces = token_splitter(name.isascii(), self.whole_words)(name)
        ends = list(accumulate(map(len, pieces)))[1::2]
        if len(ends) == 1:
            self._first[name] = -number if name in self._first else number
            return
        _goes_on(self._first, name[: ends[0]])
        for end in ends[1:-1]:
            _goes_on(self._codes, name[:end])

    def find(self, folded: Folded, overlapping: bool) -> list[Match]:
        """Matches by start; the leftmost, and of those the longest, unless `overlapping`."""
        text = folded.text
        pieces = token_splitter(text.isascii(), self.whole_words)(text)
        codes = list(map(self._first.get, pieces[1::2]))
        if not any(codes):
            return []
        ends = list(accumulate(map(len, pieces)))
        starts, stops = ends[::2], ends[1::2]
        if overlapping or folded.inside:
            matches = self._all(folded, codes, starts, stops)
            return matches if overlapping else leftmost_longest([(s, -e, n) for s, e, n in matches])
        longer, number, free = self._codes.get, len(codes), 0
        found: list[Match] = []
        for first in compress(range(number), codes):
            if first < free:
                continue
            code = codes[first] or 0
            start, last, best = starts[first], first, code
            token = first
            while code < 0 and (token := token + 1) < number:
                code = longer(text[start : stops[token]], 0)
                if code > BEGINNING and code:
                    best, last = code, token
            if best > BEGINNING:
                found.append((start, stops[last], abs(best)))
                free = last + 1
        return found

    def _all(
        self, folded: Folded, codes: list[int | None], starts: list[int], stops: list[int]
    ) -> list[Match]:
        """Every match, those inside of others too; none that cuts a character of the text."""
        text, inside, longer, number = folded.text, folded.inside, self._codes.get, len(codes)
        found: list[Match] = []
        for first in compress(range(number), codes):
            start, token, code = starts[first], first, codes[first] or 0
            while start not in inside:
                if code > BEGINNING and code and stops[token] not in inside:
                    found.append((start, stops[token], abs(code)))
                if code >= 0 or (token := token + 1) == number:
                    break
                code = longer(text[start : stops[token]], 0)
        return found


def _goes_on(codes: dict[str, int], name: str) -> None:
    """Note that names begin with this one."""
    code = codes.setdefault(name, BEGINNING)
    if code > 0:
        codes[name] = -code


class AhoCorasickMatcher:
    """Finds names with an automaton written in Rust (the extra `knowledge`).

    The same matches as `WordMatcher`, from one pass over the characters: faster where few words are
    names and on scripts without spaces; slower to build.
    """

    def __init__(self, names: Mapping[str, int], whole_words: bool = True) -> None:
        self.whole_words = whole_words
        self._names = list(names)
        self._numbers = list(names.values())
        self._find = _automaton(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_find": None}  # the automaton cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find = _automaton(self._names)

    def find(self, folded: Folded, overlapping: bool) -> list[Match]:
        """Matches by start; the leftmost, and of those the longest, unless `overlapping`."""
        # All matches, then boundaries, then the longest: an automaton that picks the longest first
        # drops a name whose longer rival ends in the middle of a word.
        found = self._find(folded.text)
        if not found:
            return []
        numbers, inner = self._numbers, inner_offsets(folded, self.whole_words)
        if b"\1" in inner:
            found = [match for match in found if not (inner[match[1]] or inner[match[2]])]
        if overlapping:
            return sorted((start, end, numbers[name]) for name, start, end in found)
        return leftmost_longest([(start, -end, numbers[name]) for name, start, end in found])


def _automaton(names: list[str]) -> Callable[[str], list[tuple[int, int, int]]]:
    try:
        from ahocorasick_rs import AhoCorasick
    except ImportError as error:
        raise ImportError(
            "matcher='ahocorasick' needs the package ahocorasick_rs, which is not installed: "
            'pip install "hf-adapt[knowledge]", or use matcher="words".'
        ) from error
    automaton = AhoCorasick(names)

    def find(text: str) -> list[tuple[int, int, int]]:
        try:
            return automaton.find_matches_as_indexes(text, overlapping=True)
        except UnicodeEncodeError:  # half of a character, of a text that was cut
            whole = _replace_surrogates("\ufffd", text)
            return automaton.find_matches_as_indexes(whole, overlapping=True)

    return find


_replace_surrogates = re.compile("[\ud800-\udfff]").sub
