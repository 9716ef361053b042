"""Columns of a dataset that adaptations see and the model does not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
from torch import nn
from transformers import PreTrainedModel

from hf_adapt.engine.pairing import is_map_style
from hf_adapt.models.state import preserved_random_state
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer


def dataset_columns(dataset: Any, read_stream: bool = False) -> list[str] | None:
    """The columns of the rows that a dataset gives, or None where only reading it would tell.

    A transform on the fly, or a dataset of another library, is asked for its first row.

    Args:
        dataset: The dataset.
        read_stream: Ask a `datasets` stream of unknown columns too. It starts again each time it is
            read, but may have to fill a buffer of shuffled rows first.
    """
    row: Any = None
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        return list(dataset.format["columns"])
    if isinstance(dataset, datasets.IterableDataset) and dataset.column_names is not None:
        return list(dataset.column_names)
    with preserved_random_state():
        if isinstance(dataset, datasets.IterableDataset):
            row = None if not read_stream else next(iter(dataset), None)
        elif is_map_style(dataset) and not isinstance(dataset, Mapping) and len(dataset) > 0:
            row = dataset[0]
    return list(row) if isinstance(row, Mapping) else None


def named_inputs(model: nn.Module) -> set[str] | None:
    """The inputs that a model's forward names, or None if it takes anything."""
    # A PEFT model's own forward takes *args, **kwargs, and so may one that replaced a model's.
    base = unwrapped_base(model)
    base = getattr(base, "_orig_mod", base)  # torch.compile's
    for forward in (base.forward, type(base).forward):
        parameters = list(inspect.signature(forward).parameters.values())
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        # Transformers models take **kwargs for their attention, not for columns they do not know.
        if not takes_all or (isinstance(base, PreTrainedModel) and names - {"self"}):
            return names - {"self"}
    return None


def model_inputs(trainer: Trainer) -> set[str]:
    """The inputs that the forward of the Trainer's model names."""
    return named_inputs(trainer.accelerator.unwrap_model(trainer.model)) or set()


def inputs_of(trainer: Trainer) -> set[str]:
    """Inputs that the Trainer's model takes, and labels.

    A Trainer that makes its own columns (TRL) keeps fewer than the model takes.
    """
    trainer._set_signature_columns_if_needed()
    return {*model_inputs(trainer), *(vars(trainer).get("_signature_columns") or ())}


@contextmanager
def kept_columns(trainer: Trainer, columns: Sequence[str]) -> Iterator[None]:
    """Let a Trainer that removes unused columns keep these while a dataset is prepared."""
    if not columns:
        yield
        return
    trainer._set_signature_columns_if_needed()
    names = vars(trainer)
    before = names.get("_signature_columns")
    names["_signature_columns"] = [*(before or ()), *columns]
    try:
        yield
    finally:
        names["_signature_columns"] = before
