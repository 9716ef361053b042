"""Rows of further streams that travel with the training rows.

Each training row brings its companions along, so a script's batch size, epoch, sampler and resume
go on meaning what they meant before a stream was added.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hf_adapt.engine.auxiliary import seed_for
from hf_adapt.engine.streams import TARGET


@dataclass
class PairedRow:
    """A training row and the rows of other streams that it brings along, as (domain, row)."""

    source: Any
    companions: list[tuple[int, Any]]


@dataclass(eq=False)
class StreamRows:
    """The rows of one stream, as they are paired.

    Attributes:
        datasets: Its datasets, which take turns.
        ratio: Rows per training row; fractions are allowed (0.5: every second row).
        first_domain: The domain number of its first dataset; those of the others follow.
        name: The stream's name.
    """

    datasets: Sequence[Any]
    ratio: float = 1.0
    first_domain: int = 1
    name: str = TARGET

    def seed(self, seed: int) -> int:
        """The seed of its order: each stream has one of its own."""
        return seed if self.name == TARGET else seed_for(self.name, seed)

    def span(self, index: int) -> range:
        """Which positions of the stream the training row of this number brings along."""
        return range(int(index * self.ratio), int((index + 1) * self.ratio))


def rows_at(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """Rows of a map-style dataset, by its batched access where it has one."""
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(list(indices)))
    return [dataset[i] for i in indices]


def stream_order(
    sizes: Sequence[int], start: int, stop: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows stand at positions `start` to `stop` of an endless stream.

    Its datasets take turns; each is gone through in one random permutation after another, so every
    row is used equally often, whatever the sizes. A pure function of its arguments.

    Args:
        sizes: Number of rows of each dataset.
        start: First position.
        stop: One past the last position.
        seed: Seed of the permutations.

    Returns:
        For each position the dataset's index and the row in it.

    Example:
        >>> which, row = stream_order([3, 2], 0, 12, seed=0)
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


def shared_counter() -> torch.Tensor:
    """An epoch that persistent workers see too, although they hold copies of the dataset."""
    counter: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
    return counter


class PairedDataset(torch.utils.data.Dataset[PairedRow]):
    """A map-style source whose row i brings rows of other streams along.

    Which rows is a pure function of (seed, epoch, i): the order in which a sampler visits the
    source, the number of workers and of processes, and resuming change nothing.

    Args:
        source: Map-style dataset of the training rows.
        streams: The streams, of map-style datasets.
        seed: Seed of the pairing.
    """

    def __init__(self, source: Any, streams: Sequence[StreamRows], seed: int) -> None:
        self.source = source
        self.streams = list(streams)
        self.seed = seed
        self._epoch = shared_counter()
        self._orders: tuple[int, list[tuple[np.ndarray, np.ndarray]]] | None = None

    def __len__(self) -> int:
        """Number of training rows."""
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        # A user's own loader may ask the dataset for its labels, weights or lengths.
        if name.startswith("__") or "source" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.source, name)

    def set_epoch(self, epoch: int) -> None:
        """Draw other rows from here on."""
        self._epoch.fill_(epoch)
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(epoch)

    def _order_of(self, stream: StreamRows, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        per_epoch = int(len(self) * stream.ratio)
        sizes = [len(dataset) for dataset in stream.datasets]
        start = epoch * per_epoch
        return stream_order(sizes, start, start + per_epoch, stream.seed(self.seed))

    def _companions_of(self, index: int) -> list[list[tuple[int, int]]]:
        """For each stream (dataset, row) of each row that this training row brings along."""
        epoch = int(self._epoch)
        if self._orders is None or self._orders[0] != epoch:
            self._orders = (epoch, [self._order_of(stream, epoch) for stream in self.streams])
        return [
            [(int(which[i]), int(row[i])) for i in stream.span(index)]
            for stream, (which, row) in zip(self.streams, self._orders[1], strict=True)
        ]

    def __getitem__(self, index: int) -> PairedRow:
        """The training row and its companions."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[PairedRow]:
        """Several rows at once: a `datasets.Dataset` reads them in one go."""
        indices = [int(i) for i in indices]
        wanted = [self._companions_of(i) for i in indices]
        companions: list[list[tuple[int, Any]]] = [[] for _ in indices]
        for number, stream in enumerate(self.streams):
            fetched: dict[int, Iterator[Any]] = {}
            for which, dataset in enumerate(stream.datasets):
                rows = [row for each in wanted for w, row in each[number] if w == which]
                fetched[which] = iter(rows_at(dataset, rows) if rows else [])
            for found, each in zip(companions, wanted, strict=True):
                found += [(stream.first_domain + w, next(fetched[w])) for w, _ in each[number]]
        return list(map(PairedRow, self._source_rows(indices), companions))

    def _source_rows(self, indices: Sequence[int]) -> list[Any]:
        return rows_at(self.source, indices)


class PairedHfDataset(PairedDataset, datasets.Dataset):  # type: ignore[misc]  # untyped
    """A `datasets.Dataset` that brings companions along, and is else the one it was made from.

    Only a DataLoader, which fetches rows by `__getitems__`, is given pairs. Whoever reads it by
    row or column (a sampler, a user's own loader code, a Trainer that accepts nothing but a
    `datasets.Dataset`) finds the training rows.
    """

    def __init__(self, source: datasets.Dataset, streams: Sequence[StreamRows], seed: int) -> None:
        self.__dict__.update(source.__dict__)
        super().__init__(source, streams, seed)

    __len__ = datasets.Dataset.__len__
    __getitem__ = datasets.Dataset.__getitem__

    def _source_rows(self, indices: Sequence[int]) -> list[Any]:
        rows: list[Any] = datasets.Dataset.__getitems__(self, list(indices))
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> PairedHfDataset:
        # Methods that remove a column or change the format copy first: the copy is paired with
        # the same streams and hears of the same epoch.
        for shared in (self.source, self.streams, self._epoch):
            memo[id(shared)] = shared
        clone = type(self).__new__(type(self))
        clone.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return clone


class PairedIterableDataset(IterableDataset[PairedRow]):
    """A streaming source zipped with other streams, streaming or map-style.

    A dataset of theirs that ends before the source is started again.
    """

    def __init__(self, source: Iterable[Any], streams: Sequence[StreamRows], seed: int) -> None:
        self.source = source
        self.streams = list(streams)
        self.seed = seed
        self._epoch = shared_counter()

    def __len__(self) -> int:
        """Number of training rows, where the source knows it."""
        return len(self.source)  # type: ignore[arg-type]  # raises TypeError where it does not

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the streams again, where they can be shuffled."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[PairedRow]:
        """Pair the streams; each DataLoader worker pairs its own share."""
        epoch = int(self._epoch)
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(epoch)
        companions = [self._turns(stream, epoch) for stream in self.streams]
        for index, row in enumerate(self.source):
            paired = PairedRow(row, [])
            for stream, turns in zip(self.streams, companions, strict=True):
                paired.companions += [next(turns) for _ in stream.span(index)]
            yield paired

    def _turns(self, stream: StreamRows, epoch: int) -> Iterator[tuple[int, Any]]:
        """The rows of a stream, whose datasets take turns, with their domains."""
        endless = [self._endless(stream, i, epoch) for i in range(len(stream.datasets))]
        while True:
            for which, rows in enumerate(endless):
                yield stream.first_domain + which, next(rows)

    def _endless(self, stream: StreamRows, index: int, epoch: int) -> Iterator[Any]:
        worker, dataset = get_worker_info(), stream.datasets[index]
        if is_map_style(dataset):
            seed = stream.seed(self.seed) + 7919 * (worker.id if worker else 0)
            cycle = epoch << 20  # each epoch starts at permutations of its own
            while True:
                span = (cycle * len(dataset), (cycle + 1) * len(dataset))
                _, rows = stream_order([len(dataset)], *span, seed=seed + index)
                for row in rows:
                    yield dataset[int(row)]
                cycle += 1
        repeat, gave_rows = 0, False
        while True:
            if callable(set_epoch := getattr(dataset, "set_epoch", None)):
                set_epoch((epoch << 20) + repeat)
            empty = True
            for row in dataset:
                empty, gave_rows = False, True
                yield row
            if empty and gave_rows:
                raise ValueError(
                    f"The {stream.name} stream {index} has ended and cannot be read again, as a "
                    "generator cannot. Make it map-style "
                    "(`datasets.Dataset.from_list(list(itertools.islice(target, 10_000)))`), or a "
                    "stream whose __iter__ begins again."
                )
            if empty:
                place = f" in worker {worker.id} of {worker.num_workers}" if worker else ""
                raise ValueError(
                    f"The {stream.name} stream {index} gave no row{place}: it is empty, or has "
                    "fewer shards than there are workers (use a smaller dataloader_num_workers or "
                    "reshard the stream), or a 'domain' column has no other value than the "
                    "source's."
                )
            repeat += 1


class PairedHfIterableDataset(PairedIterableDataset, datasets.IterableDataset):  # type: ignore[misc]  # untyped
    """A paired stream that passes for the `datasets.IterableDataset` it was made from.

    For Trainers that accept nothing else (sentence-transformers').
    """

    n_shards = num_shards = 0  # else accelerate would make a plain stream of some of the shards

    def __init__(
        self, source: datasets.IterableDataset, streams: Sequence[StreamRows], seed: int
    ) -> None:
        self.__dict__.update(source.__dict__)
        super().__init__(source, streams, seed)


def is_map_style(dataset: Any) -> bool:
    """Whether rows are read by index (else the dataset is a stream)."""
    return (
        not isinstance(dataset, IterableDataset)
        and hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
    )


def pair(
    source: Any, streams: Sequence[StreamRows], seed: int, keeps_type: bool = False
) -> PairedDataset | PairedIterableDataset:
    """Pair the training rows with other streams, map-style or streaming as they are.

    Args:
        source: The training rows.
        streams: The other streams.
        seed: Seed of the pairing.
        keeps_type: Whether a paired `datasets.IterableDataset` must still be one.

    Raises:
        ValueError: If the source is map-style and a stream's dataset is not.
    """
    if keeps_type and isinstance(source, datasets.IterableDataset):
        return PairedHfIterableDataset(source, streams, seed)
    if not is_map_style(source):
        return PairedIterableDataset(source, streams, seed)
    for stream in streams:
        if not all(is_map_style(dataset) for dataset in stream.datasets):
            raise ValueError(
                f"A map-style train_dataset is paired with {stream.name} rows by index, and a "
                f"{stream.name} dataset is a stream. Make it map-style "
                "(`datasets.Dataset.from_list(list(itertools.islice(target, 10_000)))`), or stream "
                "the source too (`train_dataset.to_iterable_dataset()` of a datasets.Dataset, with "
                "max_steps)."
            )
    if isinstance(source, datasets.Dataset):
        return PairedHfDataset(source, streams, seed)
    return PairedDataset(source, streams, seed)
