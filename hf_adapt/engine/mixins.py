"""Rarer abilities of an adaptation, which a method opts into by deriving from one of these."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.progress import Schedule

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch
    from hf_adapt.engine.parts import Part
    from hf_adapt.engine.streams import Routing

logger = logging.getLogger(__name__)

LrMultipliers = Mapping[nn.Parameter, float]
"""Factors on the learning rate, 0 or more, of the parameters they name."""


class BatchTransform(Adaptation):
    """Changes the batches that the user's collator makes.

    Its `columns` are those of the rows that `transform_batch` reads; they go no further.
    """

    @abstractmethod
    def transform_batch(self, rows: Sequence[Any], batch: MutableMapping[str, Any]) -> None:
        """Change a batch that was made of these rows, or add inputs of the model to it.

        Called in the DataLoader's workers, with all rows of a forward together. A tensor that is
        added must have one entry per row in its first dimension.
        """

    def transforms_evaluation(self, trainer: Trainer) -> bool:
        """Whether it changes the batches of `evaluate` and `predict` too."""
        return False

    @property
    def added_inputs(self) -> Collection[str]:
        """The names of the inputs that it adds for the Trainer's own model, and for no other."""
        return ()


class LearningRateControl(Adaptation):
    """Scales the learning rates of parts of the model, or freezes them for a while.

    Attributes:
        freezes: Whether it may freeze parts of the model; features may then have no gradient.
        lr_schedule: A learning-rate schedule that takes the place of the Trainer's (a function of
            progress from 0 to 1).
    """

    freezes: bool = False
    lr_schedule: Schedule | None = None

    def lr_multipliers(self, step: int) -> LrMultipliers:
        """Factors on the learning rate of the model's parameters for this optimizer step.

        A parameter of factor 0 is left out of the step; one that is not named has factor 1.
        """
        return {}

    def around_optimizer_load(self, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """A context held open while a checkpoint's optimizer is read, before `begin`.

        Sharded optimizers expect a saved state for every parameter that requires a gradient.

        Args:
            state: What `state_dict` returned when the checkpoint was saved.
        """
        return nullcontext()


class GradientTransform(Adaptation):
    """Works on the whole gradients of an optimizer step, before they are clipped.

    For penalties, projections and gradient surgery: what it writes is clipped and counted in
    `grad_norm`. Not supported with FSDP and DeepSpeed, whose gradients are pieces.
    """

    @property
    def transforms_gradients(self) -> bool:
        """Whether it does so in this run."""
        return True

    @abstractmethod
    def transform_gradients(self, model: nn.Module) -> None:
        """Read and write `parameter.grad` of the model, in place.

        Called once per optimizer step after the last backward, when the gradients are the sums of
        all micro-batches, averaged over the processes and, under fp16, without the loss scale. An
        fp16 step whose gradients overflowed is skipped, and this with it. All processes see the
        same gradients and must write the same.
        """


class WeightTransform(Adaptation):
    """Works on the model's weights around each step of the optimizer.

    For what acts on weights rather than on gradients: a pull towards other weights that is stable
    for every strength, a limit of how far a step moves a weight. Not supported with FSDP and
    DeepSpeed, whose weights are pieces.
    """

    def before_optimizer_step(self, model: nn.Module) -> None:
        """Called when the gradients are clipped, directly before the optimizer steps."""

    @abstractmethod
    def after_optimizer_step(
        self, model: nn.Module, learning_rates: Mapping[nn.Parameter, float]
    ) -> None:
        """Change the model's parameters in place, without gradients.

        Called after each step of the optimizer, but not after one that was skipped because fp16
        gradients overflowed. All processes have the same weights and must write the same.

        Args:
            model: The unwrapped model.
            learning_rates: The rates of this step; parameters that it left out are not among them.
        """


class EvaluationObserver(Adaptation):
    """Sees the batches of the Trainer's own evaluation and adds metrics to it.

    Its `columns` and `extra_inputs` come with the batches. With several processes each sees its own
    batches, and the last ones are filled up with rows seen already: gather what belongs to rows by
    `trainer.accelerator.gather_for_metrics`, which leaves those out.

    Attributes:
        hides_labels: Whether the rows go through the model without their labels, which nothing sees
            then.
        observes_predictions: Whether it takes part in `predict` as in `evaluate`.
    """

    hides_labels: bool = False
    observes_predictions: bool = True

    def observes_evaluation(self, trainer: Trainer) -> bool:
        """Whether it takes part."""
        return True

    def begin_evaluation(self, trainer: Trainer, prefix: str) -> None:
        """An evaluation (or prediction) begins, whose metrics are named `<prefix>_...`."""

    def around_prediction(self, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """A context held open while the model predicts a batch.

        Args:
            inputs: As in `observe`.
        """
        return nullcontext()

    @abstractmethod
    def observe(
        self, inputs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], outputs: Any
    ) -> None:
        """See one batch of this process.

        Args:
            inputs: The model's inputs on its device, with labels and `extra_inputs`.
            columns: The columns beside the batch.
            outputs: The model's predictions, as `prediction_step` returns them.
        """

    @abstractmethod
    def end_evaluation(self, metrics: Mapping[str, float], prefix: str) -> Mapping[str, float]:
        """The metrics to add, by their full names.

        Args:
            metrics: The Trainer's own.
            prefix: How the names begin.
        """


class RowRouting(Adaptation):
    """Takes the training rows of other tasks than the one that the Trainer's loss learns.

    Each such task is a stream of its own, by the task's name, that the adaptation sees where
    `streams` names it. Its rows keep their labels.
    """

    @abstractmethod
    def routing(self, trainer: Trainer) -> Routing:
        """Which rows they are, and how they are collated. Called before `setup`."""


class EvaluationView(Adaptation):
    """Lets the Trainer evaluate another model than its own: one that shares weights with it."""

    @abstractmethod
    def around_evaluation(self, trainer: Trainer, prefix: str) -> AbstractContextManager[Any]:
        """A context held open during an evaluation or prediction.

        Args:
            trainer: The Trainer, whose model, collator and metrics may be others meanwhile. While
                its model is another, no [`EvaluationObserver`] takes part.
            prefix: How the names of the metrics begin.
        """


class WeightAverage(Adaptation):
    """Keeps other weights of the model, which are swapped in for evaluation.

    Checkpoints hold the raw weights, so that training resumes from them; keep the average in
    `state_dict`. `load_best_model_at_end` chooses by the average and loads the raw weights.

    Attributes:
        replaces_final: Whether the model has these weights when training has ended, so that they
            are what `save_model` saves.
    """

    replaces_final: bool = False

    @abstractmethod
    def averaged_weights(self) -> Mapping[str, torch.Tensor]:
        """The weights by their names in the model; what is not named keeps its value."""


class LossCombiner(Adaptation):
    """Takes the place of the weighted sum of the task's loss and the terms."""

    @abstractmethod
    def combine(
        self, losses: Mapping[str, torch.Tensor], weights: Mapping[str, float], batch: Batch
    ) -> torch.Tensor:
        """One loss of several, a scalar with a gradient.

        Args:
            losses: The shares of this micro-batch, scaled so that those of a step add up to the
                step's loss: `"task"`, then each labelled stream and each objective by its name; an
                objective whose loss is a dict by its components, as `"name/component"`.
            weights: Their factors at this progress (the task's is 1 or an objective's
                `base_weight`).
            batch: The micro-batch.
        """


class FusedLoss(NamedTuple):
    """The task's loss and an objective's term, computed together.

    Attributes:
        loss: What is trained on: both, times the factors that were given.
        base_sum: Sum of the task's loss over the labels, without its factor.
        term_sum: Sum of the objective's term over its items, without its factor.
        outputs: The model's outputs; they hold no logits.
    """

    loss: torch.Tensor
    base_sum: torch.Tensor
    term_sum: torch.Tensor
    outputs: Any


class FusedObjective(Objective):
    """An objective that can compute its term together with the task's loss."""

    def can_fuse(self, trainer: Trainer) -> bool:
        """Whether `fused_loss` can be tried on this model."""
        return False

    def not_fused(self, reason: str) -> None:
        """Called where `fused_loss` could not be used after all."""
        logger.info("%s computes whole logits: %s.", self.name, reason)

    @abstractmethod
    def fused_loss(
        self,
        model: nn.Module,
        part: Part,
        base_factor: torch.Tensor,
        term_factor: torch.Tensor,
        progress: float,
    ) -> FusedLoss:
        """The task's loss and this term in one, where that saves time or memory.

        Used only where it gives what the model's own loss and `loss` give on the first batch.
        `loss` is still called after it, without logits: it returns a dict of the components that
        are not fused, which may be empty.

        Args:
            model: The model as the Trainer wrapped it.
            part: The rows; it has no outputs yet.
            base_factor: Factor of the sum of the task's loss over the labels.
            term_factor: Factor of the sum of the term over its items.
            progress: `global_step / max_steps`.
        """
