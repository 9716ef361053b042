"""Where the importance of the weights comes from: rows of the past, or the training itself."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.continual.importance import (
    Normalization,
    fisher_diagonal,
    mas_importance,
)
from hf_adapt.continual.importance_folder import SavedImportance, load_importance
from hf_adapt.continual.prepared_rows import Collator, prepared_rows, rows_of
from hf_adapt.distillation.fingerprints import sampled_fingerprint

if TYPE_CHECKING:
    from transformers import Trainer

Previous = str | os.PathLike[str] | Mapping[str, torch.Tensor]
"""An importance that is known: a folder, or a tensor for each weight's name."""


class _RowImportance:
    """An importance that is computed from rows when training begins, and added to a previous one.

    Args:
        rows: Prepared rows of the past, as `train_dataset` is, or a [`ReplayMemory`].
        max_rows: How many rows to use; they are drawn at random. All by default.
        normalize: What all values are divided by: their `"median"`, `"mean"`, `"max"`, or None.
        previous: The importance for the tasks before: a folder, or a tensor for each name.
        decay: How much of the previous importance is kept: F ← decay · F_previous + F.
        seed: Seed of what is drawn.

    Raises:
        TypeError: If the rows are none.
        ValueError: If there are no rows, or the decay is out of range.
    """

    def __init__(
        self,
        rows: Any,
        *,
        max_rows: int | None = None,
        normalize: Normalization | None = "median",
        previous: Previous | None = None,
        decay: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} must lie in [0, 1]; 1 forgets no earlier task.")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be at least 1, or None for all rows.")
        self.rows = rows_of(rows, type(self).__name__)
        self.max_rows, self.normalize = max_rows, normalize
        self.previous, self.decay, self.seed = previous, decay, seed

    def compute(self, model: nn.Module, trainer: Trainer) -> dict[str, torch.Tensor]:
        """The importance at the model's weights, without the previous one, in its own units."""
        rows, collator = prepared_rows(trainer, self.rows)
        return self._of_rows(
            model,
            rows,
            collator,
            max_rows=self.max_rows,
            seed=self.seed,
            accelerator=trainer.accelerator,
        )

    @abstractmethod
    def _of_rows(
        self, model: nn.Module, rows: Any, collator: Collator, **options: Any
    ) -> dict[str, torch.Tensor]:
        """The importance for these rows."""


class Fisher(_RowImportance):
    """The Fisher information of rows of the past, computed when training begins (EWC).

    See [`fisher_diagonal`] for what it is and which rows need labels. With `previous` it is online
    EWC: the weights are pulled to those of the last task alone, with the importance of all of them.

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796; online: Schwarz et al. 2018, "Progress & Compress", section 3,
        arXiv:1805.06370.

    Args:
        rows: Prepared rows of the past, as `train_dataset` is, or a [`ReplayMemory`]. They are
            collated by the Trainer's collator.
        batch_size: Rows in a batch.
        exact: Item by item and class by class, instead of drawing labels; for few classes.
        **options: `max_rows`: how many rows to use, drawn at random (all by default);
            `normalize`: what all values are divided by, see [`fisher_diagonal`] (the median);
            `previous` and `decay`: the importance for the tasks before (a folder, or a tensor for
            each name) and how much of it is kept, F ← decay · F_previous + F; `seed`.

    Raises:
        TypeError: If the rows are none.
        ValueError: If there are no rows, or an option is out of range.

    Example:
        ```python
        Consolidation(Fisher(task_2, previous="runs/ewc", decay=0.9), save_to="runs/ewc")
        ```
    """

    def __init__(
        self, rows: Any, *, batch_size: int = 8, exact: bool = False, **options: Any
    ) -> None:
        super().__init__(rows, **options)
        self.batch_size, self.exact = batch_size, exact

    def _of_rows(
        self, model: nn.Module, rows: Any, collator: Collator, **options: Any
    ) -> dict[str, torch.Tensor]:
        return fisher_diagonal(
            model, rows, collator, batch_size=self.batch_size, exact=self.exact, **options
        )


class MAS(_RowImportance):
    """Memory-aware synapses of rows of the past, computed when training begins.

    See [`mas_importance`]. Of the rows, labels are needed by taggers alone, so that unlabelled rows
    of the domain where the model is to be kept will do. It takes one backward for each row: set
    `max_rows` where there are many.

    Reference:
        Aljundi et al. 2018, "Memory Aware Synapses", arXiv:1711.09601.

    Args:
        rows: Prepared rows, as `train_dataset` is, or a [`ReplayMemory`]. They are collated by the
            Trainer's collator.
        **options: `max_rows`, `normalize`, `previous`, `decay` and `seed`, as for [`Fisher`].

    Raises:
        TypeError: If the rows are none.
        ValueError: If there are no rows, or an option is out of range.

    Example:
        ```python
        Consolidation(MAS(unlabelled, max_rows=1000))
        ```
    """

    def _of_rows(
        self, model: nn.Module, rows: Any, collator: Collator, **options: Any
    ) -> dict[str, torch.Tensor]:
        return mas_importance(model, rows, collator, **options)


class SI:
    r"""Synaptic intelligence: what each weight did for the loss, found while a task is trained.

    .. math::
        \Omega_i \leftarrow \Omega_i + \frac{\max(0, \omega_i)}{(\Delta\theta_i)^2 + \xi}, \qquad
        \omega_i = -\sum_t g_i(t) \, \Delta\theta_i(t)

    g is the gradient of the training loss before a penalty is written onto it, Δθ(t) the move of an
    optimizer step, Δθ that of the whole run. The importance counts from the next task on: train
    task after task with the same object, or through `save_to` and `previous`.

    Reference:
        Zenke et al. 2017, "Continual Learning Through Synaptic Intelligence", Eq. 3-5,
        arXiv:1703.04200. Deviation: a weight that has raised the loss gets no negative importance.

    Args:
        damping: ξ, which keeps weights that hardly moved from being all-important.
        normalize: What the values of all tasks together are divided by: their `"median"` (without
            zeros), `"mean"`, `"max"`, or None.
        previous: The importance for the tasks before: a folder, or a tensor for each name.

    Raises:
        ValueError: If the damping is not positive.

    Example:
        ```python
        Consolidation(SI(previous="runs/si"), save_to="runs/si")
        ```
    """

    def __init__(
        self,
        damping: float = 0.1,
        *,
        normalize: Normalization | None = "median",
        previous: Previous | None = None,
    ) -> None:
        if not damping > 0:
            raise ValueError(f"damping={damping} must be positive.")
        self.damping, self.normalize, self.previous = damping, normalize, previous
        self.path: dict[str, torch.Tensor] = {}
        self._total: dict[str, torch.Tensor] = {}
        self._model: str | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(
        self, weights: Mapping[str, nn.Parameter], resumes: bool = False
    ) -> dict[str, torch.Tensor]:
        """Follow these weights from now on.

        Args:
            weights: The weights.
            resumes: Whether they are those of a run that was interrupted.

        Returns:
            The importance for the tasks that this object has seen.
        """
        is_other = self._model is not None and self._model != fingerprint_of(weights)
        if is_other and not resumes:
            raise ValueError(
                "This SI object has seen another model than the one that training starts from now, "
                "whose importance would be that of other weights. Make a new SI() for each "
                "sequence of trainings of one model."
            )
        self._weights, self._before = dict(weights), {}
        self.path = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}
        return self._total

    def see_gradients(self) -> None:
        """Keep the gradients of a step and the weights before it."""
        self._before = {
            name: (weight.grad.clone(), weight.detach().clone())
            for name, weight in self._weights.items()
            if weight.grad is not None
        }

    def see_step(self) -> None:
        """The weights have moved."""
        for name, (gradient, before) in self._before.items():
            move = self._weights[name].detach().float() - before.float()
            self.path[name].addcmul_(gradient.float(), move, value=-1)
        self._before = {}

    def finish(
        self, start: Mapping[str, torch.Tensor], importance: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """A task has been trained.

        Args:
            start: The weights before.
            importance: The importance for the tasks before; empty if there were none.

        Returns:
            The importance with this task's.
        """
        found = {
            name: path.clamp(min=0)
            / ((self._weights[name].detach().float() - start[name].float()) ** 2 + self.damping)
            for name, path in self.path.items()
        }
        self._total = {n: value + importance.get(n, 0.0) for n, value in found.items()}
        self._model = fingerprint_of(self._weights)
        return self._total

    def close(self) -> None:
        """Forget the weights."""
        self._weights, self._before, self.path = {}, {}, {}


def fingerprint_of(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of a sample of some weights."""
    holder = nn.Module()
    for number, name in enumerate(sorted(weights)):
        holder.register_buffer(str(number), weights[name].detach())
    return sampled_fingerprint(holder)


def known_importance(given: Any) -> SavedImportance:
    """What a folder holds, or the tensors themselves.

    Raises:
        TypeError: If it is neither.
        FileNotFoundError: If the folder has no importance.
    """
    if isinstance(given, (str, os.PathLike)):
        return load_importance(os.fspath(given))
    if isinstance(given, Mapping) and all(isinstance(v, torch.Tensor) for v in given.values()):
        return SavedImportance(given)
    raise TypeError(
        f"Expected an importance, got {type(given).__name__}: None (all weights alike), "
        "Fisher(rows), MAS(rows), SI(), the folder of one that was saved, or a dict with a tensor "
        "for each weight's name."
    )
