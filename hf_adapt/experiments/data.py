"""The rows of domains: read, split the same way every time, and paired."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features

from hf_adapt.distillation.row_files import read_splits
from hf_adapt.experiments.config import DomainFiles, Experiment
from hf_adapt.experiments.tasks import Task
from hf_adapt.experiments.tasks.task import Row

TEST_SHARE, DEV_SHARE = 0.25, 0.1


class DataError(ValueError):
    """Rows cannot be read or do not fit together; the message names the file and the fix."""


# ---------------------------------------------------------------- splitting
def split_rows(
    rows: Iterable[Row], task: Task, test_share: float = TEST_SHARE, dev_share: float = DEV_SHARE
) -> dict[str, list[Row]]:
    """Split rows into train, dev and test, always the same way, each text in one of them.

    A text counts once, with a label if any copy has one. The order is that of a hash of the text,
    so it depends neither on the run's seed nor on the order of the file. Rows without a label are
    training rows.

    Args:
        rows: Inputs and labels.
        task: Says which inputs are the same.
        test_share: The share of the rows with labels that become test rows.
        dev_share: The same for dev rows.
    """
    unique: dict[str, Row] = {}
    for cell, label in rows:
        if cleaned := task.clean(cell):
            key = task.key(cleaned)
            if key not in unique or unique[key][1] is None:
                unique[key] = (cleaned, label)
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


def load_domain(files: DomainFiles, task: Task, needs_labels: bool = False) -> dict[str, list[Row]]:
    """Train, dev and test rows of a domain.

    A test (or else validation) split that a data set has, and files that are named, are used as
    they are; what is missing is split off the training rows. A row that is also in the test rows
    is not trained on.

    Args:
        files: Where the rows are.
        task: Says what the rows are.
        needs_labels: Whether training rows must have a column of labels.

    Raises:
        DataError: If a file or a column is missing.
    """
    columns = (files.text_column or task.input_column, files.label_column or task.label_column)
    splits = _read(files.train, columns)
    first = "train" if "train" in splits else next(iter(splits))
    train = _rows_of(splits[first], files.train, columns, task, needs_labels)
    given: dict[str, list[Row]] = {}
    for split, name in (("dev", files.dev), ("test", files.test)):
        if name is not None:
            own = _read(name, columns)
            named = next((each for each in (split, "validation") if each in own), next(iter(own)))
            own_rows = own[named]
            found = _rows_of(own_rows, name, columns, task, needs_labels=True)
            given[split] = [row for row in found if row[1] is not None]
            if not given[split]:
                raise DataError(f"{split}: {name} has no row with a label in {columns[1]!r}.")
    for split in ("test", "validation"):
        if "test" not in given and split in splits and split != first:
            # The public test split of many data sets has no labels.
            rows = _rows_of(splits[split], files.train, columns, task)
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
        text = f"{error} {error.__cause__ or ''}".lower()
        fix = "Save it as UTF-8. " if "utf-8" in text or "codec" in text else ""
        raise DataError(
            f"Cannot read {name!r}: {error} {fix}Give a csv, tsv, json, jsonl or parquet file, a "
            "folder made by save_to_disk, or the id of a data set on the Hub."
        ) from error


def _rows_of(
    data: Dataset, name: str, columns: tuple[str, str], task: Task, needs_labels: bool = False
) -> list[Row]:
    text_column, label_column = columns
    needed = {"text_column": text_column} | ({"label_column": label_column} if needs_labels else {})
    check_columns(data, name, needed)
    labels: list[Any] = [None] * len(data)
    if label_column in data.column_names:
        labels = _label_names(data, label_column)
    rows = []
    for number, (cell, label) in enumerate(zip(data[text_column], labels, strict=True), start=1):
        if cell is not None:
            try:
                rows.append((cell, task.checked(cell, label)))
            except ValueError as error:
                raise DataError(f"{name!r}, row {number}: {error}") from error
    return rows


def check_columns(data: Dataset, name: str, needed: Mapping[str, str]) -> None:
    """Refuse rows that lack a column.

    Args:
        data: The rows.
        name: Where they are from.
        needed: The columns, by the options that name them.

    Raises:
        DataError: With the nearest right name.
    """
    for option, column in needed.items():
        if column not in data.column_names:
            only = data.column_names[0] if len(data.column_names) == 1 else ""
            mark = next((mark for mark in (";", "\t", "|") if mark in only), None)
            near = difflib.get_close_matches(column, data.column_names, n=1)
            fix = f"Did you mean {near[0]!r}? " if near else ""
            fix += (
                f"Name it with {option} (of one file alone: data: {{NAME: {{train: FILE, {option}: "
                "COLUMN}} in a configuration), or rename it."
            )
            if mark is not None:
                fix = f"Its cells are separated by {mark!r}: save it with commas, or as .tsv."
            raise DataError(
                f"{name!r} has the columns {data.column_names}, and not {column!r}. {fix}"
            )


def _label_names(data: Dataset, column: str) -> list[Any]:
    """The labels of all rows: see [`label_name`]."""
    feature = data.features[column]
    inner = getattr(feature, "feature", feature)

    def name(label: Any) -> Any:
        if isinstance(label, (list, tuple)):
            return [name(each) for each in label]
        if isinstance(inner, ClassLabel) and label is not None:
            return None if label < 0 else inner.int2str(label)
        return label_name(label)

    return [name(label) for label in data[column]]


def label_name(label: Any) -> str | None:
    """The name of a class, the same in all formats; None where there is no label.

    Example:
        >>> [label_name(label) for label in (1, 1.0, "1.0", " ", float("nan"), "spam ")]
        ['1', '1', '1', None, None, 'spam']
    """
    name = "" if label is None else str(label).strip()
    if not name or name.lower() == "nan":
        return None
    return re.sub(r"^(-?\d+)\.0+$", r"\1", name)


def named_frequencies(priors: Mapping[Any, float]) -> dict[str, float]:
    """Class frequencies by the names that the classes have in a run."""
    return {str(label_name(key)): value for key, value in priors.items()}


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
        group_column: The column with the groups of the target's rows, if they are asked for.
        test_groups: The group that each test row of the target is in, or None.
    """

    source: DatasetDict
    target: DatasetDict
    target_unlabelled: Dataset
    labels: list[str]
    group_column: str | None = None
    test_groups: Sequence[str | None] = ()

    @property
    def is_one(self) -> bool:
        """Whether it is a domain with itself: one of several tasks."""
        return self.target is self.source

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
        target: The domain to adapt to; its labels may be missing. The source itself for a task.

    Raises:
        DataError: If a file cannot be read, or the two sets of classes differ.
    """
    task = experiment.task_of(source)
    rows = {
        name: load_domain(
            _named(experiment, name),
            task,
            needs_labels=name == source or experiment.data[name].label_column is not None,
        )
        for name in (source, target)
    }
    if not rows[target]["train"] and rows[target]["test"]:
        raise DataError(
            f"{target!r} has no training rows: all of them are test rows. Name other files for "
            "train and test, or train alone, of which a quarter is tested on."
        )
    if source == target:
        rows[source]["train"] = [row for row in rows[source]["train"] if row[1] is not None]
    own = {name: experiment.data[name].num_train for name in rows}
    num_train = {n: experiment.num_train if most is None else most for n, most in own.items()}
    pair = paired(rows, task, num_train, experiment.num_test, balanced=experiment.balanced)
    column = experiment.group_column_of(target)
    if column is None:
        return pair
    groups = _groups(_named(experiment, target), task)
    tested = pair.target["test"][task.input_column]
    found = [groups.get(task.key(cell)) for cell in tested]
    return replace(pair, group_column=column, test_groups=found)


def _groups(files: DomainFiles, task: Task) -> dict[str, str]:
    """The groups of the rows that a domain is tested on, by their keys."""
    name, text, group = files.test or files.train, str(files.text_column), str(files.group_column)
    splits = list(_read(name, (text, group)).values())
    groups: dict[str, str] = {}
    for data in [each for each in splits if group in each.column_names] or splits[:1]:
        check_columns(data, name, {"text_column": text, "group_column": group})
        for cell, found in zip(data[text], _label_names(data, group), strict=True):
            if cell is not None and found is not None:
                groups.setdefault(task.key(task.clean(cell)), found)
    return groups


def _named(experiment: Experiment, name: str) -> DomainFiles:
    """The files of a domain with the names of its columns."""
    files, task = experiment.data[name], experiment.task_of(name)
    return replace(
        files,
        text_column=files.text_column or experiment.text_column or task.input_column,
        label_column=files.label_column or experiment.label_column or task.label_column,
        group_column=experiment.group_column_of(name),
    )


def label_columns(experiment: Experiment, name: str) -> tuple[str, list[str]]:
    """The column that labels of a domain are read from, and the columns that it has."""
    files = _named(experiment, name)
    splits = _read(files.train, (str(files.text_column), str(files.label_column)))
    return str(files.label_column), list(next(iter(splits.values())).column_names)


_PAIRS: dict[str, Pair] = {}


def cached_pair(experiment: Experiment, source: str, target: str) -> Pair:
    """The rows of a pair, read once in a process, and again when a file has changed."""
    limits = (experiment.num_train, experiment.num_test, experiment.balanced, experiment.task)
    domains = [_named(experiment, name) for name in (source, target)]
    own = [experiment.data[name].label_column for name in (source, target)]
    files = [Path(name) for each in domains for name in (each.train, each.dev, each.test) if name]
    changed = [file.stat().st_mtime_ns for file in files if file.exists()]
    key = repr((domains, own, limits, changed))
    if key not in _PAIRS:
        _PAIRS[key] = load_pair(experiment, source, target)
    return _PAIRS[key]


def paired(
    domains: Mapping[str, Mapping[str, Sequence[Row]]],
    task: Task,
    num_train: int | Mapping[str, int | None] | None = None,
    num_test: int | None = None,
    balanced: bool = False,
) -> Pair:
    """Two domains as data sets with the same classes.

    A text of the source that is among the target's test rows is not trained on.

    Args:
        domains: The splits of the source and of the target, by the domains' names; a domain alone
            is paired with itself.
        task: Says what the rows are.
        num_train: Training rows of each domain, at most; or by the domains' names.
        num_test: Dev and test rows of each domain, at most.
        balanced: Keep as many rows of each class as of the rarest, in every split.

    Raises:
        DataError: If the two sets of classes differ.
    """
    source, *_, target = [*domains, *domains]
    source_rows, target_rows = domains[source], domains[target]
    tested = {task.key(cell) for cell, _ in target_rows["test"]}
    own = {
        split: rows if split == "test" else [r for r in rows if task.key(r[0]) not in tested]
        for split, rows in source_rows.items()
    }
    labels = _in_order({name for rows in own.values() for name in _classes(rows, task)})
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
    if not any(label is not None for _, label in own["train"]):
        raise DataError(
            f"The source {source!r} has no labelled training rows that are not test rows of the "
            f"target {target!r}."
        )
    most = num_train if isinstance(num_train, Mapping) else dict.fromkeys(domains, num_train)
    used = [
        {
            split: (_balanced(rows[split]) if balanced else list(rows[split]))[:limit]
            for split, limit in (("train", most[name]), ("dev", num_test), ("test", num_test))
        }
        for name, rows in ((source, own), (target, target_rows))
    ]
    features = task.features(labels)
    inputs, label = features

    def dataset(rows: Sequence[Row]) -> Dataset:
        known = [row for row in rows if row[1] is not None]
        columns = {inputs: [cell for cell, _ in known], label: [name for _, name in known]}
        return Dataset.from_dict(columns, features=features)

    unlabelled = {inputs: [cell for cell, _ in used[1]["train"]]}
    here, there = (DatasetDict({split: dataset(found) for split, found in u.items()}) for u in used)
    return Pair(
        here,
        here if source == target else there,
        Dataset.from_dict(unlabelled, features=Features({inputs: features[inputs]})),
        labels,
    )


def _classes(rows: Iterable[Row], task: Task) -> set[str]:
    return {name for _, label in rows if label is not None for name in task.class_names(label)}


def _in_order(labels: Iterable[str]) -> list[str]:
    """Sorted: by number, if all are whole numbers."""
    names = sorted(labels)
    are_numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return sorted(names, key=int) if are_numbers else names


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
