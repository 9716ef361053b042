"""Unfreezing when a metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_adapt.models.groups import LayerGroup
from hf_adapt.unfreezing.phases import Clock, Moment, Phase
from hf_adapt.unfreezing.schedules import (
    Direction,
    UnfreezingSchedule,
    cumulative_phases,
    ordered_groups,
)


@dataclass(frozen=True)
class Plateau(UnfreezingSchedule):
    """Add a group whenever a metric no longer improves.

    The steps of the transitions are stored in the checkpoint, so a resumed run repeats them. Use a
    metric of source data: labels of the target must not decide.

    Args:
        metric: Name of the metric, as the evaluation logs it.
        patience: Evaluations without an improvement after which the next group is added.
        min_delta: Smallest difference that counts as an improvement.
        greater_is_better: By default False where the name ends in "loss", else True.
        direction: As in `Gradual`.
        until: As in `Gradual`.
    """

    metric: str = "eval_loss"
    patience: int = 1
    min_delta: float = 0.0
    greater_is_better: bool | None = None
    direction: Direction = "top_down"
    until: str | None = None

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0:
            raise ValueError(
                f"Plateau(patience={self.patience}, min_delta={self.min_delta}): expected "
                "patience >= 1 and min_delta >= 0."
            )

    def phases(
        self, groups: Sequence[LayerGroup], clock: Clock | None = None, seed: int = 0
    ) -> list[Phase]:
        """One phase per level of groups; all but the first wait for the plateau."""
        order = ordered_groups(groups, self.direction, self.until)
        waiting = [Moment(0, "plateau")] * (len(order) - 1)
        return cumulative_phases(order, [Moment(0), *waiting])

    def improved(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far."""
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        greater = self.greater_is_better
        if greater is None:
            greater = not self.metric.endswith("loss")
        return value > best + self.min_delta if greater else value < best - self.min_delta


class PlateauProgress:
    """What a run has seen of the metric, as stored in its checkpoints.

    Args:
        rule: The rule that starts the phases.

    Attributes:
        steps: The steps after which a phase has started.
    """

    def __init__(self, rule: Plateau) -> None:
        self.rule = rule
        self.steps: list[int] = []
        self._best: float | None = None
        self._waited = 0
        self._other_metrics: set[str] = set()
        self._metric_found = False

    def observe(self, metrics: Mapping[str, float], step: int) -> bool:
        """Take in an evaluation.

        Returns:
            Whether the next phase starts after this step.
        """
        if self.rule.metric not in metrics:  # another of several evaluation sets
            self._other_metrics |= set(metrics)
            return False
        self._metric_found = True
        value = float(metrics[self.rule.metric])
        if self.rule.improved(value, self._best):
            self._best, self._waited = value, 0
            return False
        self._waited += 1
        if self._waited < self.rule.patience:
            return False
        self._waited = 0
        self.steps.append(step)
        return True

    def check_metric(self) -> None:
        """Refuse a run whose evaluations do not give the metric.

        Raises:
            ValueError: Naming the metrics that they give.
        """
        if self._other_metrics and not self._metric_found:
            raise ValueError(
                f"The unfreezing schedule waits for {self.rule.metric!r}, which the evaluation did "
                f"not give. It gave: {', '.join(sorted(self._other_metrics))}."
            )

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return {"plateau_steps": self.steps, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.steps = list(state["plateau_steps"])
        self._best, self._waited = state["best"], state["waited"]
