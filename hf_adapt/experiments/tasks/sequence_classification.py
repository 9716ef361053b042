"""One class for each text."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from hf_adapt.experiments.tasks.task import Task

# Vowel signs are marks to Unicode, which \w leaves out; here texts would lose their vowels.
INDIC_AND_SOUTH_EAST_ASIAN = range(0x900, 0x1D00)
VOWEL_SIGNS = (c for c in map(chr, INDIC_AND_SOUTH_EAST_ASIAN) if unicodedata.category(c)[0] == "M")
WORD = re.compile(rf"[\w{''.join(VOWEL_SIGNS)}]+")


class SequenceClassification(Task):
    """One class for each text; texts that differ in case and punctuation only count once."""

    model_class = AutoModelForSequenceClassification
    input_column = "text"
    label_column = "label"
    pipeline = "text-classification"
    example = "What I waited for!"

    def clean(self, cell: Any) -> str:
        """The text without entities and further white space."""
        return " ".join(html.unescape(str(cell)).split())

    def key(self, cell: Any) -> str:
        """Its words, in lower case."""
        return " ".join(WORD.findall(cell.casefold())) or str(cell)

    def features(self, labels: Sequence[str]) -> Features:
        """A text and a class."""
        return Features({"text": Value("string"), "label": ClassLabel(names=list(labels))})

    def processor(self, model: str) -> Any:
        """The tokenizer."""
        return AutoTokenizer.from_pretrained(model)

    def prepared(self, rows: Dataset, processor: Any, max_length: int) -> Dataset:
        """Tokens in place of the text."""
        return rows.map(
            lambda batch: processor(batch["text"], truncation=True, max_length=max_length),
            batched=True,
            remove_columns="text",
        )

    def collator(self, processor: Any) -> Any:
        """Pads to the longest text of a batch."""
        return DataCollatorWithPadding(processor)
