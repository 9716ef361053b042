"""Target rows for a person to label, and the labels that came back."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from hf_adapt.evaluation.contest import UNTOLD, agreed_labels, aligned_labels
from hf_adapt.experiments.cell import reference_file
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import cached_pair, label_name
from hf_adapt.experiments.tasks import SequenceClassification
from hf_adapt.models.hashing import row_keys
from hf_adapt.storage.text_file import write_text

STEM = "to_label"
MOST = 50
MOST_CHARACTERS = 30_000
"""More do not fit into a cell of a spreadsheet."""
FORMULA = ("=", "+", "-", "@")
"""What a spreadsheet takes for the beginning of one."""


class Row(NamedTuple):
    """A row of a file: the key of its item, its text and its label, if there are any.

    `has_more` where the file has columns of somebody's own.
    """

    key: int | None
    text: str
    label: str | None
    has_more: bool


class LabelFile:
    """Files beside the runs of a pair with texts on which its candidates disagree.

    The first is `to_label.csv`. A file with a label, or of another form, is not written again:
    further texts are asked for in `to_label_2.csv`, and so on.

    Args:
        experiment: What was run.
        source: The source domain.
        target: The target domain, whose texts they are.
        tell: Called with a sentence for what cannot be used.
    """

    def __init__(
        self, experiment: Experiment, source: str, target: str, tell: Callable[[str], None] = print
    ) -> None:
        self.experiment, self.domains, self.tell = experiment, (source, target), tell
        self.task = experiment.task_of(source)
        self.pair = cached_pair(experiment, source, target)
        self.folder = Path(reference_file(experiment, source, target)).parent

    @property
    def is_possible(self) -> bool:
        """Whether a person can fill in labels: one for each text."""
        return isinstance(self.task, SequenceClassification)

    @cached_property
    def known(self) -> Mapping[int, int]:
        """The classes of the texts that have a label, by the keys of their items.

        -1 for a text that was left out, with a label further down.
        """
        found = [label for path, rows in self._files.items() for label in self._read(path, rows)]
        known, disputed = agreed_labels(found)
        if disputed:
            self.tell(
                f"{self.folder}: {len(disputed)} texts have two labels each (to the model they are "
                "equal), which are left out."
            )
        return {**known, **dict.fromkeys(disputed, UNTOLD)}

    def labels(self, keys: torch.Tensor) -> NDArray[np.int64] | None:
        """The classes of items with these keys, -100 where there is none; None without any."""
        return aligned_labels(self.known, keys) if self.known else None

    def write(self, keys: torch.Tensor) -> Path | None:
        """Ask for the labels of the first fifty texts with these keys.

        Nothing is asked while texts of an earlier file wait for a label, or it has a fault.

        Returns:
            The file, or None if nothing is asked.
        """
        given = {path: rows for path, rows in self._files.items() if rows}
        labels = [row.label for rows in given.values() for row in rows if row.label]
        if not self.is_possible or not len(keys) or None in map(self._class, labels):
            return None
        left = {path: len(rows) - _answered(rows) for path, rows in given.items()}
        waiting = {path: n for path, n in left.items() if 0 < n < len(given[path])}
        if self.known and waiting:
            for path, count in waiting.items():
                self.tell(f"{count} texts in {path} wait for a label, with which it may decide.")
            return None
        for number in itertools.count(1):
            path = self.folder / f"{STEM}{f'_{number}' * (number > 1)}.csv"
            if (rows := self._files.get(path, [])) is not None and _is_open(rows):
                break
        wanted = [key for key in keys.tolist() if key in self._texts][:MOST]
        if not wanted or [row.key for row in self._files.get(path) or ()] == wanted:
            return path if wanted else None
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._columns)
        for key in wanted:
            shown = self._texts[key][:MOST_CHARACTERS]
            writer.writerow([_name(key), "'" * shown.startswith(FORMULA) + shown, ""])
        write_text(path, "\ufeff" + text.getvalue())  # a spreadsheet wants the mark
        return path

    @property
    def _columns(self) -> list[str]:
        return ["key", self.task.input_column, self.task.label_column]

    def _read(self, path: Path, rows: list[Row] | None) -> Iterator[tuple[int, int]]:
        """The keys and classes of a file's rows up to the last label; what is odd is told."""
        strange: list[str] = []
        wrong: set[str] = set()
        for row in (rows or [])[: _answered(rows or [])]:
            key = row.key if row.key in self._texts else self._keys_of_texts.get(row.text)
            number = UNTOLD if row.label is None else self._class(row.label)
            if number is None:
                wrong.add(str(row.label))
            elif key is not None:
                yield key, number
            elif number != UNTOLD:
                strange.append(row.text)
        if strange:
            self.tell(
                f"{path}: {len(strange)} of its texts are not among the target's and are left out, "
                f"the first is {strange[0][:60]!r}."
            )
        if wrong:
            self.tell(
                f"{path}: the labels {', '.join(map(repr, sorted(wrong)))} are left out. Expected "
                f"{' or '.join(map(repr, self.pair.labels))}, or nothing."
            )

    def _class(self, label: str) -> int | None:
        """The number of a class, whatever case a spreadsheet has made of its name."""
        names = self.pair.labels
        folded = [name.casefold() for name in names]
        if label in names:
            return names.index(label)
        return folded.index(label.casefold()) if label.casefold() in folded else None

    @cached_property
    def _texts(self) -> dict[int, str]:
        """The target's texts by the keys of their items."""
        texts = self.pair.target_unlabelled[self.task.input_column]
        return dict(zip(self.keys(texts).tolist(), texts, strict=True))

    @cached_property
    def _keys_of_texts(self) -> dict[str, int]:
        return {_plain(text): key for key, text in self._texts.items()}

    def keys(self, texts: Sequence[str]) -> torch.Tensor:
        """The keys that items of these texts have, (N,)."""
        processor = self.task.processor(self.experiment.model)
        rows = Dataset.from_dict({self.task.input_column: list(texts)})
        loader: Any = torch.utils.data.DataLoader(
            self.task.prepared(rows, processor, self.experiment.max_length),
            batch_size=64,
            collate_fn=self.task.collator(processor),
        )
        return torch.cat([row_keys(batch) for batch in loader])

    @cached_property
    def _files(self) -> dict[Path, list[Row] | None]:
        """The rows of each file, however a spreadsheet has saved them; None of one that is odd."""
        paths = sorted(self.folder.glob(f"{STEM}*.csv")) if self.is_possible else []
        return {path: self._rows(path) for path in paths}

    def _rows(self, path: Path) -> list[Row] | None:
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
            text = data.decode("utf-16" if is_wide else "cp1252", "replace")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        head, _, rest = text.partition("\n")
        if head.strip().lower().startswith("sep="):  # a spreadsheet's own
            text = rest
        head = text.partition("\n")[0]
        _, content, label = self._columns
        try:
            lines = list(csv.reader(io.StringIO(text), delimiter=max(",;\t", key=head.count)))
        except csv.Error as error:
            self.tell(f"{path} cannot be read: {error}. Its labels are not used.")
            return None
        names = [name.strip().lower() for name in lines[0]] if lines else []
        if lines and (label not in names or not {"key", content} & {*names}):
            self.tell(
                f"{path}: expected the columns key, {content} and {label}, got {', '.join(names)}. "
                "Its labels are not used."
            )
            return None
        cells = [dict(zip(names, line, strict=False)) for line in lines[1:] if any(line)]
        return [
            Row(
                _number(row.get("key", "")),
                _plain(row.get(content, "")),
                label_name(row.get(label)),
                bool({*names} - {*self._columns}),
            )
            for row in cells
        ]


def _answered(rows: list[Row]) -> int:
    """How many rows there are up to the last with a label: a person has seen them."""
    return max((number for number, row in enumerate(rows, start=1) if row.label), default=0)


def _is_open(rows: list[Row]) -> bool:
    """Whether a file may be written again: nothing of a person is in it."""
    return not any(row.label or row.has_more for row in rows)


def _plain(text: str) -> str:
    """A text as it is recognised after a file has held it."""
    return text.removeprefix("'")[: MOST_CHARACTERS - 1]


def _name(key: int) -> str:
    """A key as a text that no spreadsheet takes for a number."""
    return f"k{key % 2**64:016x}"


def _number(name: str) -> int | None:
    """The key of such a text; None of any other."""
    try:
        number = int(name.strip().removeprefix("k"), 16)
    except ValueError:
        return None
    return number - 2**64 if number >= 2**63 else number
