"""One class for each word of a text that comes as a list of words."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
)

from hf_adapt.experiments.tasks.task import Task

IGNORED = -100


class TokenClassification(Task):
    """One class for each word: accuracy and macro-F1 are over words.

    The first token of a word has its label; the others have none.
    """

    model_class = AutoModelForTokenClassification
    input_column = "tokens"
    label_column = "tags"
    pipeline = "token-classification"
    example = "What I waited for !"

    def checked(self, cell: Any, label: Any) -> Any:
        """The tags of all words; None if there are none, or one is missing."""
        if not isinstance(cell, list) or not all(isinstance(word, str) for word in cell):
            raise ValueError(f"expected a list of words, got {cell!r}.")
        if label is None or label == []:
            return None
        if not isinstance(label, list):
            raise ValueError(f"expected a list of tags, got {label!r}.")
        if len(cell) != len(label):
            raise ValueError(f"it has {len(cell)} words and {len(label)} tags.")
        return None if None in label else label

    def clean(self, cell: Any) -> list[str]:
        """The words."""
        return list(cell)

    def key(self, cell: Any) -> str:
        """The words in a row."""
        return " ".join(cell)

    def class_names(self, label: Any) -> Iterable[str]:
        """The classes of all words."""
        return list(label)

    def class_numbers(self, labels: Iterable[Any]) -> Iterable[int]:
        """The classes of all words of all rows."""
        return itertools.chain.from_iterable(labels)

    def with_any_labels(self, rows: Dataset) -> Dataset:
        """With a label for each word, so that its first token is the one that counts."""
        return rows.map(lambda row: {"tags": [0] * len(row["tokens"])})

    def features(self, labels: Sequence[str]) -> Features:
        """Words and classes."""
        return Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=labels))})

    def processor(self, model: str) -> Any:
        """The tokenizer."""
        return AutoTokenizer.from_pretrained(model)

    def prepared(self, rows: Dataset, processor: Any, max_length: int) -> Dataset:
        """Tokens in place of the words, and labels of tokens in place of those of words."""

        def tokenised(batch: dict[str, Any]) -> Any:
            found = processor(
                batch["tokens"], is_split_into_words=True, truncation=True, max_length=max_length
            )
            if "tags" in batch:
                found["labels"] = [
                    _labels(found.word_ids(row), tags) for row, tags in enumerate(batch["tags"])
                ]
            return found

        return rows.map(tokenised, batched=True, remove_columns=rows.column_names)

    def collator(self, processor: Any) -> Any:
        """Pads to the longest text of a batch."""
        return DataCollatorForTokenClassification(processor)


def _labels(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    labels, last = [], None
    for word in words:
        labels.append(IGNORED if word is None or word == last else tags[word])
        last = word
    return labels
