"""Filling a cache with a teacher's predictions before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from hf_adapt.distillation.checks import Classes, num_positions
from hf_adapt.distillation.heads import Head
from hf_adapt.distillation.hooks import TeacherHooks
from hf_adapt.distillation.row_files import longer_rows
from hf_adapt.distillation.teacher_outputs import teacher_output
from hf_adapt.engine.columns import named_inputs
from hf_adapt.engine.parts import Part


def collator_for(head: Head, tokenizer: Any) -> Callable[[list[Any]], Any]:
    """The default collator of a head, which pads and creates a language model's labels."""
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
    """Compute a teacher's predictions for all rows, batch by batch; stored ones are skipped.

    Args:
        cache: A cache with a model behind it.
        rows: The rows, tokenised as they will be in training.
        processing_class: The tokenizer.
        data_collator: The collator of the training; by default that of the head.
        batch_size: Rows in a batch.
        device: The device on which the teacher runs.

    Yields:
        The number of rows done, after each batch.

    Raises:
        ValueError: If there is no model behind the cache, the folder holds something else, or a row
            has more tokens than the teacher has positions.
    """
    module = cache.module
    if module is None:
        raise ValueError("Filling a cache needs its teacher: CachedTeacher(folder, teacher=model).")
    positions = num_positions(module)
    if isinstance(rows, datasets.Dataset) and (longer := longer_rows(rows, positions)):
        raise ValueError(
            f"The row {longer[0]} has {len(rows[longer[0]]['input_ids'])} tokens, and the teacher "
            f"takes {positions} ({len(longer)} of {len(rows)} rows are longer). Truncate the rows "
            f"at {positions}, also in training (max_length={positions})."
        )
    head = Head.of(module)
    # On cards without the memory the model stays where it was loaded.
    if getattr(module, "hf_device_map", None) is None:
        module.to(device)
    hooks = TeacherHooks(cache, "forward_kl")
    module.eval()
    vocabulary, classes = Classes.of(module).vocabulary, None
    if vocabulary is not None and processing_class is not None:
        classes = min(vocabulary, len(processing_class))
    hooks.bind(module, ("start_positions", "end_positions"), processing_class)
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
            size = len(next(iter(inputs.values())))
            teacher_output(hooks, cache, Part(inputs, torch.zeros(size, dtype=torch.long)))
            done += size
            yield done
    finally:
        cache.close()


def _known(module: torch.nn.Module, head: Head | None) -> set[str]:
    """The columns that a model accepts, and labels by all their names.

    The default collator of a head gets labels, which may be texts in a file, only where they
    choose the items that are distilled.
    """
    labels = {"label", "label_ids", "labels"}
    known = {*(named_inputs(module) or ()), *labels}
    if head is None or head.kind == "tokens":
        return known
    return known - (labels - {"labels"} if head.kind == "causal_lm" else labels)
