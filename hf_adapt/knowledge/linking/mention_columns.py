"""The mentions of a dataset as columns of it, and how much of it they cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Value

from hf_adapt.engine.texts import joined_text
from hf_adapt.knowledge.linking.mentions import MENTIONS, TOKEN_MENTIONS, FindsMentions, to_record
from hf_adapt.knowledge.linking.token_alignment import TokenAligner


def coverage(dataset: Any, num_entities: int) -> str:
    """Tell how much of a dataset and of a graph the mentions that `linker.map` made cover."""
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
    rows, mentioned = len(dataset), int(entities.sum())
    return (
        f"{linked:,} of {rows:,} rows ({linked / max(rows, 1):.1%}) have a mention; "
        f"{mentions / max(rows, 1):.2f} mentions a row; {mentioned:,} of {num_entities:,} entities "
        f"({mentioned / max(num_entities, 1):.1%}) are mentioned"
    )


class AddMentions:
    """Makes the columns for a batch of rows: what `map` calls, in each process."""

    def __init__(self, linker: FindsMentions, columns: Sequence[str], tokenizer: Any) -> None:
        self.linker, self.columns = linker, tuple(columns)
        self.aligner = None if tokenizer is None else TokenAligner(linker, tokenizer, columns)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Link a batch of rows."""
        cells = zip(*(batch[column] for column in self.columns), strict=True)
        made: dict[str, list[Any]] = {MENTIONS: [self._linked(row) for row in cells]}
        if self.aligner is not None:
            wanted = [c for c in ("input_ids", *self.aligner.columns) if c in batch]
            made[TOKEN_MENTIONS] = []
            for number, mentions in enumerate(made[MENTIONS]):
                row = {column: batch[column][number] for column in wanted}
                found = self.aligner({**row, MENTIONS: mentions, TOKEN_MENTIONS: None})
                made[TOKEN_MENTIONS].append([to_record(m.mention, m.start, m.end) for m in found])
        return made

    def _linked(self, cells: Sequence[Any]) -> list[dict[str, Any]]:
        """The mentions of the texts of one row."""
        several = len(self.columns) > 1
        return [
            to_record(mention, mention.start, mention.end, number if several else None)
            for number, cell in enumerate(cells)
            for mention in self.linker.link(self._text(cell, self.columns[number]))
        ]

    @staticmethod
    def _text(cell: Any, column: str) -> str:
        text = "" if cell is None else joined_text(cell)
        if text is None:
            raise ValueError(
                f"The column {column!r} must have texts or lists of words, got "
                f"{type(cell).__name__}: {cell!r:.80}."
            )
        return text

    def features(self, dataset: Any) -> Any:
        """The types of all columns: of its rows alone, a first batch without mentions has none."""
        if dataset.features is None:
            return None
        number, priors = Value("int64"), [Value("float64")]
        record = {"start": number, "end": number, "entities": [number], "priors": priors}
        features = dataset.features.copy()
        features[MENTIONS] = [{**record, "column": number} if len(self.columns) > 1 else record]
        if self.aligner is not None:
            features[TOKEN_MENTIONS] = [record]
        return features


def check_columns(dataset: Any, columns: Sequence[str], name: str) -> None:
    """Refuse a dataset without the columns that are linked."""
    for column in columns if dataset.column_names is not None else ():
        if column not in dataset.column_names:
            fix = "Tokenise it first." if column == "input_ids" else "Set text_column=…."
            raise ValueError(
                f"The dataset{f' ({name})' * bool(name)} has no column {column!r}; it has "
                f"{', '.join(dataset.column_names)}. {fix}"
            )
