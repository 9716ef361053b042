"""A pass over all rows of a stream between two steps of training, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn

from hf_adapt.engine.pairing import rows_at
from hf_adapt.engine.weights import swapped
from hf_adapt.models.hashing import row_keys
from hf_adapt.models.state import preserved_random_state

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.adaptation import Objective
    from hf_adapt.engine.batch import Batch
    from hf_adapt.engine.mixins import BatchTransform
    from hf_adapt.engine.step import TrainingStep
    from hf_adapt.engine.stream_data import StreamData

Read = Callable[["Batch"], Mapping[str, torch.Tensor]]
"""What is kept of a batch: tensors with one entry per item."""


class _Rows(torch.utils.data.Dataset[tuple[int, Any]]):
    """The rows of several datasets one after another, each with its domain number."""

    def __init__(self, datasets: Sequence[tuple[int, Any]]) -> None:
        self.datasets = list(datasets)
        self.places = [(n, i) for n, (_, d) in enumerate(self.datasets) for i in range(len(d))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        which, row = self.places[index]
        domain, dataset = self.datasets[which]
        return domain, rows_at(dataset, [row])[0]

    def by_length(self, indices: list[int]) -> list[int]:
        """The same rows, those of tokens in the order of their number: less padding."""
        if not indices or not isinstance(first := self[indices[0]][1], Mapping):
            return indices
        if not hasattr(first.get("input_ids"), "__len__"):
            return indices
        return sorted(indices, key=lambda index: len(self[index][1]["input_ids"]))


class Sweep:
    """Runs the model over all rows of a stream and keeps what is asked for.

    The model is in evaluation mode meanwhile. Each process reads its share of the rows; all of them
    get the whole result, the rows of one process after those of another.

    Args:
        trainer: The Trainer.
        step: The training step, which knows how to run the model.
        data: The streams.
        columns: Columns that adaptations want to see.
        transforms: Adaptations that change batches.
    """

    def __init__(
        self,
        trainer: Trainer,
        step: TrainingStep,
        data: StreamData,
        columns: Sequence[str],
        transforms: Sequence[BatchTransform],
    ) -> None:
        self.trainer = trainer
        self.step = step
        self.data = data
        self._collator = data.collator(columns, transforms)

    def check(self, stream: str) -> None:
        """Refuse rows that cannot be read by number, or are others each time they are read.

        Raises:
            ValueError: Saying what to do.
        """
        rows = _Rows(self.data.rows_of(stream))
        some = list(range(min(8, len(rows))))
        with preserved_random_state():
            keys = []
            for _ in range(2):
                read = [rows[index] for index in some]
                batch = self._collator.stream_batch(stream, read, self.data.example_row)
                keys.append(row_keys(batch))
        if not torch.equal(*keys):
            raise ValueError(
                f"The rows of the stream {stream!r} are others each time they are read (a random "
                "transform, or a collator that draws random numbers), and what was found for a row "
                "in a pass over them could not be found again. Prepare them once, and put what is "
                "random into the method (SelfTraining(view=...))."
            )

    def run(
        self,
        objective: Objective,
        stream: str,
        read: Read,
        weights: Mapping[str, torch.Tensor] | None = None,
        forward: bool = True,
    ) -> dict[str, torch.Tensor]:
        """What `read` returns for every batch, joined, on the CPU.

        Args:
            objective: Whose features and streams the batches show.
            stream: The stream's name; `"train"` for the training rows.
            read: Called with each batch; the same keys each time.
            weights: Other weights that the model has meanwhile, by their names.
            forward: Whether the model runs; `read` needs no outputs else.

        Raises:
            ValueError: If the rows cannot be read by number.
        """
        rows = _Rows(self.data.rows_of(stream))
        accelerator = self.trainer.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        found: dict[str, list[torch.Tensor]] = {}
        model = self.step.forward.model
        with ExitStack() as stack:
            stack.enter_context(preserved_random_state())
            stack.enter_context(evaluating(model))
            stack.enter_context(swapped(model, weights or {}))
            stack.enter_context(torch.no_grad())
            for adaptation in self.step.adaptations:
                stack.enter_context(adaptation.around_sweep())
            for batch in self._batches(rows, stream, rank, processes, forward):
                values = {} if batch is None else read(batch.for_objective(objective))
                for name, value in values.items():
                    found.setdefault(name, []).append(value.detach().cpu())
        own = {name: torch.cat(values) for name, values in found.items()}
        if processes == 1:
            return own
        gathered = gather_object([own])
        names: Mapping[str, Any] = next((each for each in gathered if each), {})
        return {n: torch.cat([each[n] for each in gathered if each]) for n in names}

    def _batches(
        self, rows: _Rows, stream: str, rank: int, processes: int, forward: bool
    ) -> Iterator[Batch | None]:
        """The batches of this process, after a forward if asked; None for one to keep pace."""
        like = self.data.example_row
        size = self.trainer.args.per_device_eval_batch_size
        mine = rows.by_length(list(range(rank, len(rows), processes)))
        rounds = math.ceil(math.ceil(len(rows) / processes) / size)  # of the one with most rows
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(rows, mine or [0]),
            batch_size=size,
            collate_fn=lambda each: self._collator.stream_batch(stream, each, like),
        )
        done = 0
        while done < rounds:
            for inputs in loader:
                done += 1
                keeps_pace = not mine or done > math.ceil(len(mine) / size)
                given = self.trainer._prepare_inputs(inputs)
                batch = self.step.evaluated(given, stream, forward)
                yield None if keeps_pace else batch
                if done == rounds:
                    return


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules are in evaluation mode while the context is open, then as they were."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
