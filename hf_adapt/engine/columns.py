"""Columns of a dataset that adaptations see and the model does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
from torch import nn
from transformers import PreTrainedModel

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.domains import COLUMNS, is_map_style
from hf_adapt.models.state import preserved_random_state
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer


class ColumnCollator:
    """Takes columns out of the rows before the author's collator, for whoever wants them.

    Args:
        collator: The author's collator.
        columns: Names of the columns that are put beside the batch; a row without one has None.
        collating: Adaptations that read their `row_columns` and add inputs to the batch.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        columns: Sequence[str],
        collating: Sequence[Adaptation] = (),
    ) -> None:
        self.collator = collator
        self.columns = tuple(columns)
        self.collating = tuple(collating)
        self._hidden = {*columns, *(name for a in collating for name in a.row_columns)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "collator" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: list[Any]) -> Any:
        """Collate rows.

        Raises:
            TypeError: If the collator does not return a dict.
        """
        carried = {name: [_value(row, name) for row in rows] for name in self.columns}
        batch = self.collator([_without(row, self._hidden) for row in rows])
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"Keeping the column(s) {', '.join(sorted(self._hidden))} beside a batch needs a "
                f"data collator that returns a dict; {type(self.collator).__name__} returned "
                f"{type(batch).__name__}."
            )
        for adaptation in self.collating:
            adaptation.collate(rows, batch)
        if self.columns:
            batch[COLUMNS] = carried
        return batch


def _value(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else None


def _without(row: Any, columns: Collection[str]) -> Any:
    if isinstance(row, Mapping) and any(name in row for name in columns):
        return {key: value for key, value in row.items() if key not in columns}
    return row


def dataset_columns(dataset: Any, read_stream: bool = False) -> list[str] | None:
    """The columns of the rows that a dataset gives, or None where only reading it would tell.

    A transform on the fly, or a dataset of another library, is asked for its first row.

    Args:
        dataset: The dataset.
        read_stream: Ask a `datasets` stream of unknown columns too. It begins anew each time it is
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


def inputs_of(trainer: Trainer) -> set[str]:
    """Inputs that the Trainer's model takes, and labels.

    A Trainer that makes its own columns (TRL) keeps fewer than the model takes.
    """
    trainer._set_signature_columns_if_needed()
    model = unwrapped_base(trainer.accelerator.unwrap_model(trainer.model))
    taken = named_inputs(model) or ()
    return {*taken, *(vars(trainer).get("_signature_columns") or ())}


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


@contextmanager
def column_collator(
    trainer: Trainer, columns: Sequence[str], collating: Sequence[Adaptation] = ()
) -> Iterator[None]:
    """Put the collator of columns where the author's was, while a loader is built."""
    if not columns and not collating:
        yield
        return
    before = trainer.data_collator
    trainer.data_collator = ColumnCollator(before, columns, collating)
    try:
        yield
    finally:
        trainer.data_collator = before


def take_columns(inputs: dict[str, Any], num_rows: int) -> Mapping[str, list[Any]]:
    """Remove the columns from a batch.

    Raises:
        ValueError: If they do not fit its rows.
    """
    columns: Mapping[str, list[Any]] = inputs.pop(COLUMNS, {})
    for name, values in columns.items():
        if len(values) != num_rows:
            raise ValueError(
                f"The column {name!r} has {len(values)} values for a batch of {num_rows} rows: the "
                "batch was split or merged after it was collated (dispatch_batches, packing). Set "
                "accelerator_config={'dispatch_batches': False}, and turn packing off."
            )
    return columns
