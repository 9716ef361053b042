"""One class for each image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DefaultDataCollator,
)

from hf_adapt.experiments.tasks.task import Task


class ImageClassification(Task):
    """One class for each image; images with the same pixels count once."""

    model_class = AutoModelForImageClassification
    input_column = "image"
    label_column = "label"
    pipeline = "image-classification"
    example = "image.png"

    def checked(self, cell: Any, label: Any) -> Any:
        """The label; the input must be an image."""
        if not hasattr(cell, "convert"):
            raise ValueError(f"expected an image, got {cell!r}. Save images in a parquet file.")
        return super().checked(cell, label)

    def clean(self, cell: Any) -> Any:
        """The image in colours."""
        return cell.convert("RGB")

    def key(self, cell: Any) -> str:
        """A hash of its size and pixels."""
        return hashlib.sha256(repr(cell.size).encode() + cell.tobytes()).hexdigest()

    def described(self, row: Mapping[str, Any]) -> Any:
        """A row with the hash of its image."""
        return {**row, "image": self.key(row["image"])}

    def features(self, labels: Sequence[str]) -> Features:
        """An image and a class."""
        return Features({"image": Image(), "label": ClassLabel(names=list(labels))})

    def processor(self, model: str) -> Any:
        """The image processor."""
        processors: Any = AutoImageProcessor
        return processors.from_pretrained(model)

    def prepared(self, rows: Dataset, processor: Any, max_length: int) -> Dataset:
        """Pixel values in place of the image."""
        return rows.map(
            lambda batch: {
                "pixel_values": np.asarray(processor(batch["image"])["pixel_values"], np.float32)
            },
            batched=True,
            remove_columns="image",
        )

    def collator(self, processor: Any) -> Any:
        """Stacks images of one size."""
        return DefaultDataCollator()
