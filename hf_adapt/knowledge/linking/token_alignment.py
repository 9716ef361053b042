"""From mentions by character to mentions by token, in three steps.

The tokens of a row that stand for its text are found by the offsets that the tokenizer kept. Where
the row has none, the text is tokenised again and its tokens are found in the row; the characters
are compared instead where tokens spell them exactly, whatever template stands around the text. And
where the row has no text that fits, what its tokens decode to is linked, with a warning.
"""

from __future__ import annotations

import functools
import unicodedata
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hf_adapt.engine.texts import joined_text
from hf_adapt.knowledge.linking.mentions import (
    MENTIONS,
    TOKEN_MENTIONS,
    FindsMentions,
    Mention,
    TokenMention,
    as_list,
    from_cell,
)
from hf_adapt.knowledge.linking.normalization import Folded, fold
from hf_adapt.knowledge.linking.text_search import Overlap, find_part, find_whole
from hf_adapt.knowledge.linking.token_pieces import Span, TokenPieces
from hf_adapt.knowledge.linking.token_row import TokenRow, as_characters, is_cut

OFFSETS = "offset_mapping"
KEEP_TEXT = "Keep the text as a column of the dataset, or run linker.map first."
CACHED_TEXTS = 4096
# A shorter part of a text than this may be there by chance, unless it is all that a run has.
FEW_TOKENS, FEW_BYTES = 8, 32


class Alignment(NamedTuple):
    """The tokens of a text in a row.

    Args:
        positions: Their positions in the row, ascending.
        starts: The first character of each; none is empty.
        ends: One more than the last character of each.
        start: The first character of the text that the row has.
        end: One more than the last.
        droppable: Categories of characters whose absence is no cut: offsets may leave out accents.
    """

    positions: list[int]
    starts: list[int]
    ends: list[int]
    start: int
    end: int
    droppable: str = "Z"

    @classmethod
    def of(
        cls, kept: Iterable[tuple[int, int, int]], start: int, end: int, droppable: str = "Z"
    ) -> Alignment | None:
        """From the position, the first character and the end of each token; None for no token."""
        tokens = list(kept)
        if not tokens:
            return None
        positions, starts, ends = (list(column) for column in zip(*tokens, strict=True))
        return cls(positions, starts, ends, start, end, droppable)

    def tokens(self, text: str, start: int, end: int) -> Span | None:
        """First position and end of the tokens that stand for some characters of the text.

        None if no token does, or the row was cut inside of them.
        """
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        missing = text[start : min(self.start, end)] + text[max(self.end, start) : end]
        if not all(map(self._may_miss, missing)):
            return None
        first, last = bisect_right(self.ends, start), bisect_left(self.starts, end) - 1
        return (self.positions[first], self.positions[last] + 1) if first <= last else None

    def among(self, text: str, mentions: Sequence[Mention]) -> Sequence[Mention]:
        """Of all the mentions of the text, by start, those that the row may have.

        A window of a long text has few of them.
        """
        start = self.start
        while start > 0 and self._may_miss(text[start - 1]):
            start -= 1
        first = bisect_left(mentions, start, key=_start)
        return mentions[first : bisect_left(mentions, self.end, first, key=_start)]

    def _may_miss(self, character: str) -> bool:
        return unicodedata.category(character)[0] in self.droppable


class TokenAligner:
    """Finds where in a tokenised row the mentions of its text lie.

    In this order, by what the row has: `token_mentions`, taken as they are; its text and
    `offset_mapping`; its text, which is found among the tokens (whole, cut by truncation, a window
    of it, or inside a template, with padding on either side); `input_ids` alone, of which the text
    is put together again, with a warning. `mentions`, as `linker.map` makes them, replace linking
    wherever there is text. A mention that truncation cut is left out.

    Args:
        linker: Finds the mentions in texts.
        tokenizer: The fast tokenizer that made the rows, or a processor that has it.
        text_columns: Columns with the texts of a row, in the order in which they were tokenised. A
            list of words counts as the words with a space between.

    Attributes:
        columns: What it reads of a row beside the model's inputs.

    Example:
        >>> aligner = TokenAligner(linker, tokenizer)  # doctest: +SKIP
        >>> aligner({"input_ids": [101, 3960, 102], "text": "aspirin"})  # doctest: +SKIP
        [TokenMention(start=1, end=2, mention=Mention(start=0, end=7, ...), column=0)]
    """

    def __init__(
        self, linker: FindsMentions, tokenizer: Any, text_columns: Sequence[str] = ("text",)
    ) -> None:
        if isinstance(text_columns, str):
            raise ValueError(f"text_columns must be several names, got the one {text_columns!r}.")
        self.linker = linker
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
        self.text_columns = tuple(text_columns)
        self.columns = (*self.text_columns, MENTIONS, TOKEN_MENTIONS, OFFSETS)
        self._pieces: TokenPieces | None = None
        self._has_warned = False
        self._make_caches()

    def _make_caches(self) -> None:
        """Epochs and windows ask for the same texts again."""
        self._link = functools.lru_cache(CACHED_TEXTS)(self.linker.link)
        self._encode = functools.lru_cache(CACHED_TEXTS)(self._encoded)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_link": None, "_encode": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    @property
    def pieces(self) -> TokenPieces:
        """What the tokenizer's tokens spell.

        Raises:
            ValueError: If it is a slow one.
        """
        if self._pieces is None:
            if not getattr(self.tokenizer, "is_fast", False):
                raise ValueError(
                    "Aligning mentions with tokens needs a fast tokenizer, which keeps the offsets "
                    f"of characters; got {type(self.tokenizer).__name__}. Use AutoTokenizer with "
                    "use_fast=True, or give the dataset a column token_mentions: a list of "
                    '{"start", "end", "entities", "priors"} by position in input_ids.'
                )
            self._pieces = TokenPieces(self.tokenizer)
        return self._pieces

    def __call__(
        self, row: Mapping[str, Any], without_text: tuple[str, str] | None = None
    ) -> list[TokenMention]:
        """The mentions of a row, by position.

        Args:
            row: Has `input_ids` (one sequence) and some of `columns`.
            without_text: Why a row has no text and what to do about it, for the warning; by
                default that the dataset should have it.

        Raises:
            ValueError: If the tokenizer is a slow one, or given mentions do not fit the row.
        """
        tokens = as_list(row["input_ids"])
        if row.get(TOKEN_MENTIONS) is not None:
            return _given_token_mentions(row[TOKEN_MENTIONS], len(tokens))
        mask = as_list(row["attention_mask"]) if row.get("attention_mask") is not None else []
        # A collator's mask may be of another length or shape than the row.
        usable = len(mask) == len(tokens) and not any(isinstance(m, list) for m in mask[:1])
        made = TokenRow(tokens, mask if usable else None, self.pieces)
        texts = [joined_text(row.get(column)) for column in self.text_columns]
        columns = ", ".join(self.text_columns)
        if all(text is None for text in texts):
            why, advice = without_text or (f"rows have no text (columns {columns})", KEEP_TEXT)
            return self._from_decoding(made, why, advice)
        if not any(text and not text.isspace() for text in texts):
            return []
        aligned = None
        # Offsets of a list of words count within each word.
        are_texts = all(isinstance(row.get(c), str | None) for c in self.text_columns)
        if row.get(OFFSETS) is not None and are_texts:
            offsets = [(start, end) for start, end in as_list(row[OFFSETS])]
            aligned = _by_offsets(made, texts, offsets)
        if aligned is None:
            aligned = self._by_tokens(made, texts)
        if not any(aligned):
            why = f"the text of a row is not what its tokens say (columns {columns})"
            return self._from_decoding(made, why, KEEP_TEXT)
        given = None if row.get(MENTIONS) is None else _given_mentions(row[MENTIONS], texts)
        found: list[TokenMention] = []
        for column, (text, alignment) in enumerate(zip(texts, aligned, strict=True)):
            if text is None or alignment is None:
                continue
            mentions = self._link(text) if given is None else given[column]
            for mention in alignment.among(text, mentions):
                span = alignment.tokens(text, mention.start, mention.end)
                if span is not None:
                    found.append(TokenMention(*span, mention, column))
        return sorted(found, key=lambda mention: (mention.start, mention.end))

    # ---- the text among the tokens ----

    def _by_tokens(self, row: TokenRow, texts: Sequence[str | None]) -> list[Alignment | None]:
        """Find each text after the one before it; None for those that are not there."""
        made: list[Alignment | None] = [None] * len(texts)
        real = _not_blank(texts)
        if 1 < len(real) == len(row.runs):
            # A run for each text, as pairs have it: one that was cut is not taken for another.
            for number, (first, end) in zip(real, row.runs, strict=True):
                part = TokenRow(row.tokens[first:end], None, row.pieces)
                found = self._find(part, texts[number] or "", 0)
                if found is not None:
                    made[number] = found._replace(positions=[first + p for p in found.positions])
            if any(made):
                return made
        after = 0
        for number in real:
            made[number] = found = self._find(row, texts[number] or "", after)
            after = after if found is None else found.positions[-1] + 1
        return made

    def _find(self, row: TokenRow, text: str, after: int) -> Alignment | None:
        """The tokens of a text from position `after` on."""
        unsure = None
        if row.pieces.is_exact:
            found, unsure = _by_characters(row, text, after)
            if found is not None:
                return found
        return self._by_ids(row, text, after) or unsure

    def _by_ids(self, row: TokenRow, text: str, after: int) -> Alignment | None:
        """By tokenising the text again: whole, cut, or without its first and last word.

        A template may have the outer words tokenised with what is around them.
        """
        ids, spans = self._encode(text)
        if not ids:
            return None
        for given, shift in ((text, 0), (" " + text, 1)):  # a space, as in the middle of a template
            whole, own = self._encode(given)
            if (position := row.ids.find(whole, after)) >= 0:
                moved = [(max(0, start - shift), max(0, end - shift)) for start, end in own]
                return _from_ids(Overlap(position, 0, len(whole)), moved, len(text))
        found = []
        for first, end in row.runs:
            first = max(first, after)
            part = find_part(row.ids[first:end], ids)
            if part is not None and part.length >= min(FEW_TOKENS, end - first):
                found.append(part._replace(at=first + part.at))
        second, last = _inner_tokens(text, spans)
        for begin, stop in ((second, len(ids)), (0, last), (second, last)):
            position = row.ids.find(ids[begin:stop], after) if stop - begin >= FEW_TOKENS else -1
            if position >= 0:
                found.append(Overlap(position, begin, stop - begin))
        longest = max(found, key=lambda overlap: overlap.length, default=None)
        return None if longest is None else _from_ids(longest, spans, len(text))

    def _encoded(self, text: str) -> tuple[str, list[Span]]:
        made = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,  # a text longer than the model takes is no news here
        )
        # A token of whitespace alone has the offsets of the word that follows.
        spans = [
            (0, 0) if self.pieces[token].isspace() else span
            for token, span in zip(made["input_ids"], made["offset_mapping"], strict=True)
        ]
        return as_characters(made["input_ids"]), spans

    # ---- the decoding ----

    def _from_decoding(self, row: TokenRow, why: str, advice: str) -> list[TokenMention]:
        """Link what the tokens spell."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Entities are linked in the tokenizer's own decoding, because {why}. Names that "
                "the tokenizer changes are missed: case and accents under an uncased vocabulary, "
                f"unknown tokens, spaces around punctuation. {advice}",
                stacklevel=3,
            )
        made: list[TokenMention] = []
        moved = 0
        for (first, _), (text, spans) in zip(row.runs, row.spelled_runs, strict=True):
            kept = ((first + i, *span) for i, span in enumerate(spans) if span[1] > span[0])
            alignment = Alignment.of(kept, 0, len(text))
            for mention in self._link(text):
                span = alignment and alignment.tokens(text, mention.start, mention.end)
                if span is not None:
                    at = replace(mention, start=mention.start + moved, end=mention.end + moved)
                    made.append(TokenMention(*span, at))
            moved += len(text) + 1
        return made


# ---- by the tokenizer's offsets ----


def _by_offsets(
    row: TokenRow, texts: Sequence[str | None], offsets: Sequence[Span]
) -> list[Alignment | None] | None:
    """The tokens of each text; None if the offsets cannot be those of one text for each run."""
    real = _not_blank(texts)
    if len(offsets) != len(row.tokens) or len(row.runs) != len(real):
        return None
    made: list[Alignment | None] = [None] * len(texts)
    for number, (first, end) in zip(real, row.runs, strict=True):
        kept = [
            (i, *offsets[i])
            for i in range(first, end)
            # A token of whitespace alone has the offsets of the word that follows.
            if offsets[i][1] > offsets[i][0] and not row.pieces[row.tokens[i]].isspace()
        ]
        if not kept or not _fits(row, texts[number] or "", kept):
            return None
        cut_before, cut_after = row.cuts(first, end)
        start, stop = kept[0][1] + cut_before, kept[-1][2] - cut_after
        made[number] = Alignment.of(kept, start, stop, "CMZ" if row.pieces.loses_marks else "Z")
    return made


def _fits(row: TokenRow, text: str, kept: list[tuple[int, int, int]]) -> bool:
    """Whether offsets are of this text, and not of a prompt that it is part of."""
    if max(end for _, _, end in kept) > len(text):
        return False
    for token, start, end in kept[:: max(1, len(kept) // 8)]:
        spelt = row.pieces[row.tokens[token]].decode("utf-8", "replace")
        spelt, part = spelt.removeprefix("##").strip(), text[start:end].strip()
        if spelt.isascii() and spelt.isalnum() and part.isascii():
            if part.casefold() != spelt.casefold():
                return False
    return True


# ---- by the characters that tokens spell ----


def _by_characters(
    row: TokenRow, text: str, after: int
) -> tuple[Alignment | None, Alignment | None]:
    """Where a text's characters are, and else where they may be."""
    unsure = None
    for is_folded in (False, True):
        # Many tokenizers compose characters, and sentencepiece makes whitespace one space.
        spelling = _composed(text) if is_folded else Folded(text)
        if is_folded and spelling.text == text:
            break
        content = spelling.text.strip()
        inside, part = None, None
        for (first, end), (run, spans) in zip(row.runs, row.spelled_runs, strict=True):
            if end <= after:
                continue
            start = spans[after - first][0] if after > first else 0
            position, is_between_words = find_whole(run, content, start)
            if position >= 0:
                found = (first, spans, Overlap(position, 0, len(content)))
                if is_between_words:
                    return _from_characters(found, spelling, content), None
                inside = inside or found
                continue
            start, stop = _edges(run, start)
            overlap = find_part(run[start:stop], content)
            if overlap is not None and (part is None or overlap.length > part[0][2].length):
                found = (first, spans, overlap._replace(at=start + overlap.at))
                part = found, overlap.length == stop - start
        if inside is not None:
            return _from_characters(inside, spelling, content), None
        if part is not None:
            found, is_all_of_run = part
            _, of, length = found[2]
            if len(content[of : of + length].encode("utf-8", "replace")) >= FEW_BYTES:
                return _from_characters(found, spelling, content), None
            if is_all_of_run and unsure is None:
                unsure = _from_characters(found, spelling, content)
    return None, unsure


def _edges(run: str, start: int) -> Span:
    """A run from `start` on without the bytes of a cut character, or the whitespace, around it."""
    rest = run[start:]
    left, right = (_is_outside(character) for character in (rest[:1], rest[-1:]))
    while start < len(run) and left(run[start]):
        start += 1
    stop = len(run)
    while stop > start and right(run[stop - 1]):
        stop -= 1
    return start, stop


def _is_outside(outermost: str) -> Callable[[str], bool]:
    """Whitespace beside a character that was cut belongs to the text."""
    return is_cut if is_cut(outermost) else str.isspace


def _from_characters(
    found: tuple[int, list[Span], Overlap], spelling: Folded, content: str
) -> Alignment | None:
    """From equal characters to those of each token."""
    first, spans, (at, of, length) = found
    lead = spelling.text.index(content)
    move, origin = of - at + lead, spelling.origin
    kept = []
    for position, (start, end) in enumerate(spans, first):
        start, end = max(start, at), min(end, at + length)
        if end > start:
            kept.append((position, origin(start + move), origin(end + move)))
    return Alignment.of(kept, origin(of + lead), origin(of + length + lead))


@functools.lru_cache(maxsize=16)
def _composed(text: str) -> Folded:
    """The text as tokenizers that compose characters see it; windows of one ask again."""
    return fold(text, ignore_case=False)


# ---- by ids ----


def _from_ids(part: Overlap, spans: list[Span], length: int) -> Alignment | None:
    """From equal tokens to the characters of each."""
    end = part.of + part.length
    kept = (
        (part.at + position, start, stop)
        for position, (start, stop) in enumerate(spans[part.of : end])
        if stop > start
    )
    # What no token stands for is not cut off; a character some of whose tokens are missing is.
    before = next((stop for start, stop in reversed(spans[: part.of]) if stop > start), 0)
    after = next((start for start, stop in spans[end:] if stop > start), length)
    return Alignment.of(kept, before, after)


def _inner_tokens(text: str, spans: list[Span]) -> Span:
    """The first token of the second word, and the first of the last word."""
    words = text.split(maxsplit=1)
    second = text.index(words[0]) + len(words[0])
    last = max(1, len(text.rstrip()) - len(text.split()[-1]) - 1)
    starts = [start for start, _ in spans]
    inner = [
        next((i for i, s in enumerate(starts) if s >= at), len(starts)) for at in (second, last)
    ]
    return inner[0], inner[1]


def _not_blank(texts: Sequence[str | None]) -> list[int]:
    return [number for number, text in enumerate(texts) if text and not text.isspace()]


def _start(mention: Mention) -> int:
    return mention.start


# ---- mentions that were found beforehand ----


def _given_mentions(cell: Any, texts: Sequence[str | None]) -> list[list[Mention]]:
    """The mentions of each text."""
    made: list[list[Mention]] = [[] for _ in texts]
    for start, end, column, candidates in from_cell(cell):
        text = texts[column] if column < len(texts) else None
        if text is None or not 0 <= start < end <= len(text):
            length = "no text" if text is None else f"a text of {len(text)} characters"
            raise ValueError(
                f"The column {MENTIONS!r} has the span ({start}, {end}) in text column {column}, "
                f"which has {length}. Was the text changed after linker.map? Map again, or remove "
                "the column."
            )
        made[column].append(Mention(start, end, text[start:end], candidates))
    for mentions in made:
        mentions.sort(key=_start)
    return made


def _given_token_mentions(cell: Any, length: int) -> list[TokenMention]:
    made = []
    for start, end, _, candidates in from_cell(cell):
        if not 0 <= start < end <= length:
            raise ValueError(
                f"The column {TOKEN_MENTIONS!r} has the span ({start}, {end}) in a row of {length} "
                f"tokens; expected 0 <= start < end <= {length}. Was the row truncated or padded "
                "after they were found?"
            )
        made.append(TokenMention(start, end, Mention(start, end, "", candidates)))
    return made
