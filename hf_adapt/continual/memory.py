"""A memory of the past: the rows of earlier tasks that training goes on to see."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from hf_adapt.continual.row_choice import (
    LOGITS,
    Policy,
    as_dataset,
    check_options,
    classes_of,
    drawn,
    model_ranks,
    rank_of,
    row_hash,
    shares,
    shown,
)
from hf_adapt.continual.row_outputs import row_outputs
from hf_adapt.engine.pairing import is_map_style
from hf_adapt.engine.streams import check_rows
from hf_adapt.storage.text_file import write_text

if TYPE_CHECKING:
    from transformers import Trainer


FILE, ROWS = "memory.json", "rows"


@dataclass(frozen=True)
class ReplayMemory:
    """Some rows of earlier tasks, chosen so that it matters neither how nor where they were read.

    Each row has a rank, and a memory keeps those of the lowest ranks, so that a smaller memory is a
    part of a larger one. With `"random"` and `"balanced"` a row's content decides its rank: the
    order of the rows does not matter, and two halves of a data set, made in two processes and
    merged, are a memory of the whole.

    Reference:
        Rebuffi et al. 2017, "iCaRL", Alg. 4, arXiv:1611.07725 (herding); Vitter 1985, "Random
        sampling with a reservoir".
        Deviation: in place of a reservoir, the rows whose hashes are smallest, which is as uniform
        and needs no random state.

    Args:
        dataset: The rows.
        ranks: The rank of each row within its task and class; lower ones are kept.
        tasks: The task of each row.
        classes: The class of each row, where classes are balanced; else empty.
        hashes: The hash of each row's content.
        policy: How ranks are made.
        seed: Seed of the ranks.

    Example:
        >>> old = datasets.Dataset.from_dict({"input_ids": [[i] for i in range(50)]})
        >>> memory = ReplayMemory.from_dataset(old, size=5)
        >>> backwards = ReplayMemory.from_dataset(old.select(range(49, -1, -1)), size=5)
        >>> len(memory), memory.fingerprint == backwards.fingerprint
        (5, True)
    """

    dataset: datasets.Dataset
    ranks: Sequence[int | float]
    tasks: Sequence[str]
    classes: Sequence[str]
    hashes: Sequence[str]
    policy: Policy = "random"
    seed: int = 0

    @classmethod
    def from_dataset(
        cls,
        old: Any,
        size: int,
        policy: Policy = "random",
        by: str | None = None,
        task: str = "",
        seed: int = 0,
        trainer: Trainer | None = None,
        logits: bool = False,
    ) -> ReplayMemory:
        """Choose rows of a data set; equal ones are taken once.

        Args:
            old: The rows of the old task, prepared as the Trainer's `train_dataset` will be.
            size: How many to keep; all, where there are not as many.
            policy: `"random"`: every row is as likely. `"balanced"`: as many of each class.
                `"herding"`: of each class the rows whose mean feature is nearest to that of all.
                `"surprise"`: the rows with the largest loss. The last two need a `trainer`.
            by: The column of the classes, for `"balanced"` and `"herding"`; `labels` or `label`.
            task: A name of the task; a memory of several shares its size among them.
            seed: Seed of `"random"` and `"balanced"`.
            trainer: A Trainer with the model that knows the task.
            logits: Whether to store what that model predicts, for [`DarkReplay`].

        Raises:
            TypeError: If `old` is no data set.
            ValueError: If it is empty, or an option does not fit it.
        """
        if isinstance(old, Mapping | tuple):
            raise TypeError(
                f"old is a {type(old).__name__} of data sets: make a memory of each, with task=, "
                "and join them by ReplayMemory.merge."
            )
        check_rows(old, "old")
        check_options(policy, size, trainer, logits)
        if not is_map_style(old):
            old = drawn(old, size, policy, seed)
        rows = old if isinstance(old, datasets.Dataset) else as_dataset(old)
        if not len(rows):
            raise ValueError(
                "A memory needs rows, and the old data set is empty (often the result of a filter "
                "or of a wrong split name)."
            )
        balances = policy in ("balanced", "herding")
        hashes = [row_hash(row) for row in shown(rows)]
        places = sorted({own: n for n, own in reversed(list(enumerate(hashes)))}.values())
        if len(places) < len(rows):
            rows, hashes = rows.select(places), [hashes[place] for place in places]
        classes = classes_of(rows, by, policy) if balances else []
        ranks: Sequence[int | float] = [rank_of(each, seed) for each in hashes]
        if policy in ("herding", "surprise"):
            assert trainer is not None
            ranks = model_ranks(policy, trainer, rows, classes, size)
        whole = cls(rows, ranks, [task] * len(rows), classes, hashes, policy, seed)
        kept = whole.smaller(size)
        return kept.with_logits(trainer) if logits and trainer is not None else kept

    @classmethod
    def merge(cls, memories: Sequence[ReplayMemory], size: int | None = None) -> ReplayMemory:
        """One memory of several: of the tasks so far, or of parts of one data set.

        A row that an earlier memory has of the same task is taken once.

        Args:
            memories: The memories, made in the same way.
            size: How many rows to keep, shared equally among the tasks; all by default.

        Raises:
            ValueError: If they were made in different ways, or their columns differ.
        """
        if not memories:
            raise ValueError("merge() needs memories, and got none.")
        first = memories[0]
        for other in memories[1:]:
            if (other.policy, other.seed) != (first.policy, first.seed):
                raise ValueError(
                    f"Ranks of different policies cannot be compared: {first.policy!r} with seed "
                    f"{first.seed} and {other.policy!r} with seed {other.seed}. Make the memories "
                    "with the same policy and seed."
                )
            if set(other.dataset.column_names) != set(first.dataset.column_names):
                raise ValueError(
                    f"Memories of different columns cannot be merged: "
                    f"{first.dataset.column_names} and {other.dataset.column_names}. Prepare all "
                    "tasks' rows alike, with stored logits in all or in none."
                )
            if other.dataset.features != first.dataset.features:
                raise ValueError(
                    f"The columns of memories have different types: {first.dataset.features} and "
                    f"{other.dataset.features}. Cast one of them (dataset.cast)."
                )
        rows = datasets.concatenate_datasets([each.dataset for each in memories])
        rows.set_format(
            **{k: v for k, v in first.dataset.format.items() if k != "format_kwargs"},
            **first.dataset.format["format_kwargs"],
        )
        joined = cls(
            rows,
            [rank for each in memories for rank in each.ranks],
            [task for each in memories for task in each.tasks],
            [name for each in memories for name in each.classes],
            [own for each in memories for own in each.hashes],
            first.policy,
            first.seed,
        )
        joined = joined._at(_without_overlap(memories))
        return joined if size is None else joined.smaller(size)

    def __len__(self) -> int:
        """How many rows it has."""
        return len(self.dataset)

    def __getitem__(self, place: int) -> Any:
        """A row, so that a memory is a data set wherever one is taken."""
        return self.dataset[place]

    @property
    def fingerprint(self) -> str:
        """A hash of the rows and their logits, whatever their order."""
        items = list(self.hashes)
        if LOGITS in self.dataset.column_names:
            logits = self.dataset.with_format(None)[LOGITS]
            items = [f"{own}{value}" for own, value in zip(items, logits, strict=True)]
        return hashlib.blake2b("".join(sorted(items)).encode(), digest_size=12).hexdigest()

    def smaller(self, size: int) -> ReplayMemory:
        """The rows of the lowest ranks, equally many of each task and class as far as there are."""
        members: dict[str, dict[str, list[int]]] = {}
        for place, task in enumerate(self.tasks):
            name = self.classes[place] if self.classes else ""
            members.setdefault(task, {}).setdefault(name, []).append(place)
        by_task = [members[task] for task in sorted(members)]
        kept: list[int] = []
        sizes = shares([sum(map(len, own.values())) for own in by_task], size)
        for groups, number in zip(by_task, sizes, strict=True):
            classes = [groups[name] for name in sorted(groups)]
            for own, most in zip(classes, shares(list(map(len, classes)), number), strict=True):
                kept += sorted(own, key=lambda p: (self.ranks[p], self.hashes[p]))[:most]
        return self._at(kept)

    def _at(self, places: Sequence[int]) -> ReplayMemory:
        """Some of the rows, in the order of their hashes: which come when is their content's."""
        places = sorted(places, key=lambda place: (self.hashes[place], self.tasks[place]))
        return ReplayMemory(
            self.dataset.select(places),
            [self.ranks[p] for p in places],
            [self.tasks[p] for p in places],
            [self.classes[p] for p in places] if self.classes else [],
            [self.hashes[p] for p in places],
            self.policy,
            self.seed,
        )

    def with_logits(self, trainer: Trainer) -> ReplayMemory:
        """The same rows with what the Trainer's model predicts for them now.

        Raises:
            ValueError: If the model does not predict one vector for each row.
        """
        rows = self.dataset
        if LOGITS in rows.column_names:
            rows = rows.remove_columns(LOGITS)
        found = row_outputs(trainer, rows, "logits")
        return replace(self, dataset=rows.add_column(LOGITS, found.tolist()))

    # ---- on disk ----

    def save(self, folder: str | Path, rows: bool = True) -> None:
        """Write it to a folder.

        Args:
            folder: The folder; an earlier memory in it is replaced.
            rows: Whether to write the rows too. Without them, where texts must not be kept, it is
                read again with the data set that they are from. A transform (`with_transform`) is
                not written: set it again on the `dataset` of what is read.
        """
        folder = Path(folder)
        stored: dict[str, Any] = {
            "policy": self.policy,
            "seed": self.seed,
            **{n: list(getattr(self, n)) for n in ("ranks", "tasks", "classes", "hashes")},
        }
        if LOGITS in self.dataset.column_names:
            stored[LOGITS] = self.dataset.with_format(None)[LOGITS][:]
        earlier = list(folder.glob(f"{ROWS}-*"))
        if rows:
            # In a folder of their own: files cannot be replaced while a data set reads them.
            place = folder / f"{ROWS}-{uuid.uuid4().hex[:8]}"
            is_plain = self.dataset.format["type"] != "custom"  # a transform cannot be written
            (self.dataset if is_plain else self.dataset.with_format(None)).save_to_disk(str(place))
            stored["rows"] = place.name
        write_text(folder / FILE, json.dumps(stored))
        in_use = {str(Path(file["filename"]).parent) for file in self.dataset.cache_files}
        for place in earlier:
            if not rows or str(place.absolute()) not in in_use:
                shutil.rmtree(place, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path, dataset: Any = None) -> ReplayMemory:
        """Read what `save` has written.

        Args:
            folder: The folder.
            dataset: The data set that the rows are from, where they were not saved.

        Raises:
            FileNotFoundError: If the folder has no memory.
            ValueError: If rows are missing, or the file is something else.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {FILE}, which ReplayMemory.save() writes; a Trainer with Replay "
                "writes it in the folder replay_memory of each saved model."
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            names = ("ranks", "tasks", "classes", "hashes", "policy", "seed")
            options = {name: stored[name] for name in names}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no memory ({error!r}). Make it again: ReplayMemory.from_dataset."
            ) from error
        if dataset is not None:
            check_rows(dataset, "dataset")
            if not is_map_style(dataset):
                raise ValueError(
                    "The rows of a memory are looked up in their data set, and this one is a "
                    "stream. Make it map-style, or save the memory with its rows."
                )
            whole = dataset if isinstance(dataset, datasets.Dataset) else as_dataset(dataset)
            place_of = {row_hash(row): place for place, row in enumerate(shown(whole))}
            if missing := [each for each in stored["hashes"] if each not in place_of]:
                raise ValueError(
                    f"{len(missing)} of {len(stored['hashes'])} rows of the memory in {folder} are "
                    "not in the data set: it must hold the same rows, prepared in the same way."
                )
            chosen = whole.select([place_of[each] for each in stored["hashes"]])
            if LOGITS in stored:
                chosen = chosen.add_column(LOGITS, stored[LOGITS])
            return cls(chosen, **options)
        if "rows" not in stored:
            raise ValueError(
                f"The memory in {folder} was saved without its rows. Pass the data set that they "
                "are from: ReplayMemory.load(folder, dataset)."
            )
        place = Path(folder) / stored["rows"]
        if not place.is_dir():
            raise FileNotFoundError(
                f"{place}, the rows of the memory, is missing. Copy the whole folder, or pass the "
                "data set that they are from: ReplayMemory.load(folder, dataset)."
            )
        return cls(datasets.Dataset.load_from_disk(str(place)), **options)


def _without_overlap(memories: Sequence[ReplayMemory]) -> list[int]:
    """The places, in all of them together, of rows that no earlier one has of the same task."""
    seen: set[tuple[str, str]] = set()
    places, first = [], 0
    for memory in memories:
        own = list(zip(memory.tasks, memory.hashes, strict=True))
        places += [first + place for place, row in enumerate(own) if row not in seen]
        seen.update(own)
        first += len(own)
    return places
