"""Features, predictions and labels of all items of a data set, as an evaluation sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_adapt.engine.adaptation import Objective
from hf_adapt.engine.batch import Batch
from hf_adapt.engine.forward import ForwardPass
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.metrics import MetricAverager
from hf_adapt.engine.mixins import EvaluationObserver
from hf_adapt.engine.pairing import is_map_style
from hf_adapt.engine.parts import Layout, Part, added_ids
from hf_adapt.models.pooling import Pooling
from hf_adapt.storage.text_file import whole_file

if TYPE_CHECKING:
    from transformers import Trainer

HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class ItemOutputs:
    """What a model gives for the items of a data set: its rows, or the tokens of a tagger.

    They are in the order of their keys, so that it depends on neither the batch size nor the number
    of processes.

    Args:
        features: Pooled hidden states.
        logits: Scores of each class.
        labels: The classes; -100 where there is none.
        keys: A key of each item by its content; equal items have equal ones.

    Shape:
        - features: (N, D) float32; logits: (N, C) float32; labels, keys: (N,) long.
    """

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, which: torch.Tensor) -> ItemOutputs:
        """Some of the items, by number or by a mask."""
        return ItemOutputs(**{each.name: getattr(self, each.name)[which] for each in fields(self)})

    @property
    def labelled(self) -> ItemOutputs:
        """The items that have a label."""
        return self.select(self.labels != IGNORED)

    @property
    def without_labels(self) -> ItemOutputs:
        """The same items; the labels are -100."""
        return replace(self, labels=torch.full_like(self.labels, IGNORED))

    @classmethod
    def joined(cls, batches: Sequence[ItemOutputs]) -> ItemOutputs:
        """Several as one, in the order of their keys."""
        whole = cls(
            **{n.name: torch.cat([getattr(each, n.name) for each in batches]) for n in fields(cls)}
        )
        return whole.select(torch.argsort(whole.keys, stable=True))


def halved(features: torch.Tensor) -> torch.Tensor:
    """Features in half precision; what does not fit is cut."""
    return features.clamp(-HALF_MAX, HALF_MAX).half()


def some_rows(dataset: Any, most: int) -> Any:
    """At most so many rows, evenly spread where they can be read by number."""
    if not is_map_style(dataset):
        if hasattr(dataset, "take"):
            return dataset.take(most)
        return _First(dataset, most)
    if len(dataset) <= most:
        return dataset
    numbers = torch.linspace(0, len(dataset) - 1, most).long().tolist()
    if hasattr(dataset, "select"):
        return dataset.select(numbers)
    return torch.utils.data.Subset(dataset, numbers)


class _First(torch.utils.data.IterableDataset[Any]):
    """The first rows of a stream."""

    def __init__(self, rows: Any, most: int) -> None:
        self.rows, self.most = rows, most

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.rows, self.most)


def save_items(path: str | Path, items: Mapping[str, ItemOutputs | None]) -> None:
    """Write several sets of items to a file, the features in half precision; None is left out."""
    arrays = {}
    for name, each in items.items():
        for column in fields(ItemOutputs) if each is not None else ():
            value = getattr(each, column.name)
            value = halved(value) if column.name == "features" else value
            arrays[f"{name}.{column.name}"] = value.numpy()
    with whole_file(path) as part, part.open("wb") as file:
        # NumPy's stubs take the arrays for its option allow_pickle.
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_items(path: str | Path) -> dict[str, ItemOutputs]:
    """Read what [`save_items`] has written."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    with Path(path).open("rb") as file, np.load(file) as stored:
        for key in stored.files:
            name, _, column = key.rpartition(".")
            value = torch.from_numpy(stored[key])
            value = value.float() if value.is_floating_point() else value
            found.setdefault(name, {})[column] = value
    for name, columns in found.items():
        shapes = {column: tuple(value.shape) for column, value in columns.items()}
        dimensions = {"features": 2, "logits": 2, "labels": 1, "keys": 1}
        if {c: len(s) for c, s in shapes.items()} != dimensions or len(
            {shape[0] for shape in shapes.values()}
        ) > 1:
            raise ValueError(f"the arrays of {name} do not belong together: {shapes}")
    return {name: ItemOutputs(**columns) for name, columns in found.items()}


class OutputCollector(EvaluationObserver):
    """Collects the [`ItemOutputs`] of an evaluation, of all processes.

    Args:
        feature_layer: The module whose output the features are, as objectives have it.
        pooling: How a feature is made of it.
        hides_labels: Whether the model and this see no labels.
    """

    def __init__(
        self,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        hides_labels: bool = False,
    ) -> None:
        self.hides_labels = hides_labels
        self._readers = [Objective(1.0, feature_layer, pooling, "collected")]
        self._batches: list[ItemOutputs] = []
        self._part: Part | None = None
        self._forward: ForwardPass | None = None

    def begin_evaluation(self, trainer: Trainer, prefix: str) -> None:
        """Hook the module of the features."""
        self.close()
        self._trainer, self._batches = trainer, []
        model = trainer.accelerator.unwrap_model(trainer.model)
        labels = tuple(dict.fromkeys([*trainer.label_names, "labels"]))
        self._layout = Layout(model, label_names=labels, added_ids=added_ids(trainer))
        self._forward = ForwardPass(trainer, model, self._layout, self._readers, _no_loss)
        self._forward.connect()

    @contextmanager
    def around_prediction(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Capture what the model gives for these rows."""
        assert self._forward is not None
        tensors = (v for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim)
        rows = next((len(value) for value in tensors), 0)
        domain = torch.zeros(rows, dtype=torch.long, device=self._trainer.args.device)
        self._part = Part(inputs, domain, added=self._layout.added_tokens(inputs))
        with torch.no_grad(), self._forward.recording(self._part):
            yield

    @torch.no_grad()
    def observe(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], outputs: Any
    ) -> None:
        """Keep the items of one batch."""
        assert self._part is not None and self._forward is not None
        part, self._part = self._part, None
        self._layout.learn([part])
        metrics = MetricAverager(self._trainer.accelerator)
        batch = Batch([part], self._layout, 1.0, metrics, lambda rows, _: rows)
        self._batches.append(self._of_all_processes(self._read(batch), part))

    def _read(self, batch: Batch) -> ItemOutputs:
        """The items of one batch."""
        batch = batch.for_objective(self._readers[0])
        logits, keys = batch.logits()[0], batch.keys()
        has_labels = any(name in batch.parts[0].inputs for name in self._layout.label_names)
        labels = batch.labels() if has_labels else torch.full_like(keys, IGNORED)
        return ItemOutputs(batch.features()[0], logits, labels, keys)

    @property
    def _has_token_items(self) -> bool:
        return self._layout.token_logits

    def _of_all_processes(self, found: ItemOutputs, part: Part) -> ItemOutputs:
        """The items of all processes, without those of rows that fill up the last batch."""
        values = {each.name: getattr(found, each.name) for each in fields(found)}
        if (accelerator := self._trainer.accelerator).num_processes > 1:
            counts = part.token_counts if self._has_token_items else torch.ones_like(part.domain)
            split = [torch.split(value.cpu(), counts.tolist()) for value in values.values()]
            rows = accelerator.gather_for_metrics(
                list(zip(*split, strict=True)), use_gather_object=True
            )
            values = {
                name: torch.cat(each)
                for name, each in zip(values, zip(*rows, strict=True), strict=True)
            }
        return ItemOutputs(**{name: value.detach().cpu() for name, value in values.items()})

    def end_evaluation(self, metrics: Mapping[str, float], prefix: str) -> Mapping[str, float]:
        """No metrics; the items are there."""
        self.close()
        return {}

    @property
    def items(self) -> ItemOutputs:
        """What the last evaluation has shown.

        Raises:
            ValueError: If it had no rows.
        """
        if not self._batches:
            raise ValueError("There are no rows: the data set is empty.")
        return ItemOutputs.joined(self._batches)

    def close(self) -> None:
        """Remove the hooks."""
        if self._forward is not None:
            self._forward.close()
            self._forward = None


class LayerCollector(OutputCollector):
    """Collects the pooled outputs of several layers in one pass, a row's side by side.

    The items are rows without logits and labels, in a tagger too.

    Args:
        layers: The modules of the layers, by their dotted names.
        inputs_of: Modules whose input is collected as well, before the layers' outputs: that of the
            first layer is the embeddings.
        pooling: How a feature is made of an output.

    Attributes:
        widths: The size of each feature, in the order of the inputs and layers.
    """

    def __init__(
        self, layers: Sequence[str], inputs_of: Sequence[str] = (), pooling: Pooling = "mean"
    ) -> None:
        super().__init__(hides_labels=True)
        self._inputs_of = tuple(inputs_of)
        self._readers = [Objective(1.0, layer, pooling, "collected") for layer in layers]
        self.widths: list[int] = []

    def begin_evaluation(self, trainer: Trainer, prefix: str) -> None:
        """Hook the modules."""
        super().begin_evaluation(trainer, prefix)
        assert self._forward is not None
        self._input_readers = [
            Objective(1.0, self._forward.capture_input(name), self._readers[0].pooling, "collected")
            for name in self._inputs_of
        ]

    def _read(self, batch: Batch) -> ItemOutputs:
        readers = [*self._input_readers, *self._readers]
        found = [batch.for_objective(reader).features()[0] for reader in readers]
        self.widths = [features.shape[1] for features in found]
        keys = batch.parts[0].keys
        no_labels = torch.full_like(keys, IGNORED)
        return ItemOutputs(torch.cat(found, 1), found[0].new_zeros(len(keys), 0), no_labels, keys)

    @property
    def _has_token_items(self) -> bool:
        return False


def _no_loss(*args: Any) -> torch.Tensor:
    raise AssertionError("an evaluation computes its loss itself")
