"""Filling a cache of a teacher's predictions before any training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from hf_adapt.distillation.cache import CachedTeacher
from hf_adapt.distillation.checks import Classes
from hf_adapt.distillation.heads import Head
from hf_adapt.distillation.objective import Distillation

FORMATS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def read_rows(source: str, split: str | None = None) -> datasets.Dataset:
    """Rows of a folder made by `save_to_disk`, a csv/tsv/json/jsonl/parquet file, or a hub id.

    Raises:
        ValueError: If there are several splits and none is named.
    """
    path = Path(source)
    if path.is_dir():
        found = datasets.load_from_disk(source)
    elif path.suffix.lstrip(".") in FORMATS:
        options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        kind = FORMATS[path.suffix.lstrip(".")]
        found = datasets.load_dataset(kind, data_files={"train": source}, **options)
    else:
        found = datasets.load_dataset(source)
    if isinstance(found, datasets.DatasetDict):
        if split is None and len(found) > 1:
            raise ValueError(f"{source} has the splits {', '.join(found)}: name one with --split.")
        found = found[split or next(iter(found))]
    assert isinstance(found, datasets.Dataset)
    return found


def tokenised(
    rows: datasets.Dataset, tokenizer: Any, columns: Sequence[str], max_length: int | None
) -> datasets.Dataset:
    """The rows with the tokens of their text; rows that have tokens stay as they are.

    Args:
        rows: With `input_ids` or `pixel_values`, or with the text columns.
        tokenizer: Called with the texts.
        columns: One text column, or two for pairs.
        max_length: Where tokens are truncated; the tokenizer's limit by default.

    Raises:
        ValueError: If a text column is missing.
    """
    if {"input_ids", "pixel_values"} & set(rows.column_names):
        return rows
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"The rows have no column {', '.join(map(repr, missing))}, and no input_ids either; "
            f"they have {', '.join(rows.column_names)}. Name the text with --text-column."
        )
    kept = [name for name in ("label", "labels") if name in rows.column_names]
    return rows.map(
        lambda batch: tokenizer(
            *(batch[name] for name in columns), truncation=True, max_length=max_length
        ),
        batched=True,
        remove_columns=[name for name in rows.column_names if name not in kept],
        desc="Tokenising",
    )


def collator_for(head: Head, tokenizer: Any) -> Callable[[list[Any]], Any]:
    """The usual collator of a head, which pads and makes a language model's labels."""
    if tokenizer is None:
        return default_data_collator
    if head.is_encoder_decoder:
        return DataCollatorForSeq2Seq(tokenizer)
    if head.kind == "causal_lm":
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if head.kind == "tokens":
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorWithPadding(tokenizer)


def fill_cache(
    cache: CachedTeacher,
    rows: Any,
    processing_class: Any = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> Iterator[int]:
    """Compute what a teacher says of all rows, batch by batch; what is there already is not.

    Args:
        cache: With a model behind it.
        rows: Tokenised as they will be in training.
        processing_class: The tokenizer.
        data_collator: As in training; the usual one of the head by default.
        batch_size: Rows at once.
        device: Where the teacher runs.

    Yields:
        The number of rows done, after each batch.

    Raises:
        ValueError: If there is no model behind the cache, or the folder holds something else.
    """
    module = cache.module
    if module is None:
        raise ValueError("Filling a cache needs its teacher: CachedTeacher(folder, teacher=model).")
    head = Head.of(module)
    # On cards without the memory the model stays where it was loaded.
    if getattr(module, "hf_device_map", None) is None:
        module.to(device)
    distillation = Distillation(cache)
    module.eval()
    vocabulary, classes = Classes.of(module).vocabulary, None
    if vocabulary is not None and processing_class is not None:
        classes = min(vocabulary, len(processing_class))
    distillation.bind(module, ("start_positions", "end_positions"), processing_class)
    cache.open(processing_class, classes=classes)
    collate = data_collator or collator_for(head, processing_class)
    known = _known(module, head if data_collator is None else None)
    columns = [name for name in getattr(rows, "column_names", None) or [] if name in known]
    chosen = rows.select_columns(columns) if columns else rows
    done = 0
    try:
        for batch in DataLoader(chosen, batch_size=batch_size, collate_fn=collate):
            inputs = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
            }
            distillation.ask(inputs)
            done += len(next(iter(inputs.values())))
            yield done
    finally:
        cache.close()


def _known(module: torch.nn.Module, head: Head | None) -> set[str]:
    """Columns that a model takes, and labels by all their names.

    The usual collator of a head is given labels, which may be texts in a file, only where they say
    what is distilled.
    """
    labels = {"label", "label_ids", "labels"}
    known = {*inspect.signature(module.forward).parameters, *labels}
    if head is None or head.kind == "tokens":
        return known
    return known - (labels - {"labels"} if head.kind == "causal_lm" else labels)
