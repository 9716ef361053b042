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

from hf_adapt.multitask.affinity import cosines_of, gradient_cosines, task_affinity
from hf_adapt.multitask.plots import affinity_plot, cosine_plot
from hf_adapt.multitask.task_gradients import TaskGradients
from hf_adapt.storage.text_file import write_figure, write_text

logger = logging.getLogger(__name__)

ALL = "all"
"""The name of the cosines over all shared weights."""
FEW = 3
"""Measurements below which nothing is warned of."""


class Mean:
    """The mean of matrices, entry by entry, over those that are no NaN."""

    def __init__(self, size: int) -> None:
        self.sums = torch.zeros(size, size, dtype=torch.float64)
        self.counts = torch.zeros(size, size, dtype=torch.float64)

    def add(self, matrix: torch.Tensor) -> None:
        """One more."""
        given = matrix.detach().double().cpu()
        self.sums += given.nan_to_num(0.0)
        self.counts += ~given.isnan()

    @property
    def value(self) -> torch.Tensor:
        """(K, K); NaN where there was none."""
        return self.sums / self.counts


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
        self.affinity = Mean(size)

    def add_cosines(self, gradients: TaskGradients, sums: torch.Tensor) -> None:
        """See the gradients of a step, (K, P)."""
        self.cosines[ALL].add(gradient_cosines(sums))
        for name, weights in self._groups.items():
            own = gradients.of(sums, weights).double()
            self.cosines[name].add(cosines_of(own @ own.T))

    def add_affinity(
        self, gradients: TaskGradients, rate: float, losses: Callable[[], torch.Tensor]
    ) -> None:
        """Take a step on each task by itself, look at all losses, and take it back.

        The step has the length of one of Adam's: the learning rate for each weight on average.

        Args:
            gradients: Those of a micro-batch.
            rate: The learning rate.
            losses: The losses of that micro-batch, (K,); NaN for a task without rows.
        """
        weights = gradients.parameters
        kept = [weight.detach().clone() for weight in weights]
        before, after = losses(), []
        with torch.no_grad():  # `.data`: the way back may still need what it has saved
            for own in gradients.sums:
                length = own.norm()
                step = own * (rate * len(own) ** 0.5 / length.clamp(min=1e-30))
                for weight, given in zip(weights, gradients.split(step), strict=True):
                    weight.data.sub_(given.to(weight.dtype))
                after.append(torch.where(length > 0, losses(), torch.nan))
                for weight, old in zip(weights, kept, strict=True):
                    weight.data.copy_(old)
        known = torch.where(before > 0, before, torch.ones_like(before))
        matrix = task_affinity(known, torch.stack(after))
        self.affinity.add(torch.where(before > 0, matrix, torch.nan))

    # ---- what comes out ----

    def logs(self) -> dict[str, float]:
        """The means so far, of each pair of tasks."""
        found = {}
        for i, one in enumerate(self.tasks):
            for j, other in enumerate(self.tasks):
                if i < j:
                    found[f"cosine/{one}~{other}"] = float(self.cosines[ALL].value[i, j])
                if i != j:
                    found[f"affinity/{one}->{other}"] = float(self.affinity.value[i, j])
        return {name: value for name, value in found.items() if value == value}

    def harms(self) -> list[str]:
        """Which tasks do harm, in words."""
        found, affinity, cosines = [], self.affinity, self.cosines[ALL]
        for i, one in enumerate(self.tasks):
            for j, other in enumerate(self.tasks):
                harm, cosine = float(affinity.value[i, j]), float(cosines.value[i, j])
                if i != j and float(affinity.counts[i, j]) >= FEW and harm < 0 and cosine < 0:
                    found.append(
                        f"a step on {one!r} raises the loss of {other!r} by {-harm:.2%} on average "
                        f"(cosine of their gradients {cosine:.2f})"
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

        def table(mean: Mean) -> list[list[float | None]]:
            return [[x if x == x else None for x in row] for row in mean.value.tolist()]

        found = {
            "tasks": self.tasks,
            "affinity": table(self.affinity),
            "cosines": {name: table(mean) for name, mean in self.cosines.items()},
        }
        write_text(folder / "task_affinity.json", json.dumps(found, indent=2))
        if find_spec("matplotlib") is not None:
            drawn = affinity_plot(self.affinity.value, self.tasks)
            write_figure(folder / "task_affinity.png", drawn)
            drawn = cosine_plot(self.cosines[ALL].value, self.tasks)
            write_figure(folder / "task_cosines.png", drawn)

    def state_dict(self) -> dict[str, Any]:
        """What must survive in a checkpoint."""
        means = {**{f"cosines/{name}": m for name, m in self.cosines.items()}, "": self.affinity}
        return {name: [mean.sums, mean.counts] for name, mean in means.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        means = {**{f"cosines/{name}": m for name, m in self.cosines.items()}, "": self.affinity}
        for name, mean in means.items():
            mean.sums, mean.counts = state[name]
