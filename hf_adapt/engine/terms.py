"""The objectives' terms of a micro-batch, and how they and the task's loss become one loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_adapt.engine.adaptation import Objective
from hf_adapt.engine.batch import Batch
from hf_adapt.engine.metrics import FiniteGuard, MetricAverager
from hf_adapt.engine.mixins import LossCombiner
from hf_adapt.engine.normalisation import StepCounts

FUSED = "logits"
"""The component of an objective's dict that is fused with the task's loss."""


def components(objective: Objective, value: Any) -> dict[str, Any]:
    """The components of what `loss` returned, checked.

    Raises:
        ValueError: If one is no scalar, nor a (sum, count) whose items are counted.
    """
    found = value if isinstance(value, dict) else {"": value}
    for name, component in found.items():
        where = f"{type(objective).__name__}.loss" + (f" component {name!r}" if name else "")
        numbers = component if isinstance(component, tuple) else (component,)
        if len(numbers) > 2 or not all(
            isinstance(n, torch.Tensor) and n.ndim == 0 for n in numbers
        ):
            shapes = [tuple(n.shape) if isinstance(n, torch.Tensor) else type(n) for n in numbers]
            raise ValueError(
                f"{where} returned {shapes}; expected a scalar tensor (the mean over the "
                "micro-batch) or a (sum, count) of two scalar tensors."
            )
        if len(numbers) == 2 and type(objective).num_items is Objective.num_items:
            raise ValueError(
                f"{where} returned a (sum, count), which is divided by the number of items in the "
                "whole optimizer step: define num_items(self, rows) to count them before the "
                "forward (for example `return rows.num_features()`), or return the mean."
            )
    return found


@dataclass
class TaskLosses:
    """The task's losses on one micro-batch.

    Attributes:
        loss: On the training rows, scaled as the Trainer expects it.
        weight: Its factor.
        streams: The losses of labelled streams, scaled alike, with their factors.
        divided: By what the Trainer will divide the loss.
        fused: The objective whose term is in the loss already, and that term's share.
    """

    loss: torch.Tensor
    weight: float
    streams: Mapping[str, tuple[torch.Tensor, float]]
    divided: int
    fused: tuple[Objective, torch.Tensor] | None = None


class Terms:
    """Computes the terms of the objectives, logs them and adds them to the task's loss.

    Args:
        objectives: The objectives.
        counts: The scales.
        metrics: Where they are logged.
        guard: Watches for terms that are not finite.
        combiner: What takes the place of the weighted sum.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        counts: StepCounts,
        metrics: MetricAverager,
        guard: FiniteGuard,
        combiner: LossCombiner | None = None,
    ) -> None:
        self.objectives = objectives
        self.counts = counts
        self.metrics = metrics
        self.guard = guard
        self.combiner = combiner

    def add(self, task: TaskLosses, batch: Batch) -> torch.Tensor:
        """The loss to train on: the task's, and the term of each objective."""
        steps, divided, weight = self.counts.steps, task.divided, task.weight
        loss = task.loss
        losses, weights = {"task": loss}, {"task": weight}
        if weight != 1:  # so that the plain Trainer's loss stays what it is, bit for bit
            losses["task"] = loss if weight else loss.nan_to_num(0.0, 0.0, 0.0)
            loss = losses["task"] * weight
        for name, (stream_loss, stream_weight) in task.streams.items():
            share = stream_loss / divided
            # A mean over the steps that have such rows: a small stream has none in many.
            count = self.counts.has_items(name) / steps
            self.metrics.add(f"loss/{name}", share.detach() * steps, count)
            self.guard.add(name, share)
            losses[name], weights[name] = stream_loss, stream_weight
            loss = loss + stream_weight * stream_loss
        with torch.autocast(loss.device.type, enabled=False):
            for objective in self.objectives:
                shares = self._shares(objective, batch.for_objective(objective))
                term = sum(shares.values(), torch.zeros((), device=loss.device))
                whole = term.detach()
                if task.fused is not None and task.fused[0] is objective:
                    fused = task.fused[1]
                    if term.requires_grad:  # it has other components, which are logged
                        self.metrics.add(f"{objective.name}/{FUSED}", fused * steps, 1 / steps)
                    whole = whole + fused
                self.metrics.add(f"loss/{objective.name}", whole * steps, 1 / steps)
                self.guard.add(objective.name, whole)
                weight = objective.term_weight(batch.progress)
                if callable(objective.weight):
                    self.metrics.add(f"{objective.name}/weight", weight)
                if self.combiner is not None:
                    for name, share in shares.items():
                        name = f"{objective.name}/{name}".rstrip("/")
                        losses[name], weights[name] = share * divided, weight
                elif weight != 0:
                    loss = loss + (weight * divided) * term
            if self.combiner is not None:
                shares = {name: each / divided for name, each in losses.items()}
                return self.combiner.combine(shares, weights, batch) * divided
        return loss

    def _shares(self, objective: Objective, batch: Batch) -> dict[str, torch.Tensor]:
        """A micro-batch's shares of a term's components: those of a step add up to the term."""
        shares: dict[str, torch.Tensor] = {}
        steps = self.counts.steps
        # All rows may be of other tasks. Several processes must run the same further forwards.
        if self.counts.processes == 1 and not any(len(part.domain) for part in batch.parts):
            return shares
        for name, component in components(objective, objective.loss(batch)).items():
            shares[name] = self.counts.component(objective.name, name, component)
            if name:
                shown = shares[name].detach() * steps
                count = self.counts.has_component(objective.name, name) / steps
                self.metrics.add(f"{objective.name}/{name}", shown, count)
        return shares
