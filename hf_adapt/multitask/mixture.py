"""Several data sets as one, in shares that are kept exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback

from hf_adapt.engine.auxiliary import seed_for
from hf_adapt.engine.pairing import is_map_style, rows_at, shared_counter, stream_order
from hf_adapt.engine.streams import check_rows
from hf_adapt.multitask.sampling import annealed_temperature, mixing_probabilities, quotas

Shares = Callable[[Sequence[int], int], list[float]]
"""How often each data set is drawn from, by their sizes and the number of the epoch."""

Sampling = str | Mapping[str, float] | Shares
Process = Callable[[Any], Any]


def temperature(value: float) -> Shares:
    """Shares by a power of the sizes: see [`mixing_probabilities`].

    Example:
        >>> [round(share, 2) for share in temperature(2)([1, 81], 0)]
        [0.1, 0.9]
    """
    return lambda sizes, epoch: mixing_probabilities(sizes, value)


def annealed(epochs: int, least: float = 0.2) -> Shares:
    """Shares that go from proportional towards equal: see [`annealed_temperature`].

    Args:
        epochs: The number of epochs of the training; later ones are as the last.
        least: The power of the sizes in the last epoch.

    Example:
        >>> shares = annealed(epochs=2, least=0.0)
        >>> [round(share, 2) for share in shares([1, 9], 0)], shares([1, 9], 1)
        ([0.1, 0.9], [0.5, 0.5])
    """
    annealed_temperature(1, epochs, least)  # refuses what is out of range
    return lambda sizes, epoch: mixing_probabilities(
        sizes, annealed_temperature(min(epoch + 1, epochs), epochs, least)
    )


def mix(
    datasets: Mapping[str, Any],
    sampling: Sampling = "proportional",
    size: int | None = None,
    processing: Mapping[str, Process] | None = None,
    column: str | None = "task",
    seed: int = 0,
) -> Mixture | StreamedMixture:
    """Several data sets as one `train_dataset`, in shares that each epoch keeps exactly.

    Which row stands at which place is a pure function of (seed, epoch, place), so that the number
    of workers and of processes, and resuming, change nothing. The rows of a data set are gone
    through in one random order after another, over the epochs too: each is used equally often. The
    shares are kept all along the epoch, not on average: any hundred rows have them, to within one
    row of each data set. A Trainer shuffles the places of a map-style mixture, as it does any rows.

    The plain Trainer does not tell its rows the epoch where it resumes in the middle of one: give
    it an [`EpochCallback`]. With an adaptation it is not needed.

    Args:
        datasets: The data sets by the names of their tasks, all map-style or all streams. Rows have
            the columns of one collator.
        sampling: `"proportional"` to their sizes, `"equal"`, [`temperature`]`(2)`,
            [`annealed`]`(epochs)`, or a share for each name; shares add up to 1.
        size: Rows of an epoch; by default as many as there are in all data sets together. Streams
            need it.
        processing: What is made of the rows of a task, as they are read.
        column: The column of the task's name, or None.
        seed: Seed of the order.

    Raises:
        TypeError: If something is no data set.
        ValueError: If there is none, one is empty, shares do not add up, or names differ.

    Example:
        >>> rows = {"big": [{"x": i} for i in range(90)], "small": [{"x": -i} for i in range(10)]}
        >>> mixture = mix(rows, sampling={"big": 0.5, "small": 0.5}, size=60)
        >>> print(mixture)
        Mixture of 2 tasks, 60 rows in an epoch:
          big    30 rows  50.0%  0.33 passes over 90
          small  30 rows  50.0%  3.00 passes over 10
        >>> [row["task"] for row in mixture][:4]
        ['big', 'small', 'big', 'small']
    """
    if not datasets:
        raise ValueError("mix() needs data sets by the names of their tasks, and got none.")
    for name, dataset in datasets.items():
        check_rows(dataset, f"datasets[{name!r}]")
    for what, given in (("processing", processing), ("sampling", sampling)):
        names = set(given) if isinstance(given, Mapping) else set()
        if unknown := sorted(names - datasets.keys()):
            raise ValueError(
                f"{what} names {', '.join(unknown)}, and the data sets are {', '.join(datasets)}."
            )
    streams = [name for name, dataset in datasets.items() if not is_map_style(dataset)]
    given_all = (datasets, processing or {}, column, seed)
    if not streams:
        return Mixture(*given_all, sampling=sampling, size=size)
    if len(streams) < len(datasets):
        others = ", ".join(name for name in datasets if name not in streams)
        raise ValueError(
            f"{', '.join(streams)} are streams and {others} are not. Make all of them streams "
            "(dataset.to_iterable_dataset()), or all map-style."
        )
    if size is None or not (sampling == "equal" or isinstance(sampling, Mapping)):
        raise ValueError(
            "The sizes of streams are not known: pass size=, the rows of an epoch, and sampling="
            "'equal' or a share for each."
        )
    return StreamedMixture(*given_all, sampling=sampling, size=size)


class _Plan:
    """Which task stands at each place of an epoch."""

    def __init__(
        self,
        datasets: Mapping[str, Any],
        processing: Mapping[str, Process],
        column: str | None,
        seed: int,
        sampling: Sampling,
        size: int | None,
    ) -> None:
        self.datasets = dict(datasets)
        self.names = list(datasets)
        self.processing, self.column, self.seed = dict(processing), column, seed
        self.sampling = sampling
        known = [len(d) if is_map_style(d) else 1 for d in datasets.values()]
        if 0 in known:
            raise ValueError(
                f"The data set {self.names[known.index(0)]!r} is empty (often the result of a "
                "filter or of a wrong split name)."
            )
        self.known_sizes = known
        self.size = sum(known) if size is None else size
        if self.size < 1:
            raise ValueError(f"size={size} must be at least 1: the rows of an epoch.")
        self.epoch = shared_counter()
        self.quotas(0)  # refuses shares that do not add up

    def quotas(self, epoch: int) -> list[int]:
        """The rows of each task in an epoch."""
        return quotas(self._shares(epoch), self.size)

    def _shares(self, epoch: int) -> list[float]:
        if callable(self.sampling):
            return self.sampling(self.known_sizes, epoch)
        if isinstance(self.sampling, Mapping):
            return [float(self.sampling.get(name, 0.0)) for name in self.names]
        if self.sampling == "proportional":
            return mixing_probabilities(self.known_sizes)
        if self.sampling == "equal":
            return [1 / len(self.names)] * len(self.names)
        raise ValueError(
            f"sampling={self.sampling!r} is unknown: use 'proportional', 'equal', temperature(T), "
            "annealed(epochs), or a dict with a share for each data set."
        )

    def tasks(self, epoch: int) -> np.ndarray:
        """(size,) the number of the task at each place: occurrence j of q at (j + ½) / q."""
        counts = self.quotas(epoch)
        places = np.concatenate([(np.arange(q) + 0.5) / max(q, 1) for q in counts])
        owners = np.repeat(np.arange(len(counts)), counts)
        return owners[np.lexsort((owners, places))]

    def row(self, task: int, row: Any) -> Any:
        """A row as it is given away."""
        name = self.names[task]
        if name in self.processing:
            row = self.processing[name](row)
        return row if self.column is None else {**row, self.column: name}

    def first_rows(self, name: str, number: int) -> list[Any]:
        """Some rows of a task, as they are given away."""
        data, task = self.datasets[name], self.names.index(name)
        if is_map_style(data):
            rows = rows_at(data, range(min(number, len(data))))
        else:
            rows = list(itertools.islice(iter(data), number))
        return [self.row(task, row) for row in rows]

    def __str__(self) -> str:
        counts = self.quotas(int(self.epoch))
        width = max(map(len, self.names))
        digits = max(len(str(count)) for count in counts)
        lines = [f"Mixture of {len(self.names)} tasks, {self.size} rows in an epoch:"]
        for name, count in zip(self.names, counts, strict=True):
            data = self.datasets[name]
            passes = ""
            if is_map_style(data):
                passes = f"  {count / len(data):.2f} passes over {len(data)}"
            lines.append(
                f"  {name:{width}}  {count:>{digits}} rows  {count / self.size:.1%}{passes}"
            )
        return "\n".join(lines)


class Mixture(_Plan, torch.utils.data.Dataset[Any]):
    """Map-style data sets as one: see [`mix`]."""

    _order: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Go on with the rows of this epoch."""
        self.epoch.fill_(epoch)

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """The task and the row at each place of the epoch under way."""
        epoch = int(self.epoch)
        if self._order is None or self._order[0] != epoch:
            tasks = self.tasks(epoch)
            rows = np.empty(self.size, dtype=np.int64)
            earlier = [self.quotas(each) for each in range(epoch)]
            starts = [sum(counts) for counts in zip(*earlier, strict=True)] or [0] * len(self.names)
            for task, name in enumerate(self.names):
                mine = tasks == task
                start, seed = starts[task], seed_for(name, self.seed)
                span = (start, start + int(mine.sum()))
                rows[mine] = stream_order([self.known_sizes[task]], *span, seed)[1]
            self._order = (epoch, tasks, rows)
        return self._order[1:]

    def __getitem__(self, index: int) -> Any:
        """The row at a place."""
        if not -self.size <= index < self.size:
            raise IndexError(f"{index} is none of the {self.size} rows.")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several rows at once: a `datasets.Dataset` reads them in one go."""
        tasks, rows = self._places()
        found: list[Any] = [None] * len(indices)
        for task, name in enumerate(self.names):
            mine = [n for n, index in enumerate(indices) if tasks[index] == task]
            chosen = [int(rows[indices[n]]) for n in mine]
            read = rows_at(self.datasets[name], chosen) if mine else []
            for n, row in zip(mine, read, strict=True):
                found[n] = self.row(task, row)
        return found


class StreamedMixture(_Plan, IterableDataset[Any]):
    """Streams as one: see [`mix`]. One that ends is started again.

    Each of several DataLoader workers reads all rows and gives away its share.
    """

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Go on with the rows of this epoch."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        """The rows of the epoch under way."""
        epoch, worker = int(self.epoch), get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        endless = [self._endless(name, epoch) for name in self.names]
        for place, task in enumerate(self.tasks(epoch)):
            row = next(endless[task])
            if place % workers == number:
                yield self.row(int(task), row)

    def _endless(self, name: str, epoch: int) -> Iterator[Any]:
        dataset = self.datasets[name]
        for again in itertools.count():
            if callable(set_epoch := getattr(dataset, "set_epoch", None)):
                set_epoch((epoch << 20) + again)
            empty = True
            for row in dataset:
                empty = False
                yield row
            if empty:
                raise ValueError(
                    f"The stream {name!r} gave no row{' the second time' if again else ''}: it is "
                    "empty, or cannot be read again, as a generator cannot."
                )


class EpochCallback(TrainerCallback):
    """Tells the training rows of a plain Trainer which epoch it is, also where it resumes.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=mix(tasks), callbacks=[EpochCallback()])
        ```
    """

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Set the epoch."""
        set_epoch = getattr(getattr(train_dataloader, "dataset", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(int(state.epoch or 0))
