"""What the tasks of a run do to each other, measured now and then along the way."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_adapt.multitask.affinity import cosines_of, gradient_cosines
from hf_adapt.multitask.plots import affinity_plot, cosine_plot
from hf_adapt.multitask.task_gradients import TaskGradients
from hf_adapt.storage.text_file import write_figure, write_text

logger = logging.getLogger(__name__)

ALL = "all"
"""The name of the cosines over all shared weights."""
FEW = 5
"""Measurements below which nothing is warned of."""
LOWERED = 0.01
"""The share of its loss by which a step on a task is to lower it, to first order."""
HARM = 0.1
"""Of what a step brings its own task: what it must cost another one to be warned of."""


class Mean:
    """The mean of matrices, entry by entry, over those that are no NaN."""

    def __init__(self, size: int) -> None:
        self.sums = torch.zeros(size, size, dtype=torch.float64)
        self.squares, self.counts = self.sums.clone(), self.sums.clone()

    def add(self, matrix: torch.Tensor) -> None:
        """One more."""
        given = matrix.detach().double().cpu()
        self.sums += given.nan_to_num(0.0)
        self.squares += given.nan_to_num(0.0).square()
        self.counts += ~given.isnan()

    @property
    def value(self) -> torch.Tensor:
        """(K, K); NaN where there was none."""
        return self.sums / self.counts

    @property
    def error(self) -> torch.Tensor:
        """(K, K), the standard error of the mean."""
        spread = self.squares / self.counts - self.value.square()
        return (spread.clamp(min=0) / (self.counts - 1).clamp(min=1)).sqrt()

    def state(self) -> list[torch.Tensor]:
        """What it is made of."""
        return [self.sums, self.squares, self.counts]


class TaskDiagnosis:
    """Collects the cosines between the tasks' gradients and their affinities.

    Args:
        tasks: Their names.
        groups: The shared weights of each layer, by its name.
    """

    def __init__(self, tasks: Sequence[str], groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.tasks, self._groups = list(tasks), groups
        size = len(self.tasks)
        self.cosines = {name: Mean(size) for name in (ALL, *groups)}
        self._before, self._after = Mean(size), Mean(size)

    @property
    def affinity(self) -> torch.Tensor:
        """(K, K): by which share a step on the task of a row lowers the loss of a column's.

        Of the mean losses: the shares of single ones are wild where a loss is near 0.
        """
        return 1 - self._after.value / self._before.value

    def add_cosines(self, gradients: TaskGradients, sums: torch.Tensor) -> None:
        """See the gradients of a step, (K, P)."""
        self.cosines[ALL].add(gradient_cosines(sums))
        for name, weights in self._groups.items():
            own = gradients.of(sums, weights).double()
            self.cosines[name].add(cosines_of(own @ own.T))

    def add_affinity(
        self,
        gradients: TaskGradients,
        shares: torch.Tensor,
        losses: Callable[[], torch.Tensor],
    ) -> None:
        """Take a step on each task by itself, look at all losses, and take it back.

        It is as long as would lower the task's own loss by a hundredth if the loss were straight:
        with the learning rate it would be too long for some tasks and too short for others.

        Args:
            gradients: Those of a micro-batch.
            shares: (K,), the values that they are the gradients of.
            losses: The losses of that micro-batch, (K,); NaN for a task without rows.
        """
        weights = gradients.parameters
        kept = [weight.detach().clone() for weight in weights]
        before, after = losses(), []
        with torch.no_grad():  # `.data`: the way back may still need what it has saved
            for share, own in zip(shares, gradients.sums, strict=True):
                square = own.square().sum()
                step = own * (LOWERED * share / square.clamp(min=1e-30))
                for weight, given in zip(weights, gradients.split(step), strict=True):
                    weight.data.sub_(given.to(weight.dtype))
                torch.clear_autocast_cache()  # it may hold the weights as they were, in bfloat16
                after.append(torch.where(square > 0, losses(), torch.nan))
                for weight, old in zip(weights, kept, strict=True):
                    weight.data.copy_(old)
                torch.clear_autocast_cache()
        found = torch.stack(after)
        self._after.add(found)
        self._before.add(torch.where(found.isnan(), torch.nan, before.expand_as(found)))

    # ---- what comes out ----

    def logs(self) -> dict[str, float]:
        """The means so far, of each pair of tasks."""
        found, affinity = {}, self.affinity
        for i, one in enumerate(self.tasks):
            for j, other in enumerate(self.tasks):
                if i < j:
                    found[f"cosine/{one}~{other}"] = float(self.cosines[ALL].value[i, j])
                if i != j:
                    found[f"affinity/{one}->{other}"] = float(affinity[i, j])
        return {name: value for name, value in found.items() if value == value}

    def harms(self) -> list[str]:
        """Which tasks do harm, in words."""
        found, affinity, cosines = [], self.affinity, self.cosines[ALL]
        surely = cosines.value + 2 * cosines.error  # so that chance alone does not warn
        for i, one in enumerate(self.tasks):
            for j, other in enumerate(self.tasks):
                gain, harm, cosine = (
                    float(x) for x in (affinity[i, i], -affinity[i, j], cosines.value[i, j])
                )
                known = i != j and float(self._after.counts[i, j]) >= FEW
                if known and surely[i, j] < 0 < gain and harm > HARM * gain:
                    found.append(
                        f"a step that lowers the loss of {one!r} by {gain:.2%} raises that of "
                        f"{other!r} by {harm:.2%} (cosine of their gradients {cosine:.2f})"
                    )
        return found

    def warn(self) -> None:
        """Warn of tasks that harm others."""
        if harms := self.harms():
            logger.warning(
                "Negative transfer: %s. Train these tasks apart, give them other weights, or try "
                "MultiTask(surgery=pcgrad).",
                "; ".join(harms),
            )

    def save(self, folder: Path) -> None:
        """Write `task_affinity.json` and, where matplotlib is installed, two heat maps."""

        def table(matrix: torch.Tensor) -> list[list[float | None]]:
            return [[x if x == x else None for x in row] for row in matrix.tolist()]

        found = {
            "tasks": self.tasks,
            "affinity": table(self.affinity),
            "cosines": {name: table(mean.value) for name, mean in self.cosines.items()},
        }
        write_text(folder / "task_affinity.json", json.dumps(found, indent=2))
        if find_spec("matplotlib") is not None:
            drawn = affinity_plot(self.affinity, self.tasks)
            write_figure(folder / "task_affinity.png", drawn)
            drawn = cosine_plot(self.cosines[ALL].value, self.tasks)
            write_figure(folder / "task_cosines.png", drawn)

    @property
    def _means(self) -> dict[str, Mean]:
        cosines = {f"cosines/{name}": mean for name, mean in self.cosines.items()}
        return {**cosines, "before": self._before, "after": self._after}

    def state_dict(self) -> dict[str, Any]:
        """What must survive in a checkpoint."""
        return {name: mean.state() for name, mean in self._means.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        for name, mean in self._means.items():
            mean.sums, mean.squares, mean.counts = state[name]
