"""The streams of a run, paired with its training rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.collating import (
    DOMAIN,
    AdaptationCollator,
    dataset_name,
    label_columns,
    missing_columns_message,
)
from hf_adapt.engine.columns import dataset_columns, model_inputs
from hf_adapt.engine.mixins import RowRouting
from hf_adapt.engine.pairing import StreamRows, is_map_style, pair, rows_at
from hf_adapt.engine.plan import the_only
from hf_adapt.engine.streams import HF_DATASETS, TRAINING, Routing, Stream, StreamTable
from hf_adapt.engine.trainer_kinds import is_sentence_trainer, refuse_answers

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.mixins import BatchTransform

SOURCE_NAMES = (0, "source")
"""What the source is called in a `domain` column, unless the user says otherwise."""


class StreamData:
    """The streams of a run and the training set paired with them.

    Args:
        trainer: The Trainer whose `train_dataset` is the source.
        streams: The streams by name, the target first.
        adaptations: The active adaptations.
    """

    def __init__(
        self, trainer: Trainer, streams: Mapping[str, Stream], adaptations: Sequence[Adaptation]
    ) -> None:
        self.trainer = trainer
        self.streams = dict(streams)
        refuse_answers(
            trainer,
            "rows of a target cannot stand beside its rows",
            "Adapt the model to the target first, with SFTTrainer and an objective on features "
            "(MMD, DANN), and train on the answers then. GradualUnfreezingCallback works here too, "
            "and Distillation with DPO, KTO and rewards.",
        )
        if getattr(trainer.args, "packing", False):
            raise ValueError(
                "packing=True merges rows, so source and target rows could not be told apart. "
                "Turn packing off."
            )
        source, given = _training_rows(trainer), {}
        for name, stream in streams.items():
            if stream.dataset is None:
                needing = ", ".join(a.name for a in adaptations if name in a.needs_streams)
                source, given[name] = _split(source, stream.source_domain, needing)
            else:
                given[name] = stream.domains
        routing = routing_of(trainer, adaptations)
        self._is_routed = routing is not None
        self._wants_domain = any(DOMAIN in a.columns for a in adaptations)
        source_rows = self._without_unused_columns(source)
        self._used = _used_columns(trainer)
        rows, names = [], [TRAINING]
        for name, stream in streams.items():
            data = [_prepared(trainer, source, dataset) for dataset in given[name]]
            for dataset in data:
                _check_not_empty(dataset, name)
            keeps_labels = stream.labels == "keep"
            _check_columns(trainer, source_rows, data, self._used, name, keeps_labels)
            if is_map_style(source) and 0 < len(source) * stream.ratio < 1:
                raise ValueError(
                    f"ratio={stream.ratio} of {len(source)} training rows is not even one "
                    f"{name} row in an epoch. Use a larger ratio."
                )
            data = [self._without_unused_columns(dataset) for dataset in data]
            _check_dispatch(trainer, source, name, stream)
            rows.append(StreamRows(data, stream.ratio, len(names), name))
            names += [name] * len(data)
        tasks = {} if routing is None else routing.collators
        _check_tasks(trainer, source, tasks, names)
        names += tasks
        apart = is_sentence_trainer(trainer)
        unread = frozenset() if apart else _unread(trainer, streams, adaptations)
        kept = {n for n, stream in streams.items() if stream.labels == "keep"}
        self.table = StreamTable(
            tuple(names),
            unread | tasks.keys() | {n for n, s in streams.items() if s.is_separate or apart},
            frozenset(kept | {n for n, collator in tasks.items() if collator is None}),
            unread | {n for n, collator in tasks.items() if collator is not None},
            {n: stream.ratio for n, stream in streams.items()},
            routing,
        )
        seed = trainer.args.data_seed if trainer.args.data_seed is not None else trainer.args.seed
        self.source = source
        """The training rows, as the user's sampler must see them."""
        self._source_rows, self._rows = source_rows, rows
        self._paired = pair(source_rows, rows, seed, apart)

    def set_epoch(self, epoch: int) -> None:
        """Draw the companions of this epoch from here on."""
        self._paired.set_epoch(epoch)

    @contextmanager
    def in_place(
        self, columns: Sequence[str], transforms: Sequence[BatchTransform]
    ) -> Iterator[None]:
        """Put the paired set and its collator where the user's were, while a loader is built."""
        trainer = self.trainer
        dataset, collator = trainer.train_dataset, trainer.data_collator
        trainer.train_dataset = self._paired
        trainer.data_collator = self.collator(columns, transforms)
        try:
            yield
        finally:
            trainer.train_dataset, trainer.data_collator = dataset, collator

    def collator(
        self, columns: Sequence[str], transforms: Sequence[BatchTransform]
    ) -> AdaptationCollator:
        """The user's collator, for paired rows and with what adaptations add."""
        trainer, clean = self.trainer, None
        cleaned = isinstance(self.source, datasets.Dataset) and not self._is_routed
        if not cleaned and not is_sentence_trainer(trainer):
            # The Trainer cleans the rows of other datasets in the collator; ours are wrapped.
            def clean(inner: Any) -> Any:
                return trainer._get_collator_with_removed_columns(inner, description="training")

        return AdaptationCollator(
            trainer.data_collator,
            columns,
            transforms,
            self.table,
            trainer.label_names,
            self._used,
            clean,
            model_inputs(trainer),
            stands_in=trainer.accelerator.num_processes > 1,
        )

    def rows_of(self, stream: str) -> list[tuple[int, Any]]:
        """The datasets of a stream, each with its domain number, for reading every row once.

        Args:
            stream: The stream's name; `"train"` for the training rows.

        Raises:
            ValueError: If one cannot be read by row number.
        """
        found: list[tuple[int, Any]] = []
        if stream == TRAINING:
            found = [(0, _own_rows(self._source_rows, self.table.routing))]
        for rows in self._rows:
            if rows.name == stream:
                found += list(enumerate(rows.datasets, rows.first_domain))
        if not all(is_map_style(dataset) for _, dataset in [*found, (0, self._source_rows)]):
            raise ValueError(
                f"All rows of the {dataset_name(stream)} are read between two steps of training, "
                "and a dataset of this run is a stream. Make it map-style "
                "(`datasets.Dataset.from_list(list(itertools.islice(target, 10_000)))`)."
            )
        return found

    @property
    def example_row(self) -> Any:
        """A training row, which has the columns that the model needs."""
        if self.table.routing is not None:
            return self.table.routing.example
        return rows_at(self._source_rows, [0])[0]

    def _without_unused_columns(self, dataset: Any) -> Any:
        if isinstance(dataset, datasets.Dataset) and not is_sentence_trainer(self.trainer):
            if DOMAIN in dataset.column_names and not self._wants_domain:
                dataset = dataset.remove_columns(DOMAIN)
            if self._is_routed:
                return dataset  # other tasks have other columns; their collators choose
            return self.trainer._remove_unused_columns(dataset, description="training")
        return dataset

    def keeps_columns(self, dataset: Any) -> bool:
        """Whether no column may be removed: the collator of each task chooses its own."""
        return self._is_routed and self.is_paired(dataset)

    def is_paired(self, dataset: Any) -> bool:
        """Whether this is the paired set (its sampler is the source's)."""
        return dataset is self._paired


def _training_rows(trainer: Trainer) -> Any:
    """The Trainer's `train_dataset`, if rows of streams can be paired with it."""
    source: Any = trainer.train_dataset
    if source is None:
        raise ValueError("Training needs a train_dataset: it is the source domain.")
    if isinstance(source, Mapping):
        raise ValueError(
            f"train_dataset is a {type(source).__name__} of {', '.join(map(str, source))}, which "
            "the Trainer concatenates itself; target rows are paired with the rows of one dataset. "
            "Pass datasets.concatenate_datasets([...])."
        )
    return source


def _split(source: Any, source_domain: int | str | None, needing: str) -> tuple[Any, list[Any]]:
    """The source and the other domains, by the `domain` column of `train_dataset`."""
    columns = dataset_columns(source, read_stream=True) or []
    if DOMAIN not in columns:
        raise ValueError(
            f"{needing or 'The adaptation'} needs target rows: pass target_dataset=, "
            f"or a train_dataset with a {DOMAIN!r} column (found {columns or 'no column names'})."
        )
    if isinstance(source, datasets.IterableDataset):
        chosen = SOURCE_NAMES if source_domain is None else (source_domain,)
        return (
            source.filter(lambda row: _given_domain(row[DOMAIN]) in chosen),
            [source.filter(lambda row: _given_domain(row[DOMAIN]) not in chosen)],
        )
    stored = isinstance(source, datasets.Dataset)
    given = source[DOMAIN] if stored else [row[DOMAIN] for row in source]
    domains = np.asarray([_given_domain(value, i) for i, value in enumerate(given)])
    values = np.unique(domains).tolist()
    value = source_domain
    if value is None:
        value = next((v for v in SOURCE_NAMES if v in values), None)
    if value not in values or len(values) < 2:
        raise ValueError(
            f"The {DOMAIN!r} column of train_dataset holds {values}: it needs a source and at "
            "least one other domain. Pass target_dataset=Stream(source_domain=...) to say which "
            "value is the source (0 or 'source' by default)."
        )

    def select(places: np.ndarray) -> Any:
        return source.select(places) if stored else [source[int(place)] for place in places]

    return (
        select(np.flatnonzero(domains == value)),
        [select(np.flatnonzero(domains == v)) for v in values if v != value],
    )


def _given_domain(value: Any, row: int | None = None) -> Any:
    """The value of a `domain` column.

    Raises:
        ValueError: If it is missing.
    """
    if value is None or value != value:  # NaN
        place = "A row" if row is None else f"Row {row}"
        raise ValueError(
            f"{place} of train_dataset has {value} in its {DOMAIN!r} column, so it is neither "
            "source nor target. Fill the column in, or leave such rows out: "
            f"train_dataset.filter(lambda row: row[{DOMAIN!r}] is not None)."
        )
    return value


def _prepared(trainer: Trainer, source: Any, target: Any) -> Any:
    """A raw target of a Trainer that tokenises its own datasets (TRL), tokenised by it."""
    prepare = getattr(trainer, "_prepare_dataset", None)
    if not callable(prepare):
        return target
    target_has_tokens, source_has_tokens = (
        "input_ids" in (dataset_columns(data, read_stream=True) or ()) for data in (target, source)
    )
    if target_has_tokens or not source_has_tokens:
        return target
    if isinstance(target, list):
        target = datasets.Dataset.from_list(target)
    if not isinstance(target, HF_DATASETS):
        return target
    formatting = getattr(trainer, "_formatting_func", None)
    return prepare(target, trainer.processing_class, trainer.args, False, formatting, "target")


def _unread(
    trainer: Trainer, streams: Mapping[str, Stream], adaptations: Sequence[Adaptation]
) -> frozenset[str]:
    """The streams without a loss of their own, of which no objective reads the first forward."""
    unread = set()
    for name, stream in streams.items():
        readers = [a for a in adaptations if isinstance(a, Objective) and name in a.streams]
        used = stream.labels == "keep" or any(a.reads_first_forward(trainer) for a in readers)
        if readers and not used:
            unread.add(name)
    return frozenset(unread)


def _check_not_empty(target: Any, stream: str) -> None:
    if hasattr(target, "__len__") and len(target) == 0:
        raise ValueError(
            f"The {dataset_name(stream)} is empty: it must have rows to train with (an empty set "
            "is often the result of a filter or a wrong split name)."
        )


def routing_of(trainer: Trainer, adaptations: Sequence[Adaptation]) -> Routing | None:
    """Which training rows belong to other tasks, if an adaptation says so."""
    router = the_only(adaptations, RowRouting, "send training rows to tasks")
    return None if router is None else router.routing(trainer)


def _own_rows(source: Any, routing: Routing | None) -> Any:
    """The training rows without those of other tasks."""
    if routing is None or not is_map_style(source):
        return source
    numbers = [i for i in range(len(source)) if routing.task(source[i]) == routing.own]
    return torch.utils.data.Subset(source, numbers)


def _check_tasks(
    trainer: Trainer, source: Any, tasks: Collection[str], streams: Collection[str]
) -> None:
    """Refuse tasks whose rows could not be told apart, or not be given to several processes."""
    if twice := sorted(set(tasks) & set(streams)):
        raise ValueError(
            f"{', '.join(map(repr, twice))} names both a task and other rows of the run "
            f"({', '.join(map(repr, dict.fromkeys(streams)))}). Give the task another name."
        )
    dispatches = trainer.accelerator.dataloader_config.dispatch_batches
    if (
        tasks
        and not is_map_style(source)
        and trainer.accelerator.num_processes > 1
        and dispatches is not False
    ):
        raise ValueError(
            "A streaming train_dataset is cut into batches for "
            f"{trainer.accelerator.num_processes} processes by the main one, which does not work "
            "for rows of several tasks. Set accelerator_config={'dispatch_batches': False}."
        )


def _check_dispatch(trainer: Trainer, source: Any, name: str, stream: Stream) -> None:
    """Refuse a stream whose batches the main process cannot cut for the others.

    Raises:
        ValueError: If a batch's rows would be lost or go to the wrong process.
    """
    dispatches = trainer.accelerator.dataloader_config.dispatch_batches
    if is_map_style(source) or trainer.accelerator.num_processes == 1 or dispatches is False:
        return
    size = trainer.args.per_device_train_batch_size
    separate = stream.is_separate or is_sentence_trainer(trainer)
    if (separate and stream.ratio != 1) or not float(size * stream.ratio).is_integer():
        raise ValueError(
            f"A streaming train_dataset is cut into batches for {trainer.accelerator.num_processes}"
            f" processes by the main one, which does not work for the stream {name!r} with "
            f"ratio={stream.ratio}. Set accelerator_config={{'dispatch_batches': False}}, so that "
            "each process reads its own share of the stream, or use ratio=1."
        )


def _used_columns(trainer: Trainer) -> set[str] | None:
    """The columns that reach the collator, or None for all."""
    if not trainer.args.remove_unused_columns or is_sentence_trainer(trainer):
        return None
    trainer._set_signature_columns_if_needed()
    kept = trainer._kept_columns("training")  # type: ignore[attr-defined]  # AdaptationMixin's
    return {*(getattr(trainer, "_signature_columns", None) or ()), *kept}


def _check_columns(
    trainer: Trainer,
    source: Any,
    data: Sequence[Any],
    used: Collection[str] | None,
    stream: str,
    keeps_labels: bool,
) -> None:
    """Refuse a stream without the model inputs of the training rows, before anything is trained."""
    labels = {*label_columns(trainer.label_names, trainer.data_collator), DOMAIN}
    wanted = dataset_columns(source)
    for dataset in data:
        found = dataset_columns(dataset)
        if wanted is None or found is None:
            continue  # streams without known columns are checked row by row
        missing = [
            name
            for name in wanted
            if name not in found and name not in labels and (used is None or name in used)
        ]
        if missing:
            raise ValueError(missing_columns_message(missing, found, stream))
        own = [name for name in wanted if name in labels - {DOMAIN}]
        if keeps_labels and own and not any(name in found for name in own):
            raise ValueError(
                f"labels='keep', but the {dataset_name(stream)} has none of the label columns "
                f"{', '.join(map(repr, own))} of the train_dataset; it has "
                f"{', '.join(map(repr, found))}. Rename its label column as in the train_dataset."
            )
