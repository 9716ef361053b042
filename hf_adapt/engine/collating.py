"""One batch of the rows of several streams, with what adaptations add to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from hf_adapt.engine.labels import IGNORED, has_token_labels, label_of, length_of
from hf_adapt.engine.mixins import BatchTransform
from hf_adapt.engine.pairing import PairedRow
from hf_adapt.engine.streams import TARGET, TRAINING, StreamTable

DOMAIN = "domain"
"""The column that says which domain a row is from: 0 is the source."""

STREAM_BATCHES = "hf_adapt_streams"
"""The key of the batches of streams that go through the model in a forward of their own."""

STAND_IN = "hf_adapt_stand_in"
"""The key that says that a stream's batch is a row of another one, because it has none."""

COLUMNS = "hf_adapt_columns"
"""The key of the columns that adaptations want to see and the model must not."""

UNPAIRED = (
    "A training batch came without its target rows: the Trainer's get_train_dataloader() does not "
    "read self.train_dataset, which hf_adapt pairs with the target, or makes another dataset of "
    "it (select, filter, map, a wrapper). Build the DataLoader from self.train_dataset and "
    "self.data_collator, and prepare the rows before the Trainer is made."
)
"""What to say of rows or batches that come without their companions."""


def label_columns(label_names: Sequence[str], collator: Any) -> set[str]:
    """The columns that only say what is to be learnt from a row: a target row needs none."""
    # TRL's masks choose which tokens are labels; sentence-transformers' collator names its own.
    masks = ("completion_mask", "assistant_masks")
    declared = getattr(collator, "valid_label_columns", None) or ()
    return {*label_names, "label", "labels", "label_ids", *masks, *declared}


class UnlabelledCollator:
    """The user's data collator, which is given rows without their labels.

    One that cannot do without is given another row's label for each; the batch's labels are then
    to be left out.

    Args:
        collator: The user's collator.
        label_names: Names of label columns.
        like: A row with labels, if there is one.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Any], label_names: Sequence[str], like: Any = None
    ) -> None:
        self.collator = collator
        self.hidden = label_columns(label_names, collator)
        own = like.items() if isinstance(like, Mapping) else ()
        self._stand_ins = {key: value for key, value in own if key in self.hidden}
        self._by_token = {key for key in self._stand_ins if has_token_labels(like, key)}
        self._needs_labels = False

    def __call__(self, rows: list[Any]) -> Any:
        """Make a batch."""
        plain = [_without(row, self.hidden) for row in rows]
        if not self._needs_labels:
            try:
                return self.collator(copy.deepcopy(plain) if self._stand_ins else plain)
            except Exception as error:
                if not self._stand_ins:
                    raise
                try:
                    batch = self.collator([self._labelled(row) for row in plain])
                except Exception:
                    raise error from None  # it is not the label
                self._needs_labels = True
                return batch
        return self.collator([self._labelled(row) for row in plain])

    def _labelled(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        given = self._stand_ins.items()
        return {**row, **{k: _stand_in(label, row, k in self._by_token) for k, label in given}}


def _stand_in(label: Any, row: Mapping[str, Any], by_token: bool | None) -> Any:
    """Another row's label, that a collator can read; for each token, the first one there is."""
    if not by_token:
        return label
    first = next((value for value in label if value != IGNORED), label[0])
    return label_of(label, first, length_of(row))


class AdaptationCollator:
    """The user's data collator, for rows of several streams and with what adaptations add.

    The collator is called on all rows of a forward together, so they are padded alike; training
    rows come first. Labels of other streams are hidden (-100) before and after it: before, so that
    the columns agree; after, because a language-model collator makes labels from the tokens. A
    collator that cannot take -100 (one that looks labels up in a table) is given a training row's
    label for them instead, which is hidden afterwards.

    Args:
        collator: The user's collator.
        columns: Columns of the rows that are put beside the batch; a row without one has None.
        transforms: Adaptations that change the batch.
        table: The streams, if the rows are paired.
        label_names: Names of label columns.
        used: The columns that the collator is given; a companion may lack any other. None for all.
        clean: What the Trainer makes of a collator that shall not see unused columns.
        inputs: Inputs of the model: a column of that name is shown to it, too.
        stands_in: Whether a stream with a forward of its own that has no row in a batch is given a
            training row: several processes must run the same forwards.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        columns: Sequence[str] = (),
        transforms: Sequence[BatchTransform] = (),
        table: StreamTable | None = None,
        label_names: Sequence[str] = (),
        used: Collection[str] | None = None,
        clean: Callable[[Any], Any] | None = None,
        inputs: Collection[str] = (),
        stands_in: bool = False,
    ) -> None:
        self.collator = collator
        self.columns = tuple(columns)
        self.transforms = tuple(transforms)
        self._read_columns = {*columns, *(c for each in transforms for c in each.columns)}
        self.table = table
        self.stands_in = stands_in
        self.used = used
        self.own_label_names = {*label_names, "labels"}
        self.label_names = label_columns(label_names, collator)
        self._hidden_columns = self._read_columns - {*inputs, *self.label_names}
        self._takes_hidden: bool | None = None
        self._token_labels: dict[str, bool] = {}
        self._make: Callable[[list[Any]], Any] = (clean or _unchanged)(self._made)

    def __getattr__(self, name: str) -> Any:
        # A Trainer may ask its collator for more than a batch (sentence-transformers does).
        if name.startswith("__") or "collator" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: list[Any]) -> Any:
        """Collate rows.

        Raises:
            ValueError: If paired rows are expected and come without their companions.
            TypeError: If the user's collator does not return a dict.
        """
        if self.table is None:
            return self._make(rows)
        if not all(isinstance(row, PairedRow) for row in rows):
            raise ValueError(UNPAIRED)
        groups = self._by_task([row.source for row in rows])
        routing = self.table.routing
        stands_in = routing is not None and not groups[""]
        if routing is not None and stands_in:
            groups[""] = [(0, self._unlabelled(self._plain(routing.example)))]
        sources = [row for _, row in groups[""]]
        for row in rows:
            for domain, companion in row.companions:
                stream = self.table.names[domain]
                group = groups.setdefault(stream if stream in self.table.separate else "", [])
                row_of = self._companion(self._plain(companion), sources, stream)
                group.append((domain, row_of))
        for stream in self.table.labelled & groups.keys():
            given = [r for row in rows for d, r in row.companions if self.table.names[d] == stream]
            if not given:  # a task that shares the model's head
                given = [row for _, row in groups[stream]]
                numbered = [(d, self._companion(row, sources, stream)) for d, row in groups[stream]]
                groups[stream] = numbered
            self._check_labelled(stream, given, sources[0])
        stands_in = stands_in and len(groups[""]) == 1
        own_forward = self.table.separate - self._own_collators.keys()
        missing = own_forward - groups.keys() if self.stands_in else ()
        for stream in missing:
            groups[stream] = [(self.table.names.index(stream), dict(sources[0]))]
        batches = {
            name: self._collate([row for _, row in group], [d for d, _ in group], sources[0], name)
            for name, group in groups.items()
        }
        batch = batches.pop("")
        if stands_in:
            batch[STAND_IN] = torch.ones(1)
        for stream in missing:
            batches[stream][STAND_IN] = torch.ones(1)
        if batches:
            batch[STREAM_BATCHES] = batches
        return batch

    @property
    def _own_collators(self) -> Mapping[str, Callable[[list[Any]], Any]]:
        """The collators of tasks whose rows the user's own cannot collate."""
        routing = None if self.table is None else self.table.routing
        given = {} if routing is None else routing.collators
        return {task: collator for task, collator in given.items() if collator is not None}

    def _by_task(self, rows: list[Any]) -> dict[str, list[tuple[int, Any]]]:
        """The training rows, and those of each other task, with their domain numbers."""
        assert self.table is not None
        routing = self.table.routing
        if routing is None:
            return {"": [(0, self._plain(row)) for row in rows]}
        groups: dict[str, list[tuple[int, Any]]] = {"": []}
        for row in rows:
            task = routing.task(row)
            if task == routing.own:
                groups[""].append((0, self._plain(row)))
            else:
                number = self.table.names.index(task)
                groups.setdefault(task, []).append((number, self._plain(row)))
        return groups

    def _unlabelled(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A training row whose labels are hidden."""
        hidden = {k: label_of(v, IGNORED) for k, v in row.items() if k in self.label_names}
        return {**row, **hidden}

    def stream_batch(self, stream: str, rows: Sequence[tuple[int, Any]], like: Any) -> Any:
        """The batch of rows of one stream alone.

        Args:
            stream: The stream's name; `"train"` for training rows.
            rows: Each with its domain number.
            like: A training row, which has the columns that the model needs.
        """
        like = self._plain(like)
        plain = [self._plain(row) for _, row in rows]
        if stream != TRAINING:
            plain = [self._companion(row, [like], stream) for row in plain]
        return self._collate(plain, [domain for domain, _ in rows], like)

    def _check_labelled(self, stream: str, given: Sequence[Any], like: Any) -> None:
        """Refuse a stream whose labels are to be trained on and whose rows have none."""
        own = self.label_names & like.keys() if isinstance(like, Mapping) else ()
        if own and not any(isinstance(r, Mapping) and own & r.keys() for r in given):
            raise ValueError(
                f"labels='keep', but the rows of the {dataset_name(stream)} have none of the label "
                f"columns {', '.join(map(repr, sorted(own)))}; they have "
                f"{', '.join(map(repr, given[0]))}. Rename the label column as in the "
                "train_dataset."
            )

    def _made(self, rows: list[Any], collator: Callable[[list[Any]], Any] | None = None) -> Any:
        """The batch of these rows, with columns beside it and the adaptations' changes.

        Args:
            rows: The rows.
            collator: Another collator than the user's.
        """
        collator = collator or self.collator
        if not self._read_columns and not self.transforms:
            return collator(rows)
        batch = collator([_without(row, self._hidden_columns) for row in rows])
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"Keeping the column(s) {', '.join(sorted(self._read_columns))} beside a batch "
                f"needs a data collator that returns a dict; {type(collator).__name__} "
                f"returned {type(batch).__name__}."
            )
        for adaptation in self.transforms:
            adaptation.transform_batch(rows, batch)
        if self.columns:
            batch[COLUMNS] = {name: [_value(row, name) for row in rows] for name in self.columns}
        return batch

    def _labelled(self, rows: list[Any], hidden: torch.Tensor, like: Any) -> Any:
        """The batch, its hidden labels -100 or, where that fails, as that of `like`."""
        hides = isinstance(like, Mapping) and bool(hidden.any())
        names = [key for key in like if key in self.label_names] if hides else []
        if not names or self._takes_hidden:
            return self._make(rows)
        stand_ins = [
            {**row, **{n: _stand_in(like[n], row, self._token_labels.get(n)) for n in names}}
            if d
            else row
            for row, d in zip(rows, hidden.tolist(), strict=True)
        ]
        if self._takes_hidden is False:
            return self._make(stand_ins)
        try:
            batch = self._make(copy.deepcopy(rows))  # it may change them before it fails
        except Exception as error:
            try:
                batch = self._make(stand_ins)
            except Exception:
                raise error from None  # it is not the label
            self._takes_hidden = False
            if not bool(hidden.all()) and not self.label_names & set(batch):
                raise ValueError(
                    f"The data collator {_name(self.collator)} cannot collate target rows "
                    f"labelled {IGNORED} ({type(error).__name__}: {error}), and its batch has none "
                    f"of the label columns {', '.join(sorted(self.own_label_names))}, in which "
                    "another label could be hidden again. Name its labels in "
                    "TrainingArguments(label_names=[...]), or pass Stream(dataset, "
                    "forward='separate')."
                ) from error
        else:
            self._takes_hidden = True
        return batch

    def _collate(self, rows: list[Any], domains: list[int], like: Any, stream: str = "") -> Any:
        """The batch of one forward, with its domain column."""
        assert self.table is not None
        kept = {TRAINING, *self.table.labelled, *self._own_collators}
        hidden = torch.tensor([self.table.names[domain] not in kept for domain in domains])
        collator = self._own_collators.get(stream)
        if collator is not None:
            batch = self._made(rows, collator)
        else:
            batch = self._labelled(rows, hidden, like)
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                "Adapting to a target needs a data collator that returns a dict of tensors; "
                f"{type(self.collator).__name__} returned {type(batch).__name__}."
            )
        # A cross-encoder's collator leaves texts as lists.
        columns = {k: v for k, v in batch.items() if isinstance(v, list) or _is_tensor(v)}
        sizes = {k: len(v) for k, v in columns.items() if isinstance(v, list) or v.ndim > 0}
        if len(rows) not in sizes.values():
            raise ValueError(
                f"The data collator made a batch with first dimensions {sizes} of {len(rows)} "
                "rows: it merges rows (packing, padding-free), so source and target rows can no "
                "longer be told apart. Turn packing and padding_free off."
            )
        if bool(hidden.any()):
            for name in {*self.label_names, "shift_labels"} & set(sizes):
                if sizes[name] == len(rows):
                    self._hide(name, batch[name], hidden)
        batch[DOMAIN] = torch.tensor(domains)
        return batch

    def _hide(self, name: str, labels: Any, hidden: torch.Tensor) -> None:
        if _is_tensor(labels):
            labels[hidden] = IGNORED
        elif name in self.own_label_names and not bool(hidden.all()):
            raise ValueError(
                f"The data collator {_name(self.collator)} makes a list of {name!r}, in which the "
                "labels of target rows cannot be hidden (object detection, for example). Pass "
                "target_dataset=Stream(dataset, forward='separate'), which computes the loss on "
                "source rows alone."
            )

    def _companion(self, target: Any, sources: Sequence[Any], stream: str) -> Any:
        """A row of another stream with the training rows' columns, its labels hidden."""
        assert self.table is not None
        keeps_labels = stream in self.table.labelled
        like = sources[0]
        if not isinstance(target, Mapping) or not isinstance(like, Mapping):
            return target
        row = {
            key: target[key]
            for key in like
            if key in target and (keeps_labels or key not in self.label_names)
        }
        wanted = self._hidden_columns
        if stream in self.table.separate:
            wanted = wanted | (set(self.used or ()) - self.label_names)
        row.update({key: target[key] for key in wanted & target.keys() - row.keys()})
        missing = [
            key
            for key in like
            if key not in row
            and key not in {*self.label_names, DOMAIN}
            and (self.used is None or key in self.used)
        ]
        if missing:
            raise ValueError(missing_columns_message(missing, list(target), stream))
        for key in like:
            if key in self.label_names and key not in row:
                length = length_of(target) if self._per_token(key, sources) else None
                row[key] = label_of(like[key], IGNORED, length)
        return row

    def _plain(self, row: Any) -> Any:
        """A row without the columns that name its domain and its task."""
        routing = None if self.table is None else self.table.routing
        dropped = {DOMAIN} | (set() if routing is None else {routing.column})
        return _without(row, dropped - self._read_columns)

    def _per_token(self, key: str, sources: Sequence[Any]) -> bool:
        """Whether each token has a label; a vector of labels may be as long as a row by chance."""
        if self._token_labels.get(key, True):
            self._token_labels[key] = all(has_token_labels(row, key) for row in sources)
        return self._token_labels[key]


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


def dataset_name(stream: str) -> str:
    """What a stream's dataset is called in messages."""
    return "target_dataset" if stream == TARGET else f"dataset of the stream {stream!r}"


def missing_columns_message(
    missing: Sequence[str], found: Sequence[str], stream: str = TARGET
) -> str:
    """What to say of a stream that lacks columns of the training rows."""
    return (
        f"The {dataset_name(stream)} lacks the column(s) {', '.join(map(repr, missing))} that the "
        f"train_dataset gives the model; it has {', '.join(map(repr, found))}. Prepare (tokenise) "
        "the target as the source was, for example "
        "`target.map(same_function, remove_columns=...)`; labels may be left out, and are named by "
        "TrainingArguments(label_names=[...])."
    )


def _name(collator: Any) -> str:
    """What the user calls a collator that others wrap."""
    own = getattr(collator, "__dict__", {})
    inner = own.get("collator", own.get("data_collator"))
    if inner is not None:
        return _name(inner)
    return str(getattr(collator, "__name__", type(collator).__name__))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _value(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else None


def _without(row: Any, columns: Collection[str]) -> Any:
    if isinstance(row, Mapping) and any(name in row for name in columns):
        return {key: value for key, value in row.items() if key not in columns}
    return row


def _unchanged(value: Any) -> Any:
    return value
