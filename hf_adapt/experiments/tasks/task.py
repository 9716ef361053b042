"""The base class of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features

Row = tuple[Any, Any]
"""What a row holds, and its label: a class name, a list of them, or None."""


class Task(ABC):
    """What a model's head predicts, and how rows become its batches.

    Attributes:
        model_class: The class of `transformers` that loads a model with this head.
        input_column: The column that is read by default.
        label_column: The column with the labels by default.
        pipeline: The name of the `transformers` pipeline of such a model.
        example: Something to try it on.
    """

    model_class: Any
    input_column: str
    label_column: str
    pipeline: str
    example: str

    @abstractmethod
    def clean(self, cell: Any) -> Any:
        """The input of a row as it is trained on; falsy for a row without one."""

    @abstractmethod
    def key(self, cell: Any) -> str:
        """A text that is the same for inputs that count as the same row."""

    def checked(self, cell: Any, label: Any) -> Any:
        """The label of a row, None if it has none that can be used.

        Raises:
            ValueError: If the input or the label is of a wrong kind.
        """
        if label is not None and not isinstance(label, str):
            raise ValueError(f"expected one class, got the label {label!r}.")
        return label

    def described(self, row: Mapping[str, Any]) -> Any:
        """A row as plain data, for a fingerprint."""
        return row

    def with_any_labels(self, rows: Dataset) -> Dataset:
        """Rows without labels, as they are predicted on where it matters which items have one."""
        return rows

    def class_names(self, label: Any) -> Iterable[str]:
        """The classes in the label of one row."""
        return (label,)

    def class_numbers(self, labels: Iterable[Any]) -> Iterable[int]:
        """The classes of all items, from the column `label` of prepared rows."""
        return labels

    @abstractmethod
    def features(self, labels: Sequence[str]) -> Features:
        """The column of inputs, and the column `label`, of the rows of a domain."""

    @abstractmethod
    def processor(self, model: str) -> Any:
        """The tokenizer, or the image processor, of a model."""

    @abstractmethod
    def prepared(self, rows: Dataset, processor: Any, max_length: int) -> Dataset:
        """The inputs of the model in place of the column that is read."""

    @abstractmethod
    def collator(self, processor: Any) -> Any:
        """What makes batches of prepared rows."""
