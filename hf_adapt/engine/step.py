"""The loss of one micro-batch: the task's, on all streams, and the terms of the objectives."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.batch import Batch
from hf_adapt.engine.collating import (
    DOMAIN,
    STAND_IN,
    STREAM_BATCHES,
    UNPAIRED,
    take_columns,
)
from hf_adapt.engine.forward import BaseLoss, ForwardPass
from hf_adapt.engine.metrics import FiniteGuard, MetricAverager
from hf_adapt.engine.mixins import FusedObjective, LearningRateControl, LossCombiner
from hf_adapt.engine.normalisation import StepCounts, count_labels
from hf_adapt.engine.parts import Layout, Part, added_ids
from hf_adapt.engine.plan import the_only
from hf_adapt.engine.probe import Probe
from hf_adapt.engine.progress import value_at
from hf_adapt.engine.streams import TRAINING, StreamTable
from hf_adapt.engine.terms import FUSED, TaskLosses, Terms

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.stream_data import StreamData


class TrainingStep:
    """Computes the loss of the micro-batches of an optimizer step.

    Args:
        trainer: The Trainer.
        model: The unwrapped model.
        adaptations: The active adaptations.
        data: The streams, or None if nothing is paired.
        base_loss: The Trainer's own `compute_loss`.
        extra_inputs: Inputs in the batches that are not for the model.

    Attributes:
        forward: The model's forward, captured.
        metrics: What is logged.
        guard: Watches for terms that are not finite.
        is_ready: Whether the first batch has been looked at.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        adaptations: Sequence[Adaptation],
        data: StreamData | None,
        base_loss: BaseLoss,
        extra_inputs: Collection[str],
    ) -> None:
        self.trainer = trainer
        self.adaptations = adaptations
        self.objectives = [a for a in adaptations if isinstance(a, Objective)]
        self.data = data
        self.extra_inputs = extra_inputs
        self.metrics, self.guard = MetricAverager(trainer.accelerator), FiniteGuard()
        controls = [a for a in adaptations if isinstance(a, LearningRateControl)]
        self.layout = Layout(
            model,
            StreamTable() if data is None else data.table,
            tuple(dict.fromkeys([*trainer.label_names, "labels"])),
            may_be_frozen=any(control.freezes for control in controls),
            added_ids=added_ids(trainer),
        )
        self.forward = ForwardPass(trainer, model, self.layout, adaptations, base_loss)
        self.counts = StepCounts(trainer, self.layout, self.objectives)
        combiner = the_only(adaptations, LossCombiner, "combine the losses")
        self.terms = Terms(self.objectives, self.counts, self.metrics, self.guard, combiner)
        self.is_ready = False
        self._fused: FusedObjective | None = None

    @property
    def progress(self) -> float:
        """`global_step / max_steps`."""
        state = self.trainer.state
        return state.global_step / max(1, state.max_steps)

    @property
    def _base_weight(self) -> float:
        """The factor of the task's own loss."""
        return math.prod(o.base_weight(self.progress) for o in self.objectives)

    def _has_loss(self, part: Part) -> bool:
        """Whether there is a task's loss to compute: it counts, or there are labels."""
        labels = {*self.trainer.label_names, "labels"} & set(part.inputs)
        unused = any(objective.source_free for objective in self.objectives)
        return (bool(labels) and not unused) or bool(self._base_weight)

    def _parts(self, inputs: Mapping[str, Any]) -> list[Part]:
        """Split a batch into what goes through the model together, without the domain column."""
        inputs = dict(inputs)
        separate = inputs.pop(STREAM_BATCHES, {})
        if DOMAIN not in inputs:
            if self.data is not None:
                raise ValueError(UNPAIRED)
            rows = next((v.shape[0] for v in inputs.values() if isinstance(v, torch.Tensor)), 0)
            inputs[DOMAIN] = torch.zeros(rows, dtype=torch.long, device=self.trainer.args.device)
        parts = []
        for stream, batch in {TRAINING: inputs, **separate}.items():
            given = dict(batch)
            domain, stands_in = given.pop(DOMAIN), given.pop(STAND_IN, None) is not None
            columns = take_columns(given, len(domain))
            extra = {k: given.pop(k) for k in self.extra_inputs if k in given}
            added = self.layout.added_tokens(given)
            part = Part(given, domain, stream, columns=columns, extra=extra, added=added)
            part.is_stand_in = stands_in
            parts.append(part)
        return parts

    def _wanted(self, parts: list[Part]) -> list[Part]:
        """The same without the rows of streams that no objective looks at in this step."""
        table = self.layout.table
        joined = set(table.names) - table.separate - {TRAINING}
        plain = [number for number, n in enumerate(table.names) if n in {TRAINING, *table.labelled}]
        found = []
        for part in parts:
            streams = joined if part.stream == TRAINING else {part.stream}
            readers = [o for o in self.objectives if streams & set(o.streams)]
            masks = [mask for o in readers if (mask := o.wanted_rows(part)) is not None]
            if not masks or len(masks) < len(readers) or part.is_stand_in:
                found.append(part)
                continue
            kept = torch.isin(part.domain, torch.tensor(plain).to(part.domain))
            kept = torch.stack([kept, *(mask.to(kept.device) for mask in masks)]).any(0)
            if bool(kept.all()):
                found.append(part)
            elif bool(kept.any()):
                found.append(replace(part.select(kept), whole=None, kept=None).without_padding())
            else:  # all processes must run the same forwards
                first = torch.zeros_like(kept)
                first[0] = True
                stand_in = replace(part.select(first), whole=None, kept=None)
                stand_in.is_stand_in = True
                found.append(stand_in)
        return found

    def _batch(self, model: nn.Module, parts: list[Part]) -> Batch:
        def run(part: Part, is_changed: bool) -> Part:
            with ExitStack() as stack:
                for adaptation in self.adaptations if is_changed else ():
                    stack.enter_context(adaptation.around_changed_forward())
                stack.enter_context(self.trainer.compute_loss_context_manager())
                return self.forward.features(model, part)

        return Batch(parts, self.layout, self.progress, self.metrics, run)

    def evaluated(self, inputs: Mapping[str, Any], stream: str, forward: bool = True) -> Batch:
        """Rows of one stream after a forward without a loss, outside the run's own batches.

        Args:
            inputs: The batch.
            stream: Whose rows they are.
            forward: Whether there is a forward; the batch has no outputs else.
        """
        model = self.trainer.model_wrapped
        part, *_ = self._parts(inputs)
        part.stream = stream if stream in self.layout.table.separate else TRAINING
        if forward:
            with self.trainer.compute_loss_context_manager():
                self.forward.features(model, part)
        return self._batch(model, [part])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, Any]:
        """The base loss and all terms on one micro-batch, scaled as the Trainer expects.

        Returns:
            The loss and the model's outputs.
        """
        parts = self._wanted(self._parts(inputs))
        if self._fused is not None:
            task = self._fused_losses(model, self._fused, parts, num_items_in_batch)
        else:
            task = self._task_losses(model, parts, num_items_in_batch)
        return self.terms.add(task, self._batch(model, parts)), parts[0].outputs

    def _task_losses(
        self, model: nn.Module, parts: list[Part], num_items_in_batch: Any
    ) -> TaskLosses:
        """The task's losses; all parts have their outputs then."""
        first, counts = parts[0], self.counts
        divided = counts.divisor(num_items_in_batch)

        def loss_of(items: Any) -> torch.Tensor:
            return self.forward.task_loss(model, first, items, self._has_loss(first))

        nothing = torch.zeros((), device=self.trainer.args.device)
        if first.is_stand_in:  # the rows of this micro-batch are all of other tasks
            with torch.set_grad_enabled(counts.processes > 1):
                outputs = self.forward.features(model, first).outputs
            loss = nothing if counts.processes == 1 else _nothing(outputs)
        else:
            loss = counts.task_loss(loss_of, first, num_items_in_batch)
        own_losses = dict.fromkeys(sorted(self.layout.table.labelled), nothing)
        for part in parts[1:]:
            if part.stream in self.layout.table.unread:
                continue
            if part.is_stand_in or part.stream not in own_losses:
                self.forward.features(model, part)
                continue

            def stream_loss_of(items: Any, part: Part = part) -> torch.Tensor:
                return self.forward.task_loss(model, part, items)

            own_losses[part.stream] = counts.stream_loss(stream_loss_of, part, num_items_in_batch)
        streams = {} if self.data is None else self.data.streams
        weighted = {
            name: (own, value_at(streams[name].weight, self.progress) if name in streams else 1.0)
            for name, own in own_losses.items()
        }
        # What this micro-batch adds to the step's loss, so that sums over the step are exact.
        steps = counts.steps
        count = counts.has_items(TRAINING) / steps
        self.metrics.add("loss/task", loss.detach() * (steps / divided), count)
        return TaskLosses(loss, self._base_weight, weighted, divided)

    def _fused_losses(
        self,
        model: nn.Module,
        objective: FusedObjective,
        parts: list[Part],
        num_items_in_batch: Any,
    ) -> TaskLosses:
        """The same, where an objective computes its term together with the task's loss."""
        (part,), counts, steps = parts, self.counts, self.counts.steps
        divided = counts.divisor(num_items_in_batch)
        base_scale = counts.fused_base_scale(part, num_items_in_batch)
        term_scale = counts.fused_term_scale(objective, FUSED, parts)
        weight = objective.term_weight(self.progress)
        with ExitStack() as stack:
            for adaptation in self.adaptations:
                stack.enter_context(adaptation.around_forward(part.inputs))
            with self.forward.recording(part):
                fused = objective.fused_loss(
                    model,
                    part,
                    base_scale * (divided * self._base_weight),
                    term_scale * (divided * weight),
                    self.progress,
                )
        part.outputs, part.is_fused = fused.outputs, True
        self.metrics.add("loss/task", fused.base_sum * base_scale * steps, 1 / steps)
        term = fused.term_sum * term_scale
        return TaskLosses(fused.loss, 1.0, {}, divided, (objective, term))

    def look_at(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Look at a first batch: how the loss is normalised, which modules are needed."""
        self.is_ready = True
        probe = Probe(
            self.trainer, self.adaptations, self.forward, self.counts, self.layout, self._batch
        )
        parts = self._parts(inputs)
        parts[0].is_stand_in = False  # of several tasks' rows there may be none of the model's own
        self._fused = probe.run(model, parts, self._has_loss)

    def count(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the labels and items of all micro-batches of a step, on all processes."""
        self.counts.count([self._wanted(self._parts(inputs)) for inputs in batches])

    def first_labelled(self, batches: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The first batch with a label: a loss over none is NaN and shows nothing."""
        labelled = (b for b in batches if (count_labels(self.trainer, b) or 0) > 0)
        return next(labelled, batches[0])


def _nothing(outputs: Any) -> torch.Tensor:
    """0 with a gradient of 0 at everything that made these outputs: DDP waits for all of them."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    given = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    return sum((v.float().sum() * 0.0 for v in given), torch.zeros((), device=given[0].device))
