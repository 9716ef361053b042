"""Mentions: where a text, or a row of tokens, names entities of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MENTIONS, TOKEN_MENTIONS = "mentions", "token_mentions"
"""The columns of a dataset with mentions by character and by token."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An entity that a mention may mean."""

    entity: int
    """Its number in the graph."""
    prior: float
    """How likely it is before the context is read; those of a mention sum to 1."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A span of a text that names an entity: `text[start:end] == surface`, always.

    The candidates are the entities that it may mean, the likeliest first.
    """

    start: int
    end: int
    surface: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class TokenMention:
    """The tokens of a row that name an entity: `input_ids[start:end]`.

    The column is the number of the text column that the mention is in.
    """

    start: int
    end: int
    mention: Mention
    column: int = 0


class FindsMentions(Protocol):
    """Anything that finds the mentions of a text, as a [`Linker`] does."""

    def link(self, text: str) -> list[Mention]:
        """Find the mentions of a text, by start."""


def to_record(mention: Mention, start: int, end: int, column: int | None = None) -> dict[str, Any]:
    """A mention as a cell of a dataset."""
    record: dict[str, Any] = {
        "start": start,
        "end": end,
        "entities": [candidate.entity for candidate in mention.candidates],
        "priors": [candidate.prior for candidate in mention.candidates],
    }
    return record if column is None else {**record, "column": column}


def from_cell(cell: Any) -> list[tuple[int, int, int, tuple[Candidate, ...]]]:
    """Start, end, text column and candidates of each mention in a cell of a dataset."""
    if isinstance(cell, Mapping):
        cell = [dict(zip(cell, row, strict=True)) for row in zip(*cell.values(), strict=True)]
    return [(r["start"], r["end"], r.get("column") or 0, _candidates(r)) for r in cell]


def _candidates(record: Mapping[str, Any]) -> tuple[Candidate, ...]:
    entities = as_list(record["entities"])
    priors = record.get("priors")
    priors = [1 / len(entities)] * len(entities) if priors is None else as_list(priors)
    return tuple(Candidate(e, p) for e, p in zip(entities, priors, strict=True))


def as_list(values: Sequence[Any]) -> list[Any]:
    """The values of a list, an array or a tensor."""
    return list(values.tolist() if hasattr(values, "tolist") else values)
