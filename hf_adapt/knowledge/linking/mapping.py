"""Mentions as a column of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hf_adapt.knowledge.linking.linker import Linker, Mention
    from hf_adapt.knowledge.linking.tokens import TokenAligner

MENTIONS, TOKEN_MENTIONS = "mentions", "token_mentions"


@dataclass(frozen=True)
class Coverage:
    """How much of a dataset the mentions cover.

    Args:
        rows: Rows.
        linked_rows: Rows with a mention.
        mentions: Mentions.
        entities: Entities that a mention may mean, each counted once.
        num_entities: Entities of the graph.
    """

    rows: int
    linked_rows: int
    mentions: int
    entities: int
    num_entities: int

    def __str__(self) -> str:
        rows, of = max(self.rows, 1), max(self.num_entities, 1)
        return (
            f"{self.linked_rows:,} of {self.rows:,} rows ({self.linked_rows / rows:.1%}) have a "
            f"mention; {self.mentions / rows:.2f} mentions a row; {self.entities:,} of "
            f"{self.num_entities:,} entities ({self.entities / of:.1%}) are mentioned"
        )


def text_of(value: Any) -> str | None:
    """The text of a cell: as it is, or words with a space between; None for anything else."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(word, str) for word in value):
        return " ".join(value)
    return None


def coverage(dataset: Any, num_entities: int) -> Coverage:
    """Count the mentions of a dataset that `linker.map` made.

    Args:
        dataset: A `datasets.Dataset` with the column `mentions`.
        num_entities: Entities of the graph.
    """
    linked = mentions = 0
    entities = np.zeros(num_entities, dtype=bool)
    view = dataset.select_columns([MENTIONS]).with_format("arrow")
    for table in view.iter(batch_size=10_000):
        column = table[MENTIONS].combine_chunks()
        counts = np.diff(np.asarray(column.offsets))
        linked += int((counts > 0).sum())
        mentions += int(counts.sum())
        found = np.asarray(column.flatten().field("entities").flatten())
        entities[found] = True
    return Coverage(len(dataset), linked, mentions, int(entities.sum()), num_entities)


class AddMentions:
    """Makes the columns for a batch of rows: what `map` calls, in each process.

    Args:
        linker: Finds the mentions.
        columns: Text columns.
        aligner: Also places them in the row's tokens.
    """

    def __init__(
        self, linker: Linker, columns: Sequence[str], aligner: TokenAligner | None
    ) -> None:
        self.linker, self.columns, self.aligner = linker, tuple(columns), aligner

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Link a batch of rows."""
        made: dict[str, list[Any]] = {MENTIONS: []}
        several = len(self.columns) > 1
        for cells in zip(*(batch[column] for column in self.columns), strict=True):
            row: list[dict[str, Any]] = []
            for index, cell in enumerate(cells):
                for mention in self.linker.link(_checked_text(cell, self.columns[index])):
                    place = (mention.start, mention.end)
                    row.append(_record(mention, place, index if several else None))
            made[MENTIONS].append(row)
        if self.aligner is not None:
            wanted = [c for c in ("input_ids", *self.aligner.columns) if c in batch]
            made[TOKEN_MENTIONS] = []
            for number, mentions in enumerate(made[MENTIONS]):
                tokenised = {column: batch[column][number] for column in wanted}
                tokenised = {**tokenised, MENTIONS: mentions, TOKEN_MENTIONS: None}
                made[TOKEN_MENTIONS].append(
                    [
                        _record(found.mention, (found.start, found.end))
                        for found in self.aligner(tokenised)
                    ]
                )
        return made


def _checked_text(cell: Any, column: str) -> str:
    text = "" if cell is None else text_of(cell)
    if text is None:
        raise ValueError(
            f"The column {column!r} must have texts or lists of words, got "
            f"{type(cell).__name__}: {cell!r:.80}."
        )
    return text


def _record(mention: Mention, place: tuple[int, int], column: int | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "start": place[0],
        "end": place[1],
        "entities": [candidate.entity for candidate in mention.candidates],
        "priors": [candidate.prior for candidate in mention.candidates],
    }
    return made if column is None else {**made, "column": column}


def _type(several: bool) -> list[dict[str, Any]]:
    """The type of a column of mentions; without it, a first batch without any has none."""
    from datasets import Value

    number = Value("int64")
    made: dict[str, Any] = {
        "start": number,
        "end": number,
        "entities": [number],
        "priors": [Value("float64")],
    }
    return [{**made, "column": number} if several else made]


def map_dataset(
    linker: Linker,
    dataset: Any,
    columns: tuple[str, ...],
    tokenizer: Any,
    num_proc: int | None,
    map_kwargs: dict[str, Any],
) -> Any:
    """Add the mentions to a dataset or to each of several; see [`Linker.map`]."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        for name, part in dataset.items():
            _check_columns(part, columns, tokenizer, f" ({name})")
        done = {
            name: _map_one(linker, part, columns, tokenizer, num_proc, map_kwargs, f"{name}: ")
            for name, part in dataset.items()
        }
        return type(dataset)(done)
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise TypeError(
            "linker.map expects a datasets.Dataset, DatasetDict, IterableDataset or "
            f"IterableDatasetDict, got {type(dataset).__name__}. For a list of texts use "
            "linker.link_batch."
        )
    _check_columns(dataset, columns, tokenizer, "")
    return _map_one(linker, dataset, columns, tokenizer, num_proc, map_kwargs, "")


def _check_columns(dataset: Any, columns: tuple[str, ...], tokenizer: Any, where: str) -> None:
    if dataset.column_names is None:  # a stream that has not been looked into
        return
    for column in (*columns, *(["input_ids"] if tokenizer is not None else [])):
        if column not in dataset.column_names:
            fix = "Tokenise it first." if column == "input_ids" else "Set text_column=…."
            raise ValueError(
                f"The dataset{where} has no column {column!r}; it has "
                f"{', '.join(dataset.column_names)}. {fix}"
            )


def _map_one(
    linker: Linker,
    dataset: Any,
    columns: tuple[str, ...],
    tokenizer: Any,
    num_proc: int | None,
    map_kwargs: dict[str, Any],
    name: str,
) -> Any:
    import datasets

    worker = linker._without_graph()
    aligner = None
    if tokenizer is not None:
        from hf_adapt.knowledge.linking.tokens import TokenAligner

        aligner = TokenAligner(worker, tokenizer, columns)
    features = None
    if dataset.features is not None:
        features = dataset.features.copy()
        features[MENTIONS] = _type(len(columns) > 1)
        if tokenizer is not None:
            features[TOKEN_MENTIONS] = _type(False)
    settings: dict[str, Any] = {"batched": True, "features": features, **map_kwargs}
    add = AddMentions(worker, columns, aligner)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(add, **settings)
    # The linker says itself what it would find: hashing a dictionary of a million names takes
    # seconds, and its bytes differ between runs that find the same.
    told = [dataset._fingerprint, linker.fingerprint, columns]
    if tokenizer is not None:
        told.append(_hash_of(tokenizer))
    settings.setdefault(
        "new_fingerprint", hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    )
    settings.setdefault("desc", "Linking")
    linked = dataset.map(add, num_proc=num_proc, **settings)
    print(f"{name}{coverage(linked, linker.graph.num_entities)}")
    return linked


def _hash_of(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from datasets.fingerprint import Hasher

        return str(Hasher.hash(tokenizer))
    return hashlib.sha256(backend.to_str().encode()).hexdigest()
