"""The rows of domains: read, split the same way every time, and paired."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features

from hf_adapt.distillation.row_files import read_splits
from hf_adapt.experiments.config import DomainFiles, Experiment
from hf_adapt.experiments.tasks import TASKS, Task
from hf_adapt.experiments.tasks.task import Row

TEST_SHARE, DEV_SHARE = 0.25, 0.1


class DataError(ValueError):
    """Rows cannot be read or do not fit together; the message names the file and the fix."""


# ---------------------------------------------------------------- splitting
def split_rows(
    rows: Iterable[Row], task: Task, test_share: float = TEST_SHARE, dev_share: float = DEV_SHARE
) -> dict[str, list[Row]]:
    """Split rows into train, dev and test, always the same way, each text in one of them.

    A text counts once. The order is that of a hash of the text, so it depends neither on the run's
    seed nor on the order of the file. Rows without a label are training rows.

    Args:
        rows: Inputs and labels.
        task: Says which inputs are the same.
        test_share: The share of the rows with labels that become test rows.
        dev_share: The same for dev rows.
    """
    unique: dict[str, Row] = {}
    for cell, label in rows:
        if cleaned := task.clean(cell):
            unique.setdefault(task.key(cleaned), (cleaned, label))
    mixed = sorted(unique, key=lambda key: hashlib.sha256(key.encode()).digest())
    labelled = [key for key in mixed if unique[key][1] is not None]
    test = round(len(labelled) * test_share)
    dev = test + round(len(labelled) * dev_share)
    held_out = set(labelled[:dev])
    return {
        "train": [unique[key] for key in mixed if key not in held_out],
        "dev": [unique[key] for key in labelled[test:dev]],
        "test": [unique[key] for key in labelled[:test]],
    }


def load_domain(files: DomainFiles, task: Task) -> dict[str, list[Row]]:
    """Train, dev and test rows of a domain.

    A test (or else validation) split that a data set has, and files that are named, are used as
    they are; what is missing is split off the training rows. A row that is also in the test rows
    is not trained on.

    Raises:
        DataError: If a file or a column is missing.
    """
    columns = (files.text_column or task.input_column, files.label_column or task.label_column)
    splits = _read(files.train, columns)
    first = "train" if "train" in splits else next(iter(splits))
    train = _rows_of(splits[first], files.train, columns)
    given: dict[str, list[Row]] = {}
    for split, name in (("dev", files.dev), ("test", files.test)):
        if name is not None:
            own = _read(name, columns)
            own_rows = own.get(split) or next(iter(own.values()))
            given[split] = [row for row in _rows_of(own_rows, name, columns) if row[1] is not None]
            if not given[split]:
                raise DataError(f"{split}: {name} has no row with a label in {columns[1]!r}.")
    for split in ("test", "validation"):
        if "test" not in given and split in splits and split != first:
            # The public test split of many data sets has no labels.
            rows = _rows_of(splits[split], files.train, columns)
            if labelled := [row for row in rows if row[1] is not None]:
                given["test"] = labelled
    held_out = {task.key(task.clean(cell)) for rows in given.values() for cell, _ in rows}
    train = [row for row in train if task.key(task.clean(row[0])) not in held_out]
    made = split_rows(
        train,
        task,
        0 if "test" in given else TEST_SHARE,
        0 if "dev" in given else DEV_SHARE,
    )
    for split, rows in given.items():
        made[split] = split_rows(rows, task, 1, 0)["test"]
    return made


def _read(name: str, columns: Sequence[str]) -> dict[str, Dataset]:
    try:
        return read_splits(name, columns)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot read {name!r}: {error} Give a csv, tsv, json, jsonl or parquet file, a folder "
            "made by save_to_disk, or the id of a data set on the Hub."
        ) from error


def _rows_of(data: Dataset, name: str, columns: tuple[str, str]) -> list[Row]:
    text_column, label_column = columns
    if text_column not in data.column_names:
        raise DataError(
            f"{name!r} has the columns {data.column_names}, and not {text_column!r}. Name it with "
            "text_column."
        )
    labels: list[Any] = [None] * len(data)
    if label_column in data.column_names:
        labels = _label_names(data, label_column)
    return [(c, n) for c, n in zip(data[text_column], labels, strict=True) if c is not None]


def _label_names(data: Dataset, column: str) -> list[Any]:
    """Class names, from numbers where the data set has names; None where there is no label."""
    feature = data.features[column]
    inner = getattr(feature, "feature", feature)

    def name(label: Any) -> Any:
        if isinstance(label, (list, tuple)):
            return [name(each) for each in label]
        if isinstance(inner, ClassLabel):
            return None if label in (None, -1) else inner.int2str(label)
        return None if label is None else str(label)

    return [name(label) for label in data[column]]


# ---------------------------------------------------------------- pairs
@dataclass(frozen=True, eq=False)
class Pair:
    """Two domains with a column of inputs and a column `label`, and the same classes in both.

    Args:
        source: Train, dev and test rows with labels.
        target: The same; rows without labels are left out.
        target_unlabelled: All training rows of the target, without labels: all that adaptation may
            see of it.
        labels: The classes.
    """

    source: DatasetDict
    target: DatasetDict
    target_unlabelled: Dataset
    labels: list[str]

    def target_shares(self, task: Task) -> dict[str, float]:
        """The share of each class among the labels of the target's training rows."""
        counts = Counter(task.class_numbers(self.target["train"][task.label_column]))
        total = max(1, counts.total())
        return {name: counts[number] / total for number, name in enumerate(self.labels)}


def load_pair(experiment: Experiment, source: str, target: str) -> Pair:
    """Load two domains of an experiment.

    Args:
        experiment: Names their files and how many rows are used.
        source: The domain whose labels are trained on.
        target: The domain to adapt to; its labels may be missing.

    Raises:
        DataError: If a file cannot be read, or the two sets of classes differ.
    """
    task = TASKS[experiment.task]
    rows = {name: load_domain(experiment.data[name], task) for name in (source, target)}
    return paired(
        rows, task, experiment.num_train, experiment.num_test, balanced=experiment.balanced
    )


def paired(
    domains: Mapping[str, Mapping[str, Sequence[Row]]],
    task: Task,
    num_train: int | None = None,
    num_test: int | None = None,
    balanced: bool = False,
) -> Pair:
    """Two domains as data sets with the same classes.

    Args:
        domains: The splits of the source and of the target, by the domains' names.
        task: Says what the rows are.
        num_train: Training rows of each domain, at most.
        num_test: Dev and test rows of each domain, at most.
        balanced: Keep as many rows of each class as of the rarest, in every split.

    Raises:
        DataError: If the two sets of classes differ.
    """
    (source, target), (source_rows, target_rows) = domains, domains.values()
    labels = sorted(_classes(source_rows["train"], task))
    unknown = {name for rows in target_rows.values() for name in _classes(rows, task)} - {*labels}
    if len(labels) < 2:
        raise DataError(
            f"The source {source!r} has the classes {labels}: at least two are needed. Name the "
            "column of the labels with label_column."
        )
    if unknown:
        raise DataError(
            f"The source {source!r} has the classes {labels}, and the target {target!r} also has "
            f"{sorted(unknown)}. Both need the same names: rename them in the files."
        )
    if balanced and not all(isinstance(label, str) for _, label in target_rows["train"]):
        raise DataError(
            f"balanced needs one label for each row, which the target {target!r} does not have."
        )
    limits = {"train": num_train, "dev": num_test, "test": num_test}
    used = [
        {
            split: (_balanced(rows[split]) if balanced else list(rows[split]))[:limit]
            for split, limit in limits.items()
        }
        for rows in (source_rows, target_rows)
    ]
    features = task.features(labels)
    inputs, label = features

    def dataset(rows: Sequence[Row]) -> Dataset:
        known = [row for row in rows if row[1] is not None]
        columns = {inputs: [cell for cell, _ in known], label: [name for _, name in known]}
        return Dataset.from_dict(columns, features=features)

    unlabelled = {inputs: [cell for cell, _ in used[1]["train"]]}
    here, there = (DatasetDict({split: dataset(rows[split]) for split in limits}) for rows in used)
    return Pair(
        here,
        there,
        Dataset.from_dict(unlabelled, features=Features({inputs: features[inputs]})),
        labels,
    )


def _classes(rows: Iterable[Row], task: Task) -> set[str]:
    return {name for _, label in rows if label is not None for name in task.class_names(label)}


def _balanced(rows: Iterable[Row]) -> list[Row]:
    """As many rows of each class as of the rarest."""
    rows = list(rows)
    seen: Counter[str] = Counter()
    rarest = min(Counter(label for _, label in rows).values(), default=0)
    kept = []
    for row in rows:
        seen[row[1]] += 1
        if seen[row[1]] <= rarest:
            kept.append(row)
    return kept
