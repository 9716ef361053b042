"""From mentions by character to mentions by token, in three steps.

The text is tokenised again and its tokens are found in the row; where the row has the offsets that
the tokenizer kept, they tell which of several windows of a text it is. Where the row has no text,
or none that fits, what its tokens decode to is linked, with a warning.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
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
from hf_adapt.knowledge.linking.token_pieces import Span, TokenPieces

OFFSETS = "offset_mapping"
KEEP_TEXT = "Keep the text as a column of the dataset, or run linker.map first."
CACHED_TEXTS = 4096
FEW_TOKENS = 8
"""A shorter part of a text than this may be there by chance, unless it is all that a run has."""


class Tokens(NamedTuple):
    """The tokens of a text: their ids, a character each, and those that stand for characters."""

    ids: str
    numbers: list[int]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, ids: Sequence[int], spans: Sequence[Span]) -> Tokens:
        """From all tokens and the characters of each; empty spans stand for none."""
        kept = [(i, start, end) for i, (start, end) in enumerate(spans) if end > start]
        columns = zip(*kept, strict=True) if kept else ([], [], [])
        return cls("".join(map(chr, ids)), *(list(column) for column in columns))


class Block(NamedTuple):
    """Equal tokens of a row and a text: where they begin in each, and how many they are."""

    at: int
    of: int
    length: int


class Alignment(NamedTuple):
    """The tokens of a text, and which of them the row has."""

    text: Tokens
    block: Block

    @property
    def kept(self) -> range:
        """Which of the tokens that stand for characters the row has."""
        ends = (self.block.of, self.block.of + self.block.length)
        return range(*(bisect_left(self.text.numbers, end) for end in ends))

    def tokens(self, start: int, end: int) -> Span | None:
        """First position and end of the tokens for some characters; None if the row lacks one."""
        first = bisect_right(self.text.ends, start)
        last = bisect_left(self.text.starts, end) - 1
        if first > last:
            return None
        at, of, length = self.block
        first, last = self.text.numbers[first] - of, self.text.numbers[last] - of
        return (at + first, at + last + 1) if first >= 0 and last < length else None

    def among(self, mentions: Sequence[Mention]) -> Sequence[Mention]:
        """Of all the mentions of the text, by start, those that a window of it may have."""
        before, after = (
            self.text.ends[kept - 1] if kept else 0 for kept in (self.kept.start, self.kept.stop)
        )
        found = bisect_left(mentions, before, key=_start)
        return mentions[found : bisect_left(mentions, after, found, key=_start)]


class TokenAligner:
    """Finds where in a tokenised row the mentions of its text lie.

    In this order, by what the row has: `token_mentions`, taken as they are; its text, whose tokens
    are found in the row (whole, cut by truncation, a window of it, which `offset_mapping` tells
    from others, or inside a template, with padding on either side); `input_ids` alone, which are
    decoded, with a warning. `mentions`, as `linker.map` makes them, replace linking wherever there
    is text. Left out is a mention that truncation cut, or one at the edge of a text whose tokens
    are others inside of its template.

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
        # Epochs and windows ask for the same texts again.
        self._link = functools.lru_cache(CACHED_TEXTS)(linker.link)
        self._encode = functools.lru_cache(CACHED_TEXTS)(self._encoded)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.linker, self.tokenizer, self.text_columns)  # without the caches

    @property
    def pieces(self) -> TokenPieces:
        """What the tokenizer's tokens spell; a slow one is refused."""
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

        It has `input_ids` (one sequence) and some of `columns`; `without_text` is why it has no
        text, and what to do about it, for the warning.
        """
        tokens = as_list(row["input_ids"])
        if row.get(TOKEN_MENTIONS) is not None:
            return _given_token_mentions(row[TOKEN_MENTIONS], len(tokens))
        runs = self._runs(tokens, row.get("attention_mask"))
        texts = [joined_text(row.get(column)) for column in self.text_columns]
        columns = ", ".join(self.text_columns)
        if all(text is None for text in texts):
            why, advice = without_text or (f"rows have no text (columns {columns})", KEEP_TEXT)
            return self._from_decoding(tokens, runs, why, advice)
        if not any(text and not text.isspace() for text in texts):
            return []
        offsets = None
        are_texts = all(isinstance(row.get(column), str | None) for column in self.text_columns)
        if row.get(OFFSETS) is not None and are_texts:  # those of words count within each word
            offsets = [(start, end) for start, end in as_list(row[OFFSETS])]
            offsets = offsets if len(offsets) == len(tokens) else None
        aligned = self._aligned("".join(map(chr, tokens)), runs, texts, offsets)
        if not any(aligned):
            why = f"the text of a row is not what its tokens say (columns {columns})"
            return self._from_decoding(tokens, runs, why, KEEP_TEXT)
        given = None if row.get(MENTIONS) is None else _given_mentions(row[MENTIONS], texts)
        found: list[TokenMention] = []
        for column, (text, alignment) in enumerate(zip(texts, aligned, strict=True)):
            if text is None or alignment is None:
                continue
            mentions = self._link(text) if given is None else given[column]
            for mention in alignment.among(mentions):
                span = alignment.tokens(*_without_spaces(text, mention.start, mention.end))
                if span is not None:
                    found.append(TokenMention(*span, mention, column))
        return sorted(found, key=lambda mention: (mention.start, mention.end))

    def _runs(self, tokens: list[int], mask: Any) -> list[Span]:
        """First position and end of each run of tokens that are neither special nor padding."""
        mask = as_list(mask) if mask is not None else []
        # A collator's mask may be of another length or shape than the row.
        if len(mask) != len(tokens) or any(isinstance(m, list) for m in mask[:1]):
            mask = [1] * len(tokens)
        special, runs, end = self.pieces.special, list[Span](), 0
        is_text = (t not in special and m != 0 for t, m in zip(tokens, mask, strict=True))
        for in_run, group in itertools.groupby(is_text):
            start, end = end, end + sum(1 for _ in group)
            if in_run:
                runs.append((start, end))
        return runs

    # ---- the text among the tokens ----

    def _aligned(
        self,
        ids: str,
        runs: list[Span],
        texts: Sequence[str | None],
        offsets: Sequence[Span] | None,
    ) -> list[Alignment | None]:
        """Find each text after the one before it; None for those that are not there."""
        made: list[Alignment | None] = [None] * len(texts)
        real = [number for number, text in enumerate(texts) if text and not text.isspace()]
        if len(real) == len(runs):
            # A run for each text, as pairs have it: one that was cut is not taken for another.
            for number, run in zip(real, runs, strict=True):
                made[number] = self._find(ids, [run], texts[number] or "", offsets)
            if any(made):
                return made
        after = 0
        for number in real:
            rest = [(max(first, after), end) for first, end in runs if end > after]
            made[number] = found = self._find(ids, rest, texts[number] or "", None)
            after = after if found is None else found.block.at + found.block.length
        return made

    def _find(
        self, ids: str, runs: list[Span], text: str, offsets: Sequence[Span] | None
    ) -> Alignment | None:
        """The first of the candidates that has a character of the text."""
        found = self._candidates(ids, runs, text, offsets) if runs else ()
        return next((alignment for alignment in found if alignment.kept), None)

    def _candidates(
        self, ids: str, runs: list[Span], text: str, offsets: Sequence[Span] | None
    ) -> Iterator[Alignment]:
        """The tokens of a text in some runs: all of them, those of a window, or most of them."""
        start, stop = runs[0][0], runs[-1][1]  # a text may hold what separates the runs
        own = self._encode(text, "")
        if (at := ids.find(own.ids, start, stop)) >= 0:
            yield Alignment(own, Block(at, 0, len(own.ids)))
        first, end = max(runs, key=lambda run: run[1] - run[0])
        if (of := _window(own, ids[first:end], offsets and offsets[first:end])) >= 0:
            yield Alignment(own, Block(first, of, end - first))
        parts = []
        for before in ("", " ", "\n"):  # as in the middle of a template
            own = self._encode(text, before)
            if (at := ids.find(own.ids, start, stop)) >= 0:
                yield Alignment(own, Block(at, 0, len(own.ids)))
            for first, end in runs:
                if (block := longest_block(ids[first:end], own.ids)) is not None:
                    parts.append(Alignment(own, block._replace(at=first + block.at)))
        yield from sorted(parts, key=lambda part: -len(part.kept))

    def _encoded(self, text: str, before: str) -> Tokens:
        """The tokens of a text with a character before it, by the text's own characters."""
        made = self.tokenizer(
            before + text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,  # a text longer than the model takes is no news here
        )
        # A token of whitespace alone has the offsets of the word that follows.
        moved = len(before)
        spans = [
            (0, 0) if self.pieces[token].isspace() else (max(0, start - moved), end - moved)
            for token, (start, end) in zip(made["input_ids"], made["offset_mapping"], strict=True)
        ]
        return Tokens.of(made["input_ids"], spans)

    # ---- the decoding ----

    def _from_decoding(
        self, tokens: list[int], runs: list[Span], why: str, advice: str
    ) -> list[TokenMention]:
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
        for first, end in runs:
            text, spans = self.pieces.text(tokens[first:end])
            own = Tokens.of(tokens[first:end], spans)
            alignment = Alignment(own, Block(first, 0, end - first))
            for mention in self._link(text):
                span = alignment.tokens(mention.start, mention.end)
                if span is not None:
                    at = replace(mention, start=mention.start + moved, end=mention.end + moved)
                    made.append(TokenMention(*span, at))
            moved += len(text) + 1
        return made


def _window(text: Tokens, run: str, offsets: Sequence[Span] | None) -> int:
    """Where in a text its window begins: of several equal ones, rather that with these offsets."""
    first = of = text.ids.find(run)
    while of >= 0 and offsets:
        kept = bisect_left(text.numbers, of)
        if kept == len(text.numbers) or not 0 <= text.numbers[kept] - of < len(run):
            break
        if offsets[text.numbers[kept] - of] == (text.starts[kept], text.ends[kept]):
            return of
        of = text.ids.find(run, of + 1)
    return first


def longest_block(run: str, text: str) -> Block | None:
    """The longest part of a text that a run has, unless it may be there by chance.

    Example:
        >>> longest_block("<user>: a drug against pain", "a drug against pain and fever")
        Block(at=8, of=0, length=19)
    """
    found, at, length = None, 0, min(FEW_TOKENS, len(run)) - 1
    while at + length < len(run):
        of = text.find(run[at : at + length + 1])
        if of < 0:
            at += 1
            continue
        length += 1
        while run[at + length : at + length + 1] == text[of + length : of + length + 1] != "":
            length += 1
        found = Block(at, of, length)
    return found


def _without_spaces(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


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
    return [sorted(mentions, key=_start) for mentions in made]


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
