"""Target rows that travel with source rows.

Each source row brings its target rows along, so a script's batch size, epoch, sampler and resume
go on meaning what they meant before a target was added.
"""

from __future__ import annotations

import copy
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hf_adapt.engine.labels import IGNORED, has_token_labels, label_of, length_of

DOMAIN = "domain"
"""The column that says which domain a row is from: 0 is the source."""

TARGET_BATCH = "hf_adapt_target"
"""The key of the target rows' own batch where source and target go through the model apart."""

COLUMNS = "hf_adapt_columns"
"""The key of the columns that adaptations want to see and the model must not."""

UNPAIRED = (
    "A training batch came without its target rows: the Trainer's get_train_dataloader() does not "
    "read self.train_dataset, which hf_adapt pairs with the target, or makes another dataset of "
    "it (select, filter, map, a wrapper). Build the DataLoader from self.train_dataset and "
    "self.data_collator, and prepare the rows before the Trainer is made."
)
"""What to say of rows or batches that come without their target rows."""

TargetForward = Literal["joint", "separate"]


@dataclass
class PairedRow:
    """A source row and the target rows it brings along, as (domain, row)."""

    source: Any
    targets: list[tuple[int, Any]]


def rows_at(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """Rows of a map-style dataset, by its batched access where it has one."""
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(list(indices)))
    return [dataset[i] for i in indices]


def target_order(
    sizes: Sequence[int], start: int, stop: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which target rows stand at positions `start` to `stop` of the endless target stream.

    The targets take turns; each is gone through in one random permutation after another, so every
    row is used equally often, whatever the sizes. A pure function of its arguments.

    Args:
        sizes: Number of rows of each target.
        start: First position.
        stop: One past the last position.
        seed: Seed of the permutations.

    Returns:
        For each position the target's index (0 for the first target) and the row in it.

    Example:
        >>> which, row = target_order([3, 2], 0, 12, seed=0)
        >>> which.tolist()
        [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
        >>> sorted(row[which == 0].tolist())
        [0, 0, 1, 1, 2, 2]
    """
    positions = np.arange(start, stop)
    which, turn = positions % len(sizes), positions // len(sizes)
    row = np.empty(len(positions), dtype=np.int64)
    for index, size in enumerate(sizes):
        mine = which == index
        cycles, offsets = turn[mine] // size, turn[mine] % size
        _, starts = np.unique(cycles, return_index=True)  # cycles are ascending: one run each
        picked = []
        for span in np.split(np.arange(len(cycles)), starts[1:]) if len(cycles) else []:
            cycle = int(cycles[span[0]])
            permutation = np.random.default_rng((seed, index, cycle)).permutation(size)
            picked.append(permutation[offsets[span]])
        row[mine] = np.concatenate(picked) if picked else 0
    return which, row


def _shared_counter() -> torch.Tensor:
    """An epoch that persistent workers see too, although they hold copies of the dataset."""
    counter: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
    return counter


class PairedDataset(torch.utils.data.Dataset[PairedRow]):
    """A map-style source whose row i brings target rows along.

    Which rows is a pure function of (seed, epoch, i): the order in which a sampler visits the
    source, the number of workers and of processes, and resuming change nothing.

    Args:
        source: Map-style dataset of the source rows.
        targets: Map-style datasets of the target domains, which take turns.
        ratio: Target rows per source row; fractions are allowed (0.5: every second row).
        seed: Seed of the pairing.
    """

    def __init__(self, source: Any, targets: Sequence[Any], ratio: float, seed: int) -> None:
        self.source = source
        self.targets = list(targets)
        self.ratio = ratio
        self.seed = seed
        self._epoch = _shared_counter()
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Number of source rows."""
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        # An author's own loader may ask the dataset for its labels, weights or lengths.
        if name.startswith("__") or "source" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.source, name)

    def set_epoch(self, epoch: int) -> None:
        """Draw other target rows from here on."""
        self._epoch.fill_(epoch)

    def _targets_of(self, index: int) -> list[tuple[int, int]]:
        epoch = int(self._epoch)
        if self._order is None or self._order[0] != epoch:
            per_epoch = int(len(self) * self.ratio)
            sizes = [len(target) for target in self.targets]
            start = epoch * per_epoch
            self._order = (epoch, *target_order(sizes, start, start + per_epoch, self.seed))
        _, which, row = self._order
        span = range(int(index * self.ratio), int((index + 1) * self.ratio))
        return [(int(which[i]), int(row[i])) for i in span]

    def __getitem__(self, index: int) -> PairedRow:
        """The source row and its target rows."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[PairedRow]:
        """Several rows at once: a `datasets.Dataset` reads them in one go."""
        indices = [int(i) for i in indices]
        wanted = [self._targets_of(i) for i in indices]
        fetched: dict[int, Iterator[Any]] = {}
        for which, target in enumerate(self.targets):
            rows = [row for pairs in wanted for w, row in pairs if w == which]
            fetched[which] = iter(rows_at(target, rows) if rows else [])
        return [
            PairedRow(source, [(which + 1, next(fetched[which])) for which, _ in pairs])
            for source, pairs in zip(self._source_rows(indices), wanted, strict=True)
        ]

    def _source_rows(self, indices: Sequence[int]) -> list[Any]:
        return rows_at(self.source, indices)


class PairedHfDataset(PairedDataset, datasets.Dataset):  # type: ignore[misc]  # untyped
    """A `datasets.Dataset` that brings target rows along, and is else the one it was made from.

    Only a DataLoader, which fetches rows by `__getitems__`, is given pairs. Whoever reads it by
    row or column (a sampler, an author's own loader code, a Trainer that accepts nothing but a
    `datasets.Dataset`) finds the source.
    """

    def __init__(
        self, source: datasets.Dataset, targets: Sequence[Any], ratio: float, seed: int
    ) -> None:
        self.__dict__.update(source.__dict__)
        super().__init__(source, targets, ratio, seed)

    __len__ = datasets.Dataset.__len__
    __getitem__ = datasets.Dataset.__getitem__

    def _source_rows(self, indices: Sequence[int]) -> list[Any]:
        rows: list[Any] = datasets.Dataset.__getitems__(self, list(indices))
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> PairedHfDataset:
        # Methods that remove a column or change the format copy first: the copy is paired with
        # the same targets and hears of the same epoch.
        for shared in (self.source, self.targets, self._epoch):
            memo[id(shared)] = shared
        clone = type(self).__new__(type(self))
        clone.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return clone


class PairedIterableDataset(IterableDataset[PairedRow]):
    """A streaming source zipped with target streams (or map-style targets).

    A target stream that ends before the source is started again.
    """

    def __init__(
        self, source: Iterable[Any], targets: Sequence[Any], ratio: float, seed: int
    ) -> None:
        self.source = source
        self.targets = list(targets)
        self.ratio = ratio
        self.seed = seed
        self._epoch = _shared_counter()

    def __len__(self) -> int:
        """Number of source rows, where the source knows it."""
        return len(self.source)  # type: ignore[arg-type]  # raises TypeError where it does not

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the streams anew, where they can be shuffled."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[PairedRow]:
        """Pair the streams; each DataLoader worker pairs its own share."""
        epoch = int(self._epoch)
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(epoch)
        streams = [self._endless(i, target, epoch) for i, target in enumerate(self.targets)]
        turn = 0
        for index, row in enumerate(self.source):
            targets = []
            for _ in range(int(index * self.ratio), int((index + 1) * self.ratio)):
                which = turn % len(streams)
                targets.append((which + 1, next(streams[which])))
                turn += 1
            yield PairedRow(row, targets)

    def _endless(self, index: int, target: Any, epoch: int) -> Iterator[Any]:
        worker = get_worker_info()
        if is_map_style(target):
            seed = self.seed + 7919 * (worker.id if worker else 0)
            cycle = epoch << 20  # each epoch starts at permutations of its own
            while True:
                span = (cycle * len(target), (cycle + 1) * len(target))
                _, rows = target_order([len(target)], *span, seed=seed + index)
                for row in rows:
                    yield target[int(row)]
                cycle += 1
        repeat, gave_rows = 0, False
        while True:
            if callable(set_epoch := getattr(target, "set_epoch", None)):
                set_epoch((epoch << 20) + repeat)
            empty = True
            for row in target:
                empty, gave_rows = False, True
                yield row
            if empty and gave_rows:
                raise ValueError(
                    f"The target stream {index} has ended and cannot be read again, as a generator "
                    "cannot. Make it map-style "
                    "(`datasets.Dataset.from_list(list(itertools.islice(target, 10_000)))`), or a "
                    "stream whose __iter__ begins anew."
                )
            if empty:
                place = f" in worker {worker.id} of {worker.num_workers}" if worker else ""
                raise ValueError(
                    f"The target stream {index} gave no row{place}: it is empty, or has fewer "
                    "shards than there are workers (use a smaller dataloader_num_workers or "
                    f"reshard the stream), or a {DOMAIN!r} column has no other value than the "
                    "source's."
                )
            repeat += 1


class PairedHfIterableDataset(PairedIterableDataset, datasets.IterableDataset):  # type: ignore[misc]  # untyped
    """A paired stream that passes for the `datasets.IterableDataset` it was made from.

    For Trainers that accept nothing else (sentence-transformers').
    """

    n_shards = num_shards = 0  # else accelerate would make a plain stream of some of the shards

    def __init__(
        self, source: datasets.IterableDataset, targets: Sequence[Any], ratio: float, seed: int
    ) -> None:
        self.__dict__.update(source.__dict__)
        super().__init__(source, targets, ratio, seed)


def is_map_style(dataset: Any) -> bool:
    """Whether rows are read by index (else the dataset is a stream)."""
    return (
        not isinstance(dataset, IterableDataset)
        and hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
    )


def pair(
    source: Any, targets: Sequence[Any], ratio: float, seed: int, keeps_type: bool = False
) -> PairedDataset | PairedIterableDataset:
    """Pair a source with its targets, map-style or streaming as the source is.

    Args:
        source: The source rows.
        targets: The target domains.
        ratio: Target rows per source row.
        seed: Seed of the pairing.
        keeps_type: Whether a paired `datasets.IterableDataset` must still be one.

    Raises:
        ValueError: If the source is map-style and a target is a stream.
    """
    if keeps_type and isinstance(source, datasets.IterableDataset):
        return PairedHfIterableDataset(source, targets, ratio, seed)
    if not is_map_style(source):
        return PairedIterableDataset(source, targets, ratio, seed)
    if not all(is_map_style(target) for target in targets):
        raise ValueError(
            "A map-style train_dataset is paired with target rows by index, and a target_dataset "
            "is a stream. Make the target map-style "
            "(`datasets.Dataset.from_list(list(itertools.islice(target, 10_000)))`), or stream the "
            "source too (`train_dataset.to_iterable_dataset()` of a datasets.Dataset, with "
            "max_steps)."
        )
    if isinstance(source, datasets.Dataset):
        return PairedHfDataset(source, targets, ratio, seed)
    return PairedDataset(source, targets, ratio, seed)


def label_columns(label_names: Sequence[str], collator: Any) -> set[str]:
    """The columns that only say what is to be learnt from a row: a target row needs none."""
    # TRL's masks choose which tokens are labels; sentence-transformers' collator names its own.
    masks = ("completion_mask", "assistant_masks")
    declared = getattr(collator, "valid_label_columns", None) or ()
    return {*label_names, "label", "labels", "label_ids", *masks, *declared}


class PairedCollator:
    """Collates source and target rows as one batch with a `domain` column.

    The author's collator is called on all rows together, so they are padded alike; source rows
    come first. Labels of target rows are hidden (-100) before and after it: before, so that the
    columns agree; after, because a language-model collator makes labels from the tokens. A collator
    that cannot take -100 (one that looks labels up in a table) is given a source row's label for
    them instead, which is hidden afterwards.

    Args:
        collator: The author's collator.
        label_names: Names of label columns.
        use_target_labels: Keep the target's labels, for semi-supervised adaptation and domain
            generalisation.
        separate: Collate the target rows into a batch of their own under `TARGET_BATCH`.
        used: The columns that the author's collator is given; a target row may lack any other.
            None for all.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        label_names: Sequence[str],
        use_target_labels: bool = False,
        separate: bool = False,
        used: Collection[str] | None = None,
    ) -> None:
        self.collator = collator
        self.used = used
        self.own_label_names = {*label_names, "labels"}
        self._takes_hidden: bool | None = None
        self._token_labels: dict[str, bool] = {}
        self.label_names = label_columns(label_names, collator)
        self.use_target_labels = use_target_labels
        self.separate = separate

    def __getattr__(self, name: str) -> Any:
        # A Trainer may ask its collator for more than a batch (sentence-transformers does).
        if name.startswith("__") or "collator" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: list[PairedRow]) -> Any:
        """Collate paired rows.

        Raises:
            ValueError: If the rows come without their target rows.
        """
        if not all(isinstance(row, PairedRow) for row in rows):
            raise ValueError(UNPAIRED)
        sources = [_without_domain(row.source) for row in rows]
        domains, targets = [0] * len(sources), []
        for row in rows:
            for domain, target in row.targets:
                domains.append(domain)
                targets.append(self._target_row(_without_domain(target), sources))
        domain_column = torch.tensor(domains)
        if not self.separate:
            return self._collate(sources + targets, domain_column, sources[0])
        batch = self._collate(sources, domain_column[: len(sources)], sources[0])
        if targets:
            batch[TARGET_BATCH] = self._collate(targets, domain_column[len(sources) :], sources[0])
        return batch

    def _collated(self, rows: list[Any], domain: torch.Tensor, like: Any) -> Any:
        """The author's batch, its target rows labelled -100 or, where that fails, as `like` is."""
        hidden = isinstance(like, Mapping) and bool(domain.any()) and not self.use_target_labels
        names = [key for key in like if key in self.label_names] if hidden else []
        if not names or self._takes_hidden:
            return self.collator(rows)
        stand_ins = [
            {**row, **{name: self._stand_in(like, row, name) for name in names}} if d else row
            for row, d in zip(rows, domain.tolist(), strict=True)
        ]
        if self._takes_hidden is False:
            return self.collator(stand_ins)
        try:
            batch = self.collator(copy.deepcopy(rows))  # it may change them before it fails
        except Exception as error:
            try:
                batch = self.collator(stand_ins)
            except Exception:
                raise error from None  # it is not the label
            self._takes_hidden = False
            if not self.separate and not self.label_names & set(batch):
                raise ValueError(
                    f"The data collator {_name(self.collator)} cannot collate target rows "
                    f"labelled {IGNORED} ({type(error).__name__}: {error}), and its batch has none "
                    f"of the label columns {', '.join(sorted(self.own_label_names))}, in which "
                    "another label could be hidden again. Name its labels in "
                    "TrainingArguments(label_names=[...]), or pass target_forward='separate'."
                ) from error
        else:
            self._takes_hidden = True
        return batch

    def _stand_in(self, like: Mapping[str, Any], target: Mapping[str, Any], key: str) -> Any:
        """A label that a collator can read: the source row's, or its first one for each token."""
        label = like[key]
        if not self._token_labels.get(key):
            return label
        first = next((value for value in label if value != IGNORED), label[0])
        return label_of(label, first, length_of(target))

    def _collate(self, rows: list[Any], domain: torch.Tensor, like: Any) -> Any:
        batch = self._collated(rows, domain, like)
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
        if not self.use_target_labels and bool(domain.any()):
            for name in {*self.label_names, "shift_labels"} & set(sizes):
                if sizes[name] == len(rows):
                    self._hide(name, batch[name], domain)
        batch[DOMAIN] = domain
        return batch

    def _hide(self, name: str, labels: Any, domain: torch.Tensor) -> None:
        if _is_tensor(labels):
            labels[domain > 0] = IGNORED
        elif name in self.own_label_names and not self.separate:
            raise ValueError(
                f"The data collator {_name(self.collator)} makes a list of {name!r}, in which the "
                "labels of target rows cannot be hidden (object detection, for example). Pass "
                "target_forward='separate', which computes the loss on source rows alone."
            )

    def _target_row(self, target: Any, sources: Sequence[Any]) -> Any:
        """The target row with the source rows' columns, its labels hidden."""
        like = sources[0]
        if not isinstance(target, Mapping) or not isinstance(like, Mapping):
            return target
        row = {key: target[key] for key in like if key in target and self._keeps(key)}
        missing = [
            key
            for key in like
            if key not in row
            and key not in self.label_names
            and (self.used is None or key in self.used)
        ]
        if missing:
            raise ValueError(missing_columns_message(missing, list(target)))
        for key in like:
            if key in self.label_names and key not in row:
                length = length_of(target) if self._per_token(key, sources) else None
                row[key] = label_of(like[key], IGNORED, length)
        return row

    def _per_token(self, key: str, sources: Sequence[Any]) -> bool:
        """Whether each token has a label; a vector of labels may be as long as a row by chance."""
        if self._token_labels.get(key, True):
            self._token_labels[key] = all(has_token_labels(row, key) for row in sources)
        return self._token_labels[key]

    def _keeps(self, key: str) -> bool:
        return self.use_target_labels or key not in self.label_names


def missing_columns_message(missing: Sequence[str], found: Sequence[str]) -> str:
    """What to say of a target set that lacks columns of the source."""
    return (
        f"The target_dataset lacks the column(s) {', '.join(map(repr, missing))} that the "
        f"train_dataset gives the model; it has {', '.join(map(repr, found))}. Prepare (tokenise) "
        "the target as the source was, for example "
        "`target.map(same_function, remove_columns=...)`; labels may be left out, and are told by "
        "TrainingArguments(label_names=[...])."
    )


def _name(collator: Any) -> str:
    """What the author calls a collator that others wrap."""
    own = getattr(collator, "__dict__", {})
    inner = own.get("collator", own.get("data_collator"))
    if inner is not None:
        return _name(inner)
    return str(getattr(collator, "__name__", type(collator).__name__))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _without_domain(row: Any) -> Any:
    if isinstance(row, Mapping) and DOMAIN in row:
        return {key: value for key, value in row.items() if key != DOMAIN}
    return row
