"""Replay: rows of the past beside the new ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.continual.memory import ReplayMemory
from hf_adapt.continual.prepared_rows import check_labels
from hf_adapt.continual.row_choice import LOGITS
from hf_adapt.engine.adaptation import Adaptation, Objective, Term
from hf_adapt.engine.batch import Batch, Rows
from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.streams import Stream

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

STREAM = "replay"
"""The stream of the rows of the past."""

FOLDER = "replay_memory"
"""Where the memory lies beside a saved model."""


class Replay(Adaptation):
    r"""Trains on rows of earlier tasks beside the new ones, so that those tasks are not forgotten.

    .. math::
        L = \frac{1}{N} \sum_{i \in new} \ell_i + \lambda \, \frac{1}{M} \sum_{j \in memory} \ell_j

    over the N and M labels of an optimizer step: each mean is over its own labels, so that `ratio`
    says how much is computed and `weight` how much it counts, as long as each step has a row of the
    memory; a step without one has no such term. It is what helps most wherever old
    rows, or rows like them, may be kept; a few per cent of general text beside the fine-tuning of a
    language model are a memory, too. Without such rows use [`KeepPredictions`] or
    [`Consolidation`].

    Reference:
        Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"; Chaudhry et al. 2019,
        "On tiny episodic memories", arXiv:1902.10486.

    Args:
        memory: A [`ReplayMemory`], or rows prepared like `train_dataset`, labels included.
        ratio: Rows of the memory that each training row brings along; `.25`: every fourth one.
        weight: λ, or a schedule of it.
        keep: What is written beside each saved model, in `replay_memory`, of a [`ReplayMemory`]:
            `"hashes"`, by which [`ReplayMemory.load`] finds the rows again; `"rows"`, which
            `push_to_hub` uploads too; or None.
        name: Name of its stream, where there are several memories (`loss/<name>`).

    Logs:
        `loss/replay`, the loss on the memory without `weight`, and `loss/task`.

    Raises:
        TypeError: If `memory` is no data set.
        ValueError: If it is empty, or an option is out of range.

    Example:
        ```python
        memory = ReplayMemory.from_dataset(movies, size=500)
        trainer.add_callback(AdaptationCallback(Replay(memory)))
        ```
    """

    name = "replay"

    def __init__(
        self,
        memory: Any,
        ratio: float = 0.25,
        weight: float | Schedule = 1.0,
        keep: str | None = "hashes",
        name: str | None = None,
    ) -> None:
        if keep not in ("rows", "hashes", None):
            raise ValueError(f"keep={keep!r} is unknown: use 'rows', 'hashes' or None.")
        if isinstance(memory, list | tuple) and any(isinstance(m, ReplayMemory) for m in memory):
            raise TypeError(
                f"Replay takes one memory, got a {type(memory).__name__} of them: pass "
                "ReplayMemory.merge(memories)."
            )
        self.memory = memory if isinstance(memory, ReplayMemory) else None
        rows = memory.dataset if isinstance(memory, ReplayMemory) else memory
        if rows is None:
            raise TypeError(
                "Replay(None): expected a memory, ReplayMemory.from_dataset(old, size=500), or "
                "prepared rows of the past."
            )
        if hasattr(rows, "__len__") and len(rows) == 0:
            raise ValueError(
                "The memory is empty, so nothing of the past would be seen. Make it of the old "
                "task's training rows: ReplayMemory.from_dataset(old, size=500)."
            )
        if callable(weight) or weight != 0:
            self.stream = Stream(rows, ratio=ratio, labels="keep", weight=weight)
        else:  # the rows need no labels
            self.stream = Stream(rows, ratio=ratio, forward="separate")
        self.keep = keep
        self.stream_name = STREAM
        if name is not None:
            self.name, self.stream_name = name, self.stream_of(name)

    @staticmethod
    def stream_of(name: str) -> str:
        """The stream of an adaptation of this name."""
        return name

    @property
    def is_active(self) -> bool:
        """False where the weight is the constant 0."""
        return self.stream.is_trained_on

    def provided_streams(self) -> Mapping[str, Stream]:
        """The stream `"replay"`, or that of the name that was given."""
        return {self.stream_name: self.stream}

    def setup(self, trainer: Trainer) -> None:
        """Refuse a memory whose labels are not the model's."""
        for rows in self.stream.domains:
            check_labels(trainer, rows)
        args = trainer.args
        rows_of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        per_step = rows_of_step * trainer.accelerator.num_processes * self.stream.ratio
        if per_step < 2:
            logger.warning(
                "Replay(ratio=%g) brings %.2g rows of the memory along with the %d training rows "
                "of a step, on average, so some steps have none, and weight= counts in the others "
                "only. Use a ratio of %.2g or more, or more rows a step.",
                self.stream.ratio,
                per_step,
                rows_of_step * trainer.accelerator.num_processes,
                3 * self.stream.ratio / per_step,
            )

    def state_dict(self) -> dict[str, Any]:
        """Which rows the memory has."""
        return {} if self.memory is None else {"memory": self.memory.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another memory."""
        if self.memory is not None and state.get("memory") != self.memory.fingerprint:
            raise ValueError(
                "The memory has other rows than in the run that is resumed. Pass the same one: "
                f"ReplayMemory.load(checkpoint + '/{FOLDER}', dataset), or without dataset where "
                "keep='rows'."
            )

    def save(self, folder: str) -> None:
        """Write the memory beside a saved model."""
        if self.memory is not None and self.keep is not None:
            place = FOLDER if self.stream_name == STREAM else f"{FOLDER}_{self.stream_name}"
            self.memory.save(Path(folder) / place, rows=self.keep == "rows")


class DarkReplay(Replay, Objective):
    r"""Replay that also keeps what the model predicted for the rows of the past (DER++).

    .. math::
        L = L_{new} + \frac{\alpha}{M} \sum_{j \in memory} \lVert z_j - h(x_j) \rVert_2^2
            + \beta L_{memory}

    with the logits z that were stored with the memory. Both terms are of the same rows and of one
    forward. For classifiers of rows; others use [`Replay`] with `KeepPredictions(on="replay")`.

    Reference:
        Buzzega et al. 2020, "Dark Experience for General Continual Learning", Eq. 6,
        arXiv:2004.07211.
        Deviation: one draw of rows for both terms, where the paper draws twice. The square is the
        sum over the classes, as in the paper; its public code has their mean.

    Args:
        memory: A [`ReplayMemory`] with logits, or rows with a column `replay_logits`.
        ratio: Rows of the memory that each training row brings along.
        weight: β, or a schedule of it; 0 for DER.
        logits_weight: α, or a schedule of it.
        keep: What is written beside each saved model: `"hashes"`, `"rows"` or None.
        name: Prefix of the logs.

    Logs:
        `loss/dark_replay`, the distance of the logits without α; `loss/replay`, `loss/task`.

    Raises:
        TypeError: If `memory` is no data set.
        ValueError: If it is empty or has no logits, or an option is out of range.

    Example:
        ```python
        memory = ReplayMemory.from_dataset(movies, size=500, trainer=trainer, logits=True)
        trainer.add_callback(AdaptationCallback(DarkReplay(memory)))
        ```
    """

    name = "dark_replay"
    columns = (LOGITS,)

    def __init__(
        self,
        memory: Any,
        ratio: float = 0.25,
        weight: float | Schedule = 0.5,
        logits_weight: float | Schedule = 0.2,
        keep: str | None = "hashes",
        name: str | None = None,
    ) -> None:
        Objective.__init__(self, logits_weight)
        Replay.__init__(self, memory, ratio, weight, keep, name)
        self.streams = (self.stream_name,)

    @staticmethod
    def stream_of(name: str) -> str:
        """The stream of an adaptation of this name, whose own is that of the logits' term."""
        return f"{name}_rows"

    @property
    def is_active(self) -> bool:
        """False where both weights are the constant 0."""
        return super(Replay, self).is_active or super().is_active

    def setup(self, trainer: Trainer) -> None:
        """Refuse a memory without logits."""
        super().setup(trainer)
        for rows in self.stream.domains:
            names = dataset_columns(rows)
            if names is not None and LOGITS not in names:
                raise ValueError(
                    f"The rows of the memory have no column {LOGITS!r}: it was made without the "
                    "model's predictions, or a transform drops them. Make it with "
                    "ReplayMemory.from_dataset(..., trainer=trainer, logits=True), or "
                    "memory.with_logits(trainer), before the new task."
                )

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The number of rows of the memory."""
        return rows.is_in(rows.domain, self.stream_name).sum()

    def loss(self, batch: Batch) -> Term:
        """The squared distance from the stored logits, summed over the rows of the memory."""
        logits, domain = batch.logits()
        mine = batch.is_in(domain, self.stream_name)
        if len(domain) != len(batch.domain):
            raise ValueError(
                "Stored logits are one vector for each row, and this model predicts one for each "
                "token. Use Replay(memory) with KeepPredictions(on='replay')."
            )
        stored = [value for part in batch.parts for value in part.columns[LOGITS]]
        kept = [value for value, chosen in zip(stored, mine.tolist(), strict=True) if chosen]
        own = logits[mine]
        old = [torch.as_tensor(value, dtype=own.dtype, device=own.device) for value in kept]
        if widest := max((len(value) for value in old), default=0):
            if widest > own.shape[1]:
                raise ValueError(
                    f"The memory's logits are of {widest} classes, and the model predicts "
                    f"{own.shape[1]}. Store them again: memory.with_logits(trainer)."
                )
            # A head that has grown keeps the old classes first; each row is compared over its own.
            stored_logits = nn.utils.rnn.pad_sequence(old, True, torch.nan)
            distance = (own[:, :widest] - stored_logits.nan_to_num()) * ~stored_logits.isnan()
            return distance.square().sum(), mine.sum()
        return own.sum() * 0, mine.sum()
