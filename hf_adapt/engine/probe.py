"""The look at the first batch of a run: what its loss does, and which modules are needed."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.auxiliary import seed_for
from hf_adapt.engine.batch import Batch
from hf_adapt.engine.forward import ForwardPass
from hf_adapt.engine.fused_losses import difference, few_rows, needs_logits, with_labels
from hf_adapt.engine.mixins import FusedObjective, LossCombiner
from hf_adapt.engine.normalisation import StepCounts, count_labels, trainer_divides
from hf_adapt.engine.parts import Layout, Part
from hf_adapt.engine.selection import rows_of
from hf_adapt.engine.terms import FUSED, components
from hf_adapt.engine.unlabelled_rows import depends_on_target, trains_on_target
from hf_adapt.models.state import preserved, preserved_random_state

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

KEPT_METRICS = ("_metrics", "accum_loss_components")
"""Where TRL's and sentence-transformers' Trainers keep what their compute_loss logs."""


class Probe:
    """Runs the training loss once on a first batch, in evaluation mode, and restores the model.

    It learns the layout of the outputs, finds out how the loss is normalised, builds the auxiliary
    modules, and refuses what cannot work before anything is trained.

    Args:
        trainer: The Trainer.
        adaptations: The active adaptations.
        forward: The model's forward.
        counts: The scales; `ignores_num_items` is set.
        layout: What is known of the outputs; it is filled in.
        batch_of: Makes the batch that objectives see.
    """

    def __init__(
        self,
        trainer: Trainer,
        adaptations: Sequence[Adaptation],
        forward: ForwardPass,
        counts: StepCounts,
        layout: Layout,
        batch_of: Callable[[nn.Module, list[Part]], Batch],
    ) -> None:
        self.trainer = trainer
        self.adaptations = adaptations
        self.objectives = [a for a in adaptations if isinstance(a, Objective)]
        self.forward = forward
        self.counts = counts
        self.layout = layout
        self.batch_of = batch_of

    def run(
        self, model: nn.Module, parts: list[Part], has_loss: Callable[[Part], bool]
    ) -> FusedObjective | None:
        """Look at a first batch.

        Args:
            model: The model as the Trainer wrapped it.
            parts: The batch.
            has_loss: Whether there is a task's loss to compute on a part.

        Returns:
            The objective that computes its term together with the task's loss, if one can.

        Raises:
            ValueError: If the loss is trained on rows whose labels it must not know, or an
                objective does not fit the model.
        """
        # Some Trainers count tokens or keep metrics in compute_loss; the probe must not add to it.
        kept = {k: _copied(getattr(self.trainer, k, None)) for k in KEPT_METRICS}
        try:
            with preserved(self.forward.model), torch.no_grad():
                model.eval()
                fusing = self._fusing(parts)
                if fusing is not None:
                    # Its point is to do without the logits of a whole batch: none here either.
                    # Where no row has a label, some are made up: the losses would be 0 or NaN.
                    parts = [with_labels(self.trainer, few_rows(part)) for part in parts]
                self._look(model, parts, has_loss)
                if fusing is not None and self._fuses_exactly(model, fusing, parts):
                    return fusing
                return None
        finally:
            for key, value in kept.items():
                if value is not None:
                    setattr(self.trainer, key, value)

    def _look(self, model: nn.Module, parts: list[Part], has_loss: Callable[[Part], bool]) -> None:
        first, trainer = parts[0], self.trainer
        items = count_labels(trainer, first.inputs) if has_loss(first) else None
        reference = items if items is not None and trainer.model_accepts_loss_kwargs else None
        if reference is None and trainer.compute_loss_func is not None:
            reference = items
        loss = self.forward.task_loss(model, first, reference, has_loss(first))
        for part in parts[1:]:
            self.forward.features(model, part)
        self.layout.learn(parts)
        self._learn_normalisation(model, first, loss, reference, items)
        self._build(self.batch_of(model, parts))
        # After the objectives: one that cannot work here at all must not be advised an option.
        self._check_unlabelled_rows(model, first, reference, loss, has_loss(first))

    def _learn_normalisation(
        self,
        model: nn.Module,
        labelled: Part,
        once: torch.Tensor,
        reference: torch.Tensor | None,
        items: torch.Tensor | None,
    ) -> None:
        """Whether the training loss honours `num_items_in_batch`."""
        trainer = self.trainer
        if reference is not None and getattr(trainer, "loss_is_scaled_for_ga", None) is None:
            if self.any_process(int(reference) == 0):  # a loss over no label is NaN: ask again
                labelled = with_labels(trainer, labelled)
                reference = count_labels(trainer, labelled.inputs)
                assert reference is not None
                once = self.forward.base_loss(model, dict(labelled.inputs), reference)
            twice = self.forward.base_loss(model, dict(labelled.inputs), reference * 2)
            ignored = bool(torch.isclose(once, twice, rtol=1e-4, atol=0.0))
            self.counts.ignores_num_items = self.any_process(ignored)
            if self.counts.ignores_num_items:
                logger.info(
                    "The training loss ignores num_items_in_batch although the Trainer takes it "
                    "as scaled (transformers issue 47688): hf_adapt weights each micro-batch by "
                    "its share of the labels instead, so that gradient accumulation and several "
                    "processes give the gradient of one large batch."
                )
        elif reference is None and items is not None and trainer_divides(trainer, None):
            # The Trainer would take the mean of the micro-batches' means, which is not the mean
            # over the labels where these have unequal numbers of them.
            self.counts.ignores_num_items = True

    def _build(self, batch: Batch) -> None:
        """Build the auxiliary modules and try each objective's loss."""
        device = self.trainer.args.device
        for adaptation in self.adaptations:
            bound = batch
            if isinstance(adaptation, Objective):
                bound = batch.for_objective(adaptation)
            if adaptation.module is None:
                with preserved_random_state(seed_for(adaptation.name, self.trainer.args.seed)):
                    adaptation.module = adaptation.build_modules(bound)
                if adaptation.module is not None:
                    adaptation.module.to(device=device, dtype=torch.float32)
            if isinstance(adaptation, Objective):
                with torch.autocast(device.type, enabled=False):
                    components(adaptation, adaptation.loss(bound))

    # ---- losses without logits ----

    def _fusing(self, parts: list[Part]) -> FusedObjective | None:
        """The objective that may compute its term together with the task's loss."""
        able = [
            o for o in self.objectives if isinstance(o, FusedObjective) and o.can_fuse(self.trainer)
        ]
        reason: str | None = None
        if len(able) > 1:
            reason = f"{' and '.join(o.name for o in able)} cannot share one projection"
        elif self.layout.table.separate:
            reason = "rows of a stream go through the model separately (forward='separate')"
        elif any(isinstance(a, LossCombiner) for a in self.adaptations):
            reason = "another adaptation combines the losses"
        elif able:
            others = [o for o in self.objectives if o is not able[0]]
            reason = needs_logits(self.trainer, others, parts[0])
        if reason is None:
            return able[0] if able else None
        for objective in able:
            objective.not_fused(reason)
        return None

    def _fuses_exactly(
        self, model: nn.Module, objective: FusedObjective, parts: list[Part]
    ) -> bool:
        """Whether the fused loss is what the model and the objective compute separately."""
        part, trainer = parts[0], self.trainer
        items = count_labels(trainer, part.inputs)
        assert items is not None
        counted = self.counts.counts_base(items)
        base = self.forward.base_loss(model, dict(part.inputs), items if counted else None).float()
        if counted and trainer.args.average_tokens_across_devices:
            base = base / trainer.accelerator.num_processes  # as the Trainer multiplied it
        batch = self.batch_of(model, parts).for_objective(objective)
        with torch.autocast(base.device.type, enabled=False):
            separately = components(objective, objective.loss(batch))
        term = separately.get(FUSED, separately.get(""))
        expected = term[0] if isinstance(term, tuple) else term
        assert isinstance(expected, torch.Tensor)
        one = torch.ones((), device=base.device)
        extra = getattr(part.outputs, "aux_loss", None)
        try:
            with self.forward.recording(part):
                fused = objective.fused_loss(model, part, one, one, batch.progress)
        except Exception as error:  # whatever an unknown architecture does with our hidden states
            reason: str | None = f"{type(error).__name__}: {error}"
        else:
            half = torch.is_autocast_enabled(base.device.type)
            half |= next(self.forward.model.parameters()).dtype != torch.float32
            reason = difference(fused, base * items, expected, rough=half)
            if extra is not None:  # a router's, which may be smaller than any tolerance
                reason = "the model adds a loss of its own (aux_loss)"
        if not self.any_process(reason is not None):
            logger.info("%s computes its losses without whole logits.", objective.name)
            return True
        objective.not_fused(reason or "another process does")
        return False

    # ---- rows without labels ----

    def _check_unlabelled_rows(
        self, model: nn.Module, part: Part, items: Any, loss: torch.Tensor, has_loss: bool
    ) -> None:
        """Refuse a loss that is trained on target rows, whose labels it must not know."""
        if not self.any_process(bool((part.domain > 0).any())) or not has_loss:
            return
        depends, trainer = None, self.trainer
        # A forward with gradients and without a backward would upset what shards the model.
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            seen = dataclasses.replace(part, hidden={}, masks={})
            with torch.enable_grad(), self.forward.recording(seen):
                again = self.forward.base_loss(self.forward.model, dict(part.inputs), items)
            depends = depends_on_target(again, seen.outputs, part.domain)
        if not self.any_process(depends is not None):
            alone = self.forward.base_loss(model, rows_of(part.inputs, part.domain == 0), items)
            # Without a label in the batch both are NaN.
            depends = not torch.isclose(
                loss.float(), alone.float(), rtol=1e-3, atol=1e-5, equal_nan=True
            )
        if depends:
            raise ValueError(trains_on_target(self.forward.model, self.forward.label_names))

    def any_process(self, flag: bool) -> bool:
        """Whether it is so in any process: all must run the same forwards, which communicate."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return flag
        return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())


def _copied(metrics: Any) -> Any:
    return copy.deepcopy(metrics) if isinstance(metrics, dict) else None
