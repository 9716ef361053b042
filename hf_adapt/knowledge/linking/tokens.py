"""From mentions by character to mentions by token."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_adapt.knowledge.linking.linker import Candidate, Linker, Mention
from hf_adapt.knowledge.linking.mapping import MENTIONS, TOKEN_MENTIONS, text_of
from hf_adapt.knowledge.linking.pieces import Row
from hf_adapt.knowledge.linking.placing import Placed, Placer, Recent, place_by_offsets

OFFSETS = "offset_mapping"
KEEP_TEXT = "Keep the text as a column of the dataset, or run linker.map first."


@dataclass(frozen=True, slots=True)
class TokenMention:
    """The tokens of a row that name an entity.

    Args:
        start: Position of the first in the row's `input_ids`.
        end: One more than the position of the last.
        mention: What they name.
        column: Which of the text columns the mention is in.
    """

    start: int
    end: int
    mention: Mention
    column: int = 0


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
        self, linker: Linker, tokenizer: Any, text_columns: Sequence[str] = ("text",)
    ) -> None:
        if isinstance(text_columns, str):
            raise ValueError(f"text_columns must be several names, got the one {text_columns!r}.")
        self.linker = linker
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
        self.text_columns = tuple(text_columns)
        self.columns = (*self.text_columns, MENTIONS, TOKEN_MENTIONS, OFFSETS)
        self._placer: Placer | None = None
        self._link = Recent(linker.link)
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_link": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._link = Recent(self.linker.link)

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
        tokens = _listed(row["input_ids"])
        if row.get(TOKEN_MENTIONS) is not None:
            return _given_tokens(row[TOKEN_MENTIONS], len(tokens))
        placer = self._checked_placer()
        mask = _listed(row["attention_mask"]) if row.get("attention_mask") is not None else []
        # A collator's mask may be of another length or shape than the row.
        usable = len(mask) == len(tokens) and not any(isinstance(m, list) for m in mask[:1])
        found = Row(tokens, mask if usable else None, placer.pieces)
        texts = [text_of(row.get(column)) for column in self.text_columns]
        columns = ", ".join(self.text_columns)
        if not any(text is not None for text in texts):
            why, advice = without_text or (f"rows have no text (columns {columns})", KEEP_TEXT)
            return self._from_decoding(found, why, advice)
        if not any(text and not text.isspace() for text in texts):
            return []
        placed = None
        if row.get(OFFSETS) is not None and not _has_words(row, self.text_columns):
            offsets = [(start, end) for start, end in _listed(row[OFFSETS])]
            placed = place_by_offsets(found, texts, offsets, placer.pieces)
        if placed is None:
            placed = placer.place(found, texts)
        if not any(placed):
            why = f"the text of a row is not what its tokens say (columns {columns})"
            return self._from_decoding(found, why, KEEP_TEXT)
        made: list[TokenMention] = []
        given = _given(row.get(MENTIONS), texts)
        for column, (text, place) in enumerate(zip(texts, placed, strict=True)):
            if text is None or place is None:
                continue
            mentions = self._link(text) if given is None else given[column]
            for mention in place.among(text, mentions):
                span = place.tokens(text, mention.start, mention.end)
                if span is not None:
                    made.append(TokenMention(*span, mention, column))
        return sorted(made, key=lambda mention: (mention.start, mention.end))

    def _checked_placer(self) -> Placer:
        if self._placer is None:
            if not getattr(self.tokenizer, "is_fast", False):
                raise ValueError(
                    "Placing mentions in tokens needs a fast tokenizer, which keeps the offsets of "
                    f"characters; got {type(self.tokenizer).__name__}. Use AutoTokenizer with "
                    "use_fast=True, or give the dataset a column token_mentions: a list of "
                    '{"start", "end", "entities", "priors"} by position in input_ids.'
                )
            self._placer = Placer(self.tokenizer)
        return self._placer

    def _from_decoding(self, row: Row, why: str, advice: str) -> list[TokenMention]:
        """Link what the tokens spell."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Entities are linked in the tokenizer's own decoding, because {why}. Names that "
                "the tokenizer changes are missed: case and accents under an uncased vocabulary, "
                f"unknown tokens, spaces around punctuation. {advice}",
                stacklevel=3,
            )
        assert self._placer is not None
        made: list[TokenMention] = []
        moved = 0
        for first, end in row.runs:
            text, spans = self._placer.pieces.text(row.tokens[first:end])
            kept = [(first + i, *span) for i, span in enumerate(spans) if span[1] > span[0]]
            placed = Placed.of(kept, 0, len(text))
            for mention in self._link(text):
                span = placed.tokens(text, mention.start, mention.end)
                if span is not None:
                    at = replace(mention, start=mention.start + moved, end=mention.end + moved)
                    made.append(TokenMention(*span, at))
            moved += len(text) + 1
        return made


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _has_words(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """Whether offsets are within words, of a tokenizer that was given words."""
    return any(
        row.get(column) is not None and not isinstance(row[column], str) for column in columns
    )


def _records(value: Any) -> list[Mapping[str, Any]]:
    """A list of records, also where a dataset gives a record of lists."""
    if isinstance(value, Mapping):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return list(value)


def _candidates(record: Mapping[str, Any]) -> tuple[Candidate, ...]:
    entities = _listed(record["entities"])
    priors = record.get("priors")
    priors = [1 / len(entities)] * len(entities) if priors is None else _listed(priors)
    return tuple(Candidate(e, p) for e, p in zip(entities, priors, strict=True))


def _given(value: Any, texts: Sequence[str | None]) -> list[list[Mention]] | None:
    """The mentions of each text that were found beforehand."""
    if value is None:
        return None
    made: list[list[Mention]] = [[] for _ in texts]
    for record in _records(value):
        start, end, column = record["start"], record["end"], record.get("column") or 0
        text = texts[column] if column < len(texts) else None
        if text is None or not 0 <= start < end <= len(text):
            length = "no text" if text is None else f"a text of {len(text)} characters"
            raise ValueError(
                f"The column {MENTIONS!r} has the span ({start}, {end}) in text column {column}, "
                f"which has {length}. Was the text changed after linker.map? Map again, or remove "
                "the column."
            )
        made[column].append(Mention(start, end, text[start:end], _candidates(record)))
    for mentions in made:
        mentions.sort(key=lambda mention: mention.start)
    return made


def _given_tokens(value: Any, length: int) -> list[TokenMention]:
    made = []
    for record in _records(value):
        start, end = record["start"], record["end"]
        if not 0 <= start < end <= length:
            raise ValueError(
                f"The column {TOKEN_MENTIONS!r} has the span ({start}, {end}) in a row of {length} "
                f"tokens; expected 0 <= start < end <= {length}. Was the row truncated or padded "
                "after they were found?"
            )
        made.append(TokenMention(start, end, Mention(start, end, "", _candidates(record))))
    return made
