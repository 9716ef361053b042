"""How a micro-batch's losses must be scaled so that accumulation and processes change nothing.

Two facts about the Trainer decide it. It divides a loss by the number of accumulated micro-batches
unless it takes the loss to be scaled already; and it takes every model whose forward has
`**kwargs` to have divided by `num_items_in_batch`, which sequence- and token-classification heads,
among others, do not do (transformers issue 47688).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_adapt.engine.adaptation import Objective
from hf_adapt.engine.batch import Rows
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.parts import Layout, Part
from hf_adapt.engine.streams import TRAINING
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer


def trainer_divides(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Whether `training_step` will divide the loss by the number of micro-batches."""
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    if declared is not None:
        return not declared
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not counted and trainer.compute_loss_func is None


def data_parallel_size(trainer: Trainer) -> int:
    """Number of processes that see batches of their own (the gradients are averaged over them)."""
    tensor_parallel = getattr(trainer, "get_tp_size", lambda: 1)()
    return int(trainer.accelerator.num_processes // max(1, tensor_parallel))


def count_labels(trainer: Trainer, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Number of labels of a micro-batch that its loss averages over, or None if unknown."""
    return label_count(trainer.accelerator.unwrap_model(trainer.model), inputs)


def label_count(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Number of labels that a model's loss averages over, or None if unknown.

    A causal language model never predicts its first token.
    """
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, torch.Tensor) or labels.ndim == 0:
        return None
    model = unwrapped_base(model)
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    if (
        shifts
        and not is_encoder_decoder(model)
        and "shift_labels" not in inputs
        and labels.ndim > 1
    ):
        labels = labels[..., 1:]
    return labels.ne(IGNORED).sum()


class StepCounts:
    """The labels and items of one optimizer step, and every scale that follows from them.

    A loss or term of a micro-batch becomes its share: the shares of all micro-batches and
    processes of a step add up to the mean over the step.

    Args:
        trainer: The Trainer.
        layout: What is known of the model's outputs.
        objectives: The objectives, asked for the items of their terms.

    Attributes:
        ignores_num_items: Whether the training loss is a mean although the Trainer takes it to be
            divided by `num_items_in_batch`, or a mean of means would be wrong.
    """

    def __init__(self, trainer: Trainer, layout: Layout, objectives: Sequence[Objective]) -> None:
        self.trainer = trainer
        self.layout = layout
        self.objectives = objectives
        self.ignores_num_items = False
        self._labels: dict[str, torch.Tensor] = {}
        self._items: dict[str, torch.Tensor] = {}

    @property
    def steps(self) -> int:
        """Number of micro-batches of this optimizer step in this process."""
        return int(self.trainer.current_gradient_accumulation_steps)

    @property
    def processes(self) -> int:
        """Number of processes that see batches of their own."""
        return data_parallel_size(self.trainer)

    def divisor(self, num_items_in_batch: Any) -> int:
        """By what the Trainer will divide the loss of a micro-batch."""
        return self.steps if trainer_divides(self.trainer, num_items_in_batch) else 1

    # ---- counting ----

    def reset(self) -> None:
        """Forget the counts of the last step."""
        self._labels, self._items = {}, {}

    def count(self, batches: Sequence[list[Part]]) -> None:
        """Count the labels and items of all micro-batches of a step, on all processes."""
        device = self.trainer.args.device
        # A process may have no row of a stream in this step: the tables must agree.
        counted = {
            ("labels", name): torch.zeros((), dtype=torch.float64, device=device)
            for name in sorted(self.layout.table.labelled | self._may_lack_rows)
        }
        for parts in batches:
            for key, count in self._counts_of(parts).items():
                if count is not None:
                    count = torch.as_tensor(count, dtype=torch.float64, device=device)
                    counted[key] = counted[key] + count if key in counted else count
        if counted and self.trainer.accelerator.num_processes > 1:
            names = sorted(counted)
            table = torch.stack([counted[name] for name in names])
            table = self.trainer.accelerator.reduce(table, reduction="sum")
            counted = dict(zip(names, table.unbind(), strict=True))
        self._labels = {name: n for (kind, name), n in counted.items() if kind == "labels"}
        self._items = {name: n for (kind, name), n in counted.items() if kind == "items"}

    @property
    def _may_lack_rows(self) -> set[str]:
        """The training rows, where a process may have none of the model's own task in a step."""
        return set() if self.layout.table.routing is None else {TRAINING}

    def has_items(self, stream: str) -> torch.Tensor | float:
        """1 if this step has a label of a stream, in any process, else 0."""
        if stream == TRAINING and self.layout.table.routing is None:
            return 1.0
        count = self._labels.get(stream)
        return 1.0 if count is None else (count > 0).to(torch.float32)

    def has_component(self, name: str, component: str) -> torch.Tensor | float:
        """1 if this step has an item of a component of an objective's term, else 0."""
        total = self._item_total(name, component)
        return 1.0 if total is None else (total > 0).to(torch.float32)

    def _counts_of(self, parts: list[Part]) -> dict[tuple[str, str], torch.Tensor | None]:
        counts: dict[tuple[str, str], torch.Tensor | None] = {}
        for part in parts:
            if part.is_stand_in:
                continue
            if part.stream == TRAINING:
                counts["labels", TRAINING] = count_labels(self.trainer, part.inputs)
            elif part.stream in self.layout.table.labelled:
                counts["labels", part.stream] = self._stream_items(part)
        rows = Rows(parts, self.layout)
        for objective in self.objectives:
            items = objective.num_items(rows.for_objective(objective))
            named = items if isinstance(items, Mapping) else {"": items}
            for name, count in named.items():
                counts["items", f"{objective.name}/{name}".rstrip("/")] = count
        return counts

    # ---- shares ----

    def task_loss(
        self, loss_of: Callable[[Any], torch.Tensor], part: Part, num_items_in_batch: Any
    ) -> torch.Tensor:
        """The task's loss on the training rows, as the Trainer expects it from `compute_loss`.

        Args:
            loss_of: The loss, given the number of items to divide by (None for the mean).
            part: The rows; the loss is computed on them.
            num_items_in_batch: The Trainer's own count.
        """
        items = count_labels(self.trainer, part.inputs)
        if self.ignores_num_items:
            assert items is not None
            return self._weighed(loss_of(None), part, self.divisor(num_items_in_batch), items)
        loss = loss_of(num_items_in_batch)
        if items is not None:  # without a label in the whole step it is 0 / 0
            loss = torch.where((items > 0) | ~loss.isnan(), loss, torch.zeros_like(loss))
        return loss

    def stream_loss(
        self, loss_of: Callable[[Any], torch.Tensor], part: Part, num_items_in_batch: Any
    ) -> torch.Tensor:
        """The task's loss on a labelled stream, normalised by the stream's own labels.

        Where the labels cannot be counted (question answering), by its rows.
        """
        divided, items = self.divisor(num_items_in_batch), self._stream_items(part)
        counted = self.trainer.model_accepts_loss_kwargs or self.trainer.compute_loss_func
        if self.ignores_num_items or num_items_in_batch is None or not counted:
            return self._weighed(loss_of(None), part, divided, items)
        total = self._labels.get(part.stream, items).clamp(min=1).round().long()
        # The Trainer itself multiplies by the processes where its count is that of all of them.
        everywhere = self.trainer.args.average_tokens_across_devices
        loss = loss_of(total) * (divided * (1 if everywhere else self.processes))
        return torch.where(items > 0, loss, torch.zeros_like(loss))

    def _stream_items(self, part: Part) -> torch.Tensor:
        """The labels of a labelled stream's rows; the rows, where labels cannot be counted."""
        items = count_labels(self.trainer, part.inputs)
        return torch.tensor(len(part.domain), device=part.domain.device) if items is None else items

    def _weighed(
        self, mean: torch.Tensor, part: Part, divided: int, items: torch.Tensor
    ) -> torch.Tensor:
        """A mean over a part's labels (or rows), weighted by their share in the step's."""
        total = self._labels.get(part.stream, items)
        loss = mean * (items / total.clamp(min=1)).to(mean.dtype) * (self.processes * divided)
        return torch.where(items > 0, loss, torch.zeros_like(loss))  # a mean over none is NaN

    def component(
        self, name: str, component: str, value: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The share of a component of an objective's term.

        Args:
            name: The objective's name.
            component: The component's name, "" for the whole term.
            value: A mean over the micro-batch, or a (sum, count).
        """
        if not isinstance(value, tuple):
            return value / self.steps
        total = self._item_total(name, component)
        if total is None:  # a user's own loop, which counts nothing beforehand
            total = value[1].double() * self.steps
        scale: torch.Tensor = (self.processes / total.clamp(min=1)).to(value[0].dtype)
        return value[0] * scale

    def _item_total(self, name: str, component: str) -> torch.Tensor | None:
        """The items of a component in the step, or of its whole term; None if nothing counted."""
        return self._items.get(f"{name}/{component}", self._items.get(name))

    # ---- fused losses ----

    def counts_base(self, num_items_in_batch: Any) -> bool:
        """Whether the base loss is divided by the Trainer's own count."""
        counted = self.trainer.model_accepts_loss_kwargs and not self.ignores_num_items
        return counted and num_items_in_batch is not None

    def fused_base_scale(self, part: Part, num_items_in_batch: Any) -> torch.Tensor:
        """The factor that makes the sum of the task's loss over a part's labels a share."""
        if self.counts_base(num_items_in_batch):  # as the Trainer has it, first tokens included
            total = torch.as_tensor(num_items_in_batch, device=self.trainer.args.device)
            everywhere = self.trainer.args.average_tokens_across_devices
            processes = self.trainer.accelerator.num_processes if everywhere else 1
        else:
            items = count_labels(self.trainer, part.inputs)
            assert items is not None
            total, processes = self._labels.get(part.stream, items), self.processes
        return (processes / total.clamp(min=1)).to(torch.float32)

    def fused_term_scale(
        self, objective: Objective, component: str, parts: list[Part]
    ) -> torch.Tensor:
        """The factor that makes the sum of an objective's term over a micro-batch a share."""
        total = self._item_total(objective.name, component)
        if total is None:  # a user's own loop, which counts nothing beforehand
            counts = objective.num_items(Rows(parts, self.layout).for_objective(objective))
            counts = counts[component] if isinstance(counts, Mapping) else counts
            assert counts is not None
            total = counts.double() * self.steps
        device = self.trainer.args.device
        return (self.processes / total.to(device).clamp(min=1)).to(torch.float32)
