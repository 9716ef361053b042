"""Target rows for a person to label, and the labels that came back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from hf_adapt.engine.labels import IGNORED
from hf_adapt.experiments.cell import reference_file
from hf_adapt.experiments.config import Experiment
from hf_adapt.experiments.data import DataError, cached_pair, labelled_rows
from hf_adapt.experiments.tasks import SequenceClassification
from hf_adapt.models.hashing import row_keys
from hf_adapt.storage.text_file import whole_file

NAME = "to_label.csv"
MOST = 50


class LabelFile:
    """The file beside the runs of a pair with texts on which its candidates disagree.

    Args:
        experiment: What was run.
        source: The source domain.
        target: The target domain, whose texts they are.
    """

    def __init__(self, experiment: Experiment, source: str, target: str) -> None:
        self.experiment, self.domains = experiment, (source, target)
        self.task = experiment.task_of(source)
        self.pair = cached_pair(experiment, source, target)
        self.path = Path(reference_file(experiment, source, target)).with_name(NAME)

    @property
    def is_possible(self) -> bool:
        """Whether a person can fill in labels: one for each text."""
        return isinstance(self.task, SequenceClassification)

    @cached_property
    def given(self) -> list[tuple[str, str]]:
        """The texts that have a label in the file, and their labels.

        Raises:
            DataError: If the file cannot be read, or a label is none of the classes.
        """
        if not self.is_possible or not self.path.exists():
            return []
        rows = labelled_rows(str(self.path), self.task)
        if wrong := sorted({label for _, label in rows} - {*self.pair.labels}):
            raise DataError(
                f"{self.path} has the labels {wrong}. Expected {', '.join(self.pair.labels)}, or "
                "nothing."
            )
        return [(self.task.clean(text), label) for text, label in rows]

    def labels(self, keys: torch.Tensor) -> NDArray[np.int64] | None:
        """The classes of the target's items with these keys, -100 where there is none.

        None without any label.

        Raises:
            DataError: If a text is not one of the target's.
        """
        if not self.given:
            return None
        texts, names = zip(*self.given, strict=True)
        classes = map(self.pair.labels.index, names)
        known = dict(zip(self.keys(texts).tolist(), classes, strict=True))
        if strange := len({*known} - {*keys.tolist()}):
            raise DataError(
                f"{strange} texts in {self.path} are not among the target's. Leave the texts as "
                "they are, or remove the file: the next run writes it anew."
            )
        return np.array([known.get(key, IGNORED) for key in keys.tolist()])

    def write(self, keys: torch.Tensor) -> bool:
        """Write the texts with these keys, unless there are none, or labels in the file.

        Args:
            keys: The first 50 are asked for.
        """
        if not self.is_possible or self.given or not len(keys):
            return False
        texts = self.pair.target_unlabelled[self.task.input_column]
        text_of = dict(zip(self.keys(texts).tolist(), texts, strict=True))
        asked = [text_of[key] for key in keys[:MOST].tolist()]
        columns = {self.task.input_column: asked, self.task.label_column: [""] * len(asked)}
        with whole_file(self.path) as part:
            Dataset.from_dict(columns).to_csv(str(part), index=False)
        return True

    def keys(self, texts: Sequence[str]) -> torch.Tensor:
        """The keys that items of these texts have, (N,)."""
        processor = self.task.processor(self.experiment.model)
        rows = Dataset.from_dict({self.task.input_column: list(texts)})
        loader = torch.utils.data.DataLoader(
            self.task.prepared(rows, processor, self.experiment.max_length),
            batch_size=64,
            collate_fn=self.task.collator(processor),
        )
        return torch.cat([row_keys(batch) for batch in loader])
