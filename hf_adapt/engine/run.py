"""One training run with adaptations: what happens between `train()` and its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.auxiliary import base_schedule
from hf_adapt.engine.batch import Batch, Layout, Part
from hf_adapt.engine.checkpoint import AuxiliaryState, SavedState
from hf_adapt.engine.collating import DOMAIN, STREAM_BATCHES, UNPAIRED, take_columns
from hf_adapt.engine.forward import BaseLoss, ForwardPass
from hf_adapt.engine.gradients import transform_gradients
from hf_adapt.engine.metrics import FiniteGuard, MetricAverager
from hf_adapt.engine.mixins import (
    FusedObjective,
    GradientTransform,
    LearningRateControl,
    LossCombiner,
    WeightAverage,
)
from hf_adapt.engine.normalisation import StepCounts, count_labels
from hf_adapt.engine.probe import Probe
from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.engine.rates import DividedGroups
from hf_adapt.engine.streams import TRAINING, StreamTable
from hf_adapt.engine.terms import FUSED, TaskLosses, Terms
from hf_adapt.engine.training import forget_compiled
from hf_adapt.engine.weights import SwappedWeights

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Trainer

    from hf_adapt.engine.stream_data import StreamData

logger = logging.getLogger(__name__)


class AdaptationRun:
    """The state of one `train()`: it calls the adaptations and joins what the engine is made of.

    Args:
        trainer: The Trainer, before its dataloader and optimizer exist.
        adaptations: The active adaptations.
        data: The streams, or None if nothing is paired.
        base_loss: The Trainer's own `compute_loss`.
        auxiliary: What an earlier run of the same model left, or None.
        extra_inputs: Inputs in the batches that are not for the model.
    """

    def __init__(
        self,
        trainer: Trainer,
        adaptations: Sequence[Adaptation],
        data: StreamData | None,
        base_loss: BaseLoss,
        auxiliary: AuxiliaryState | None,
        extra_inputs: Collection[str] = (),
    ) -> None:
        self.trainer = trainer
        self.adaptations = list(adaptations)
        self.objectives = [a for a in adaptations if isinstance(a, Objective)]
        self.controls = [a for a in adaptations if isinstance(a, LearningRateControl)]
        self.data = data
        self.model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        if auxiliary is None or not auxiliary.belongs_to(self.model, adaptations):
            auxiliary = AuxiliaryState(self.model, adaptations)
        self.auxiliary = auxiliary
        self.extra_inputs = extra_inputs
        self.metrics = MetricAverager(trainer.accelerator)
        self.guard = FiniteGuard()
        self.layout = Layout(
            self.model,
            StreamTable() if data is None else data.table,
            tuple(dict.fromkeys([*trainer.label_names, "labels"])),
            may_be_frozen=any(a.freezes for a in self.controls),
        )
        self.forward = ForwardPass(trainer, self.model, self.layout, self.adaptations, base_loss)
        self.counts = StepCounts(trainer, self.layout, self.objectives)
        combiner = _the_only(self.adaptations, LossCombiner, "combine the losses")
        self.terms = Terms(self.objectives, self.counts, self.metrics, self.guard, combiner)
        average = _the_only(self.adaptations, WeightAverage, "bring weights for evaluation")
        self.weights = SwappedWeights(self.model, average)
        self.saved = SavedState(None)
        self._is_ready = False
        self._resumes = False
        self._fused: FusedObjective | None = None
        self._schedule: Callable[[int], float] | None = None
        self._divided_groups = DividedGroups()

    # ---- start and end ----

    def start(self, checkpoint: str | None = None) -> None:
        """Check the adaptations against the model and capture its outputs.

        Args:
            checkpoint: The folder that the run resumes from, if it does.
        """
        self.saved = SavedState(checkpoint)
        forget_compiled(self.trainer)
        for adaptation in self.adaptations:
            adaptation.setup(self.trainer)
        self.forward.connect()

    def begin(self) -> None:
        """The model is wrapped and the optimizer exists."""
        for adaptation in self.adaptations:
            adaptation.begin(self.trainer)

    def finish(self) -> None:
        """The run has ended well."""
        self.guard.check()
        for adaptation in self.adaptations:
            adaptation.finish(self.trainer)
        self.weights.replace_final()

    def close(self) -> None:
        """Remove all hooks and restore what was changed."""
        self._divided_groups.restore()
        for adaptation in self.adaptations:
            adaptation.close()
        self.forward.close()

    @property
    def checkpoint(self) -> str | None:
        """The folder that the run resumes from."""
        return self.saved.folder

    @property
    def lr_schedule(self) -> Schedule | None:
        """The learning-rate schedule that an adaptation has in place of the Trainer's."""
        given = [a for a in self.controls if a.lr_schedule is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(a.name for a in given)} each have a learning-rate schedule; a "
                "run has one. Give lr_schedule to one of them."
            )
        return given[0].lr_schedule if given else None

    @contextmanager
    def loading_optimizer(self) -> Iterator[None]:
        """Around the reading of the main optimizer's state."""
        with ExitStack() as stack:
            for control in self.controls:
                stack.enter_context(control.around_optimizer_load(self.saved.of(control)))
            yield

    def resume(self) -> None:
        """Restore the auxiliary state from the checkpoint once the modules are built."""
        self._resumes = True

    # ---- one micro-batch ----

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
        return bool(labels) or bool(self._base_weight)

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
            domain = given.pop(DOMAIN)
            columns = take_columns(given, len(domain))
            extra = {k: given.pop(k) for k in self.extra_inputs if k in given}
            parts.append(Part(given, domain, stream, columns=columns, extra=extra))
        return parts

    def _batch(self, model: nn.Module, parts: list[Part]) -> Batch:
        def run(part: Part) -> Part:
            with self.trainer.compute_loss_context_manager():
                return self.forward.features(model, part)

        return Batch(parts, self.layout, self.progress, self.metrics, run)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, Any]:
        """The base loss and all terms on one micro-batch, scaled as the Trainer expects.

        Returns:
            The loss and the model's outputs.
        """
        self.ensure_ready(model, inputs)
        parts = self._parts(inputs)
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

        loss = counts.task_loss(loss_of, first, num_items_in_batch)
        streams = {}
        for part in parts[1:]:
            if self.data is None or part.stream not in self.data.table.labelled:
                self.forward.features(model, part)
                continue

            def stream_loss_of(items: Any, part: Part = part) -> torch.Tensor:
                return self.forward.task_loss(model, part, items)

            own = counts.stream_loss(stream_loss_of, part, num_items_in_batch)
            streams[part.stream] = (
                own,
                value_at(self.data.streams[part.stream].weight, self.progress),
            )
        # What this micro-batch adds to the step's loss, so that sums over the step are exact.
        steps = counts.steps
        self.metrics.add("loss/task", loss.detach() * (steps / divided), 1 / steps)
        return TaskLosses(loss, self._base_weight, streams, divided)

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

    def ensure_ready(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """On the first batch of a run: probe the loss, build modules, read the checkpoint."""
        if self._is_ready:
            return
        self._is_ready = True
        probe = Probe(
            self.trainer, self.adaptations, self.forward, self.counts, self.layout, self._batch
        )
        self._fused = probe.run(model, self._parts(inputs), self._has_loss)
        self.auxiliary.make_optimizer()
        if self._resumes:
            self.auxiliary.restore(self.saved)

    # ---- each optimizer step ----

    def begin_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the items of all micro-batches of the coming optimizer step, on all processes."""
        self.counts.reset()
        if not batches or not isinstance(batches[0], Mapping):
            return  # rows that the Trainer makes into batches later (GRPO's prompts)
        if not self._is_ready:
            labelled = (b for b in batches if (count_labels(self.trainer, b) or 0) > 0)
            first = next(labelled, batches[0])  # a loss over no label is NaN and shows nothing
            prepared = self.trainer._prepare_inputs(dict(first))
            self.ensure_ready(self.trainer.model_wrapped, prepared)
        self.counts.count([self._parts(inputs) for inputs in batches])

    def before_step(self) -> None:
        """An optimizer step begins."""
        for adaptation in self.adaptations:
            adaptation.before_step(self.trainer.state.global_step)

    def after_backward(self) -> None:
        """The last backward of an optimizer step is done, and nothing is clipped yet."""
        transforms = [a for a in self.adaptations if isinstance(a, GradientTransform)]
        transform_gradients(self.trainer, self.model, transforms)

    def before_main_step(self) -> None:
        """Check the terms, make the auxiliary gradients ready and set the model's rates."""
        step = self.trainer.state.global_step
        self.guard.end_step(step)
        if self.auxiliary.optimizer is not None:
            for name, norm in self.auxiliary.optimizer.before_main_step(self.trainer).items():
                self.metrics.add(f"{name}/module_gradient_norm", norm)
        assert self.trainer.optimizer is not None
        self._divided_groups.apply(
            self.trainer.optimizer, [control.lr_multipliers(step) for control in self.controls]
        )

    def after_main_step(self) -> None:
        """Restore the model's own rates and step the auxiliary optimizer."""
        self._divided_groups.restore()
        if self.auxiliary.optimizer is not None:
            if self._schedule is None:
                self._schedule = base_schedule(self.trainer)
            self.auxiliary.optimizer.after_main_step(self.trainer, self._schedule)

    def drain_metrics(self) -> dict[str, float]:
        """What to add to a training log."""
        metrics = self.metrics.drain()
        for adaptation in self.adaptations:
            adaptation.on_log(metrics, self.progress)
        return metrics

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        """An evaluation has ended."""
        for adaptation in self.adaptations:
            adaptation.on_evaluate(metrics, self.trainer.state.global_step)


class RunCallback(TrainerCallback):
    """Hears the Trainer's events for a run; in the callback list only while the run lasts."""

    def __init__(self, run: AdaptationRun) -> None:
        self.run = run

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch of the paired dataset (accelerate does not always)."""
        if self.run.data is not None:
            self.run.data.set_epoch(int(state.epoch or 0))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is wrapped, the optimizer made, a checkpoint loaded."""
        self.run.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The micro-batches of an optimizer step follow."""
        self.run.before_step()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """An evaluation during training has ended; nothing is saved yet."""
        self.run.on_evaluate(metrics or {})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are complete."""
        self.run.before_main_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The main optimizer has stepped, or has skipped."""
        self.run.after_main_step()


def _the_only(adaptations: Sequence[Adaptation], kind: type[Any], what: str) -> Any:
    """The adaptation of a kind of which a run has one at most.

    Raises:
        ValueError: If there are several.
    """
    found = [a for a in adaptations if isinstance(a, kind)]
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(a.name for a in found)} both {what}, and a run has one way to do so. "
            "Drop one of them."
        )
    return found[0] if found else None
