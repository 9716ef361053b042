"""One training run with adaptations: what happens between `train()` and its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.auxiliary import base_schedule
from hf_adapt.engine.checkpoint import AuxiliaryState, SavedState
from hf_adapt.engine.forward import BaseLoss
from hf_adapt.engine.gradients import WeightTransforms, transform_gradients
from hf_adapt.engine.mixins import (
    GradientTransform,
    LearningRateControl,
    WeightAverage,
    WeightTransform,
)
from hf_adapt.engine.plan import the_only
from hf_adapt.engine.progress import Schedule
from hf_adapt.engine.rates import DividedGroups
from hf_adapt.engine.step import TrainingStep
from hf_adapt.engine.training import forget_compiled
from hf_adapt.engine.weights import SwappedWeights
from hf_adapt.models.state import preserved_random_state

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.stream_data import StreamData

logger = logging.getLogger(__name__)

Pass = dict[str, torch.Tensor]
"""What a pass over the rows of a stream has found."""


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
        self.controls = [a for a in adaptations if isinstance(a, LearningRateControl)]
        self.data = data
        self.model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        if auxiliary is None or not auxiliary.belongs_to(self.model, adaptations):
            auxiliary = AuxiliaryState(self.model, adaptations)
        self.auxiliary = auxiliary
        self.step = TrainingStep(
            trainer, self.model, self.adaptations, data, base_loss, extra_inputs
        )
        average = the_only(self.adaptations, WeightAverage, "bring weights for evaluation")
        self.weights = SwappedWeights(self.model, average)
        changed = [a for a in adaptations if isinstance(a, WeightTransform)]
        changed.sort(key=lambda a: isinstance(a, WeightAverage))  # it follows what others change
        self.weight_transforms = WeightTransforms(self.model, changed)
        self.saved = SavedState(None)
        self._resumes = False
        self._begun: int | None = None
        self._passes: dict[Hashable, Pass] | None = None
        self._schedule: Callable[[int], float] | None = None
        self._divided_groups = DividedGroups()
        self._fixed: list[nn.Parameter] = []

    # ---- start and end ----

    def start(self, checkpoint: str | None = None) -> None:
        """Check the adaptations against the model and capture its outputs.

        Args:
            checkpoint: The folder that the run resumes from, if it does.
        """
        self.saved = SavedState(checkpoint)
        self.weights.check(self.trainer)
        forget_compiled(self.trainer)
        for adaptation in self.adaptations:
            adaptation.setup(self.trainer)
        self._fixed = [p for a in self.adaptations for p in a.fixed if p.requires_grad]
        for parameter in self._fixed:
            parameter.requires_grad_(False)
        self.step.forward.connect()

    @contextmanager
    def all_weights(self) -> Iterator[None]:
        """While the optimizer is made: a later run, and a plain Trainer, need it to have all."""
        for parameter in self._fixed:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._fixed:
                parameter.requires_grad_(False)

    def begin(self) -> None:
        """The model is wrapped and the optimizer exists."""
        for adaptation in self.adaptations:
            adaptation.begin(self.trainer)
        average = self.weights.average
        if self._resumes and average is not None:  # an evaluation may come before the first batch
            average.load_state_dict(self.saved.of(average))

    def finish(self) -> None:
        """The run has ended well."""
        if self._resumes and not self.step.is_ready:
            self._restore_without_training()
        self.step.guard.check()
        self.weights.replace_final()
        for adaptation in self.adaptations:
            adaptation.finish(self.trainer)

    def _restore_without_training(self) -> None:
        """The checkpoint was that of the last step: what reads it has seen no batch."""
        with preserved_random_state():
            batch = next(iter(self.trainer.get_train_dataloader()), None)
        if isinstance(batch, Mapping):
            first = self.trainer._prepare_inputs(dict(self.step.first_labelled([batch])))
            self.ensure_ready(self.trainer.model_wrapped, first)

    def close(self) -> None:
        """Remove all hooks and restore what was changed."""
        with ExitStack() as stack:  # whatever one of them raises, the others are closed
            for parameter in self._fixed:
                stack.callback(parameter.requires_grad_, True)
            stack.callback(self.step.forward.close)
            for adaptation in reversed(self.adaptations):
                stack.callback(adaptation.close)
            self._divided_groups.restore()

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

    # ---- each optimizer step ----

    @property
    def progress(self) -> float:
        """`global_step / max_steps`."""
        return self.step.progress

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, Any]:
        """The base loss and all terms on one micro-batch, scaled as the Trainer expects.

        Returns:
            The loss and the model's outputs.
        """
        self.ensure_ready(model, inputs)
        return self.step.compute_loss(model, inputs, num_items_in_batch)

    def ensure_ready(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """On the first batch of a run: probe the loss, build modules, read the checkpoint."""
        if self.step.is_ready:
            return
        self.step.look_at(model, inputs)
        self.auxiliary.make_optimizer()
        if self._resumes:
            self.auxiliary.restore(self.saved, done=self.weights.average)

    def begin_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the items of all micro-batches of the coming optimizer step, on all processes."""
        self.step.counts.reset()
        if not batches or not isinstance(batches[0], Mapping):
            return  # rows that the Trainer makes into batches later (GRPO's prompts)
        if not self.step.is_ready:
            first = self.trainer._prepare_inputs(dict(self.step.first_labelled(batches)))
            self.ensure_ready(self.trainer.model_wrapped, first)
        self.before_step()  # which items count may depend on it
        self.step.count(batches)

    def before_step(self) -> None:
        """An optimizer step begins; called again for the same step it does nothing."""
        step = self.trainer.state.global_step
        if step != self._begun:
            self._begun = step
            self._passes = {}
            try:
                for adaptation in self.adaptations:
                    adaptation.before_step(step)
            finally:
                self._passes = None

    def passed(self, key: Hashable, make: Callable[[], Pass]) -> Pass:
        """What a pass over rows has found, made once for all adaptations before a step."""
        if self._passes is None:
            return make()
        if key not in self._passes:
            self._passes[key] = make()
        return dict(self._passes[key])

    def after_backward(self) -> None:
        """The last backward of an optimizer step is done, and nothing is clipped yet."""
        transforms = [a for a in self.adaptations if isinstance(a, GradientTransform)]
        transform_gradients(self.trainer, self.model, transforms)

    def before_main_step(self) -> None:
        """Check the terms, make the auxiliary gradients ready and set the model's rates."""
        step = self.trainer.state.global_step
        self.step.guard.end_step(step)
        if self.auxiliary.optimizer is not None:
            for name, norm in self.auxiliary.optimizer.before_main_step(self.trainer).items():
                self.step.metrics.add(f"{name}/module_gradient_norm", norm)
        assert self.trainer.optimizer is not None
        self._divided_groups.apply(
            self.trainer.optimizer, [control.lr_multipliers(step) for control in self.controls]
        )
        self.weight_transforms.before(self.trainer)

    def after_main_step(self) -> None:
        """Restore the model's own rates and step the auxiliary optimizer."""
        self.weight_transforms.after(self.trainer)
        self._divided_groups.restore()
        if self.auxiliary.optimizer is not None:
            if self._schedule is None:
                self._schedule = base_schedule(self.trainer)
            self.auxiliary.optimizer.after_main_step(self.trainer, self._schedule)

    def drain_metrics(self) -> dict[str, float]:
        """What to add to a training log."""
        metrics = self.step.metrics.drain()
        for adaptation in self.adaptations:
            adaptation.on_log(metrics, self.progress)
        return metrics

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        """An evaluation has ended."""
        for adaptation in self.adaptations:
            adaptation.on_evaluate(metrics, self.trainer.state.global_step)
