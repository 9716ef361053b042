"""Which characters of its text each token of a row stands for."""

from __future__ import annotations

import functools
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_adapt.knowledge.linking.folding import Folded, fold
from hf_adapt.knowledge.linking.locating import Overlap, find_part, find_whole
from hf_adapt.knowledge.linking.mentions import Mention
from hf_adapt.knowledge.linking.pieces import ITEM, Row, Span, TokenPieces

# A shorter part than this may be there by chance, unless it is all that a run has.
FEW_TOKENS, FEW_BYTES = 8, 32
CACHED_TEXTS = 4096


class Placed(NamedTuple):
    """The tokens of a text in a row.

    Args:
        positions: Their positions in the row, ascending.
        starts: The first character of each; none is empty.
        ends: One more than the last character of each.
        start: The first character of the text that the row has.
        end: One more than the last.
        loses_marks: Whether offsets may leave accents out, so that their absence is no cut.
    """

    positions: list[int]
    starts: list[int]
    ends: list[int]
    start: int
    end: int
    loses_marks: bool = False

    @classmethod
    def of(
        cls, kept: list[tuple[int, int, int]], start: int, end: int, loses_marks: bool = False
    ) -> Placed:
        """From the position, the first character and the end of each token."""
        positions, starts, ends = ([item[place] for item in kept] for place in range(3))
        return cls(positions, starts, ends, start, end, loses_marks)

    def tokens(self, text: str, start: int, end: int) -> Span | None:
        """First position and end of the tokens that stand for some characters of the text.

        None if no token does, or the row was cut inside of them.
        """
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        missing = text[start : min(self.start, end)] + text[max(self.end, start) : end]
        droppable = "CMZ" if self.loses_marks else "Z"
        if any(unicodedata.category(character)[0] not in droppable for character in missing):
            return None
        first, last = bisect_right(self.ends, start), bisect_left(self.starts, end) - 1
        if first > last:
            return None
        return self.positions[first], self.positions[last] + 1

    def among(self, text: str, mentions: Sequence[Mention]) -> Sequence[Mention]:
        """Of all the mentions of the text, by start, those that the row may have.

        A window of a long text has few of them.
        """
        start = self.start
        droppable = "CMZ" if self.loses_marks else "Z"
        while start > 0 and unicodedata.category(text[start - 1])[0] in droppable:
            start -= 1
        first = bisect_left(mentions, start, key=_start)
        return mentions[first : bisect_left(mentions, self.end, first, key=_start)]


@functools.lru_cache(maxsize=16)
def _composed(text: str) -> Folded:
    """The text as tokenizers that compose characters see it; windows of one ask again."""
    return fold(text, ignore_case=False)


def _start(mention: Mention) -> int:
    return mention.start


class Placer:
    """Finds texts in tokenised rows.

    Args:
        tokenizer: The fast tokenizer that made the rows.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pieces = TokenPieces(tokenizer)
        self._tokenizer = tokenizer
        self._encode = Recent(self._encoded)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encode": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encode = Recent(self._encoded)

    def place(self, row: Row, texts: Sequence[str | None]) -> list[Placed | None]:
        """Find each text after the one before it.

        Args:
            row: The row.
            texts: Its texts; None for a column that the row lacks.
        """
        real = [place for place, text in enumerate(texts) if text and not text.isspace()]
        if 1 < len(real) == len(row.runs):
            made = self._place_in_runs(row, texts, real)
            if any(made):
                return made
        made, after = [None] * len(texts), 0
        for place in real:
            placed = self._place(row, texts[place] or "", after)
            if placed is not None:
                made[place], after = placed, placed.positions[-1] + 1
        return made

    def _place_in_runs(
        self, row: Row, texts: Sequence[str | None], real: list[int]
    ) -> list[Placed | None]:
        """A run for each text, as pairs have it: one that was cut is not taken for another."""
        made: list[Placed | None] = [None] * len(texts)
        for place, (first, end) in zip(real, row.runs, strict=True):
            found = self._place(row.part(first, end), texts[place] or "", 0)
            if found is not None:
                made[place] = found._replace(positions=[first + at for at in found.positions])
        return made

    def _place(self, row: Row, text: str, after: int) -> Placed | None:
        unsure = None
        if self.pieces.is_exact:
            # Characters against characters: no tokenising, whatever is written around the text.
            found, unsure = self._by_bytes(row, text, after)
            if found is not None:
                return found
        for given, shift in ((text, 0), (" " + text, 1)):
            ids, spans = self._encode(given)
            whole = find_whole(row.ids, ids, after, ITEM) if ids else None
            if whole is not None:
                return _by_ids(whole, spans, shift, text)
        ids, spans = self._encode(text)
        return self._part_by_ids(row, ids, spans, text, after) or unsure

    def _by_bytes(self, row: Row, text: str, after: int) -> tuple[Placed | None, Placed | None]:
        """Where a text's characters are, and else where they may be."""
        start, unsure = row.bounds[after], None
        for is_folded in (False, True):
            # Many tokenizers compose characters, and sentencepiece makes whitespace one space.
            spelling = _composed(text) if is_folded else Folded(text)
            if is_folded and spelling.text == text:
                break
            stripped = spelling.text.strip()
            content = stripped.encode("utf-8", "replace")
            found = find_whole(row.spelling, content, start, 1)
            if found is not None:
                return _from_bytes(row, found, spelling, stripped, content), None
            found = find_part(row.spelling, row.spelt_runs, content, start, 1)
            if found is None:
                continue
            placed = _from_bytes(row, found, spelling, stripped, content)
            if found.length >= FEW_BYTES:
                return placed, None
            if unsure is None and _is_run(found, row.spelt_runs):
                unsure = placed
        return None, unsure

    def _part_by_ids(
        self, row: Row, ids: bytes, spans: list[Span], text: str, after: int
    ) -> Placed | None:
        """A text that was cut, or whose outer words are tokenised with what is around it."""
        found = []
        part = find_part(row.ids, row.runs, ids, after, ITEM)
        if part is not None and (part.length >= FEW_TOKENS or _is_run(part, row.runs)):
            found.append(part)
        first, last = _inner(text, spans)
        for begin, end in ((first, len(spans)), (0, last), (first, last)):
            if end - begin >= FEW_TOKENS:
                inner = ids[begin * ITEM : end * ITEM]
                whole = find_whole(row.ids, inner, after, ITEM)
                found += [] if whole is None else [whole._replace(of=begin)]
        longest = max(found, key=lambda overlap: overlap.length, default=None)
        return None if longest is None else _by_ids(longest, spans, 0, text)

    def _encoded(self, text: str) -> tuple[bytes, list[Span]]:
        made = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,  # a text longer than the model takes is no news here
        )
        ids, pieces = made["input_ids"], self.pieces
        # A token of whitespace alone has the offsets of the word that follows.
        spans = [
            (0, 0) if pieces[token].isspace() else span
            for token, span in zip(ids, made["offset_mapping"], strict=True)
        ]
        return array("i", ids).tobytes(), spans


class Recent:
    """Keeps what a function made of the last texts: epochs and windows ask again.

    Args:
        function: Of a text.
    """

    def __init__(self, function: Callable[[str], Any]) -> None:
        self._function = function
        self._made: dict[str, Any] = {}

    def __call__(self, text: str) -> Any:
        """What the function makes of the text."""
        made = self._made.pop(text, None)
        if made is None:
            made = self._function(text)
            if len(self._made) >= CACHED_TEXTS:
                del self._made[next(iter(self._made))]  # the one that was not asked for longest
        self._made[text] = made
        return made


def _inner(text: str, spans: list[Span]) -> Span:
    """The first token of the second word, and the first of the last word."""
    words = text.split(maxsplit=1)
    second = text.index(words[0]) + len(words[0])
    last = len(text.rstrip()) - len(text.split()[-1])
    places = [place for place, (start, _) in enumerate(spans) if start >= second]
    ends = [place for place, (start, _) in enumerate(spans) if start >= max(1, last - 1)]
    return min(places, default=len(spans)), min(ends, default=len(spans))


def _is_run(part: Overlap, runs: list[Span]) -> bool:
    return any(part.at == first and part.length == end - first for first, end in runs)


def _by_ids(part: Overlap, spans: list[Span], shift: int, text: str) -> Placed:
    """From equal tokens to the characters of each."""
    end = part.of + part.length
    kept = [
        (part.at + place, max(0, start - shift), stop - shift)
        for place, (start, stop) in enumerate(spans[part.of : end])
        if stop > max(shift, start)
    ]
    # What no token stands for is not cut off; a character some of whose tokens are missing is.
    before = next((stop for start, stop in reversed(spans[: part.of]) if stop > start), shift)
    after = next((start for start, stop in spans[end:] if stop > start), len(text) + shift)
    return Placed.of(kept, before - shift, after - shift)


def _from_bytes(row: Row, part: Overlap, spelling: Folded, text: str, content: bytes) -> Placed:
    """From equal bytes to the characters of each token."""
    if len(content) == len(text):
        owner: Sequence[int] = range(len(text) + 1)
    else:
        begins = (np.frombuffer(content, dtype=np.uint8) & 0xC0) != 0x80
        owner = [*(np.cumsum(begins) - 1).tolist(), len(text)]
    bounds, stop = row.bounds, part.at + part.length
    move, lead = part.of - part.at, spelling.text.index(text)
    origin = spelling.origin
    kept = []
    first, last = bisect_right(bounds, part.at) - 1, bisect_left(bounds, stop)
    begin = max(bounds[first], part.at)
    for token, bound in enumerate(bounds[first + 1 : last + 1], first):
        end = min(bound, stop)
        if end > begin:
            kept.append((token, owner[begin + move] + lead, owner[end - 1 + move] + 1 + lead))
        begin = end
    if spelling.starts is not None:
        kept = [(token, origin(start), origin(end)) for token, start, end in kept]
    is_cut = part.of > 0 and owner[part.of] == owner[part.of - 1]
    start = origin(owner[part.of] + is_cut + lead)
    return Placed.of(kept, start, origin(owner[part.of + part.length] + lead))


def place_by_offsets(
    row: Row, texts: Sequence[str | None], offsets: Sequence[Span], pieces: TokenPieces
) -> list[Placed | None] | None:
    """The tokens of each text by the offsets that the tokenizer kept.

    None if they cannot be those of these texts, one run of tokens for each.

    Args:
        row: The row.
        texts: Its texts; blank ones have no tokens.
        offsets: First character and end for each token.
        pieces: What tokens spell.
    """
    if len(offsets) != len(row.tokens):
        return None
    real = [place for place, text in enumerate(texts) if text and not text.isspace()]
    if len(row.runs) != len(real):
        return None
    made: list[Placed | None] = [None] * len(texts)
    for place, (first, end) in zip(real, row.runs, strict=True):
        text = texts[place] or ""
        kept = [
            (i, *offsets[i])
            for i in range(first, end)
            if offsets[i][1] > offsets[i][0] and not row.is_blank(i)
        ]
        if not kept or not _fits(row, text, kept, pieces):
            return None
        cut_before, cut_after = row.cuts(first, end)
        made[place] = Placed.of(
            kept, kept[0][1] + cut_before, kept[-1][2] - cut_after, row.loses_marks
        )
    return made


def _fits(row: Row, text: str, kept: list[tuple[int, int, int]], pieces: TokenPieces) -> bool:
    """Whether offsets are of this text, and not of a prompt that it is part of."""
    if max(end for _, _, end in kept) > len(text):
        return False
    for token, start, end in kept[:: max(1, len(kept) // 8)]:
        spelt = pieces[row.tokens[token]].decode("utf-8", "replace").removeprefix("##").strip()
        part = text[start:end].strip()
        if spelt.isascii() and spelt.isalnum() and part.isascii():
            if part.casefold() != spelt.casefold():
                return False
    return True
