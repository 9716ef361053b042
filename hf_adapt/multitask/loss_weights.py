"""How much the loss of each task counts in a run: fixed, learnt, or found from the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.multitask.weighting import (
    dwa_weights,
    famo_weights,
    gradnorm_loss,
    random_weights,
    uncertainty_loss,
)


class LossWeights:
    """How much the loss of each task counts; this one counts all alike.

    Weights add up to the number of tasks where a method leaves their sum open, so that a learning
    rate means the same under each.

    Attributes:
        observes_losses: Whether it wants to see the losses of each step.
        observes_norms: Whether it wants to see the norms of the tasks' gradients at the last layer
            that they share.
    """

    observes_losses = False
    observes_norms = False

    def begin(self, tasks: Sequence[str], sizes: Sequence[int | None]) -> None:
        """Learn of the tasks.

        Args:
            tasks: Their names, the Trainer's own first.
            sizes: How many classes each has; 1 for a regression, None where there are none.
        """
        self.tasks = list(tasks)

    def weights(self, step: int, progress: float, seed: int) -> torch.Tensor:
        """The weights of a step, (K,) on the CPU."""
        return torch.ones(len(self.tasks))

    def observe(self, losses: torch.Tensor, norms: torch.Tensor | None) -> None:
        """See the losses of a step of the optimizer, over all micro-batches and processes.

        Args:
            losses: (K,) on the CPU; NaN for a task without rows.
            norms: (K,), the norms of the gradients of the losses.
        """

    def state_dict(self) -> dict[str, Any]:
        """What must survive in a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""


class FixedWeights(LossWeights):
    """A number or a schedule for each task; 1 for one that is not named.

    Args:
        given: By task: numbers >= 0, or functions of progress from 0 to 1.

    Raises:
        ValueError: If one is negative or names no task.
    """

    def __init__(self, given: Mapping[str, float | Schedule]) -> None:
        for task, value in given.items():
            if not callable(value) and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"weighting={{{task!r}: {value}}} must be a finite number >= 0.")
        self.given = dict(given)

    def begin(self, tasks: Sequence[str], sizes: Sequence[int | None]) -> None:
        """Learn of the tasks."""
        super().begin(tasks, sizes)
        if unknown := sorted(self.given.keys() - set(tasks)):
            raise ValueError(
                f"weighting= names {', '.join(map(repr, unknown))}, and the tasks are "
                f"{', '.join(map(repr, tasks))}."
            )

    def weights(self, step: int, progress: float, seed: int) -> torch.Tensor:
        """The weights of a step."""
        return torch.tensor([value_at(self.given.get(t, 1.0), progress) for t in self.tasks])


class InverseLogClasses(LossWeights):
    """1 / log C for a task of C classes, whose loss then begins at 1.

    Reference:
        Aghajanyan et al. 2021, "Muppet: Massive Multi-task Representations with Pre-Finetuning",
        arXiv:2101.11038. A task without classes keeps 1.
    """

    def begin(self, tasks: Sequence[str], sizes: Sequence[int | None]) -> None:
        """Learn of the tasks."""
        super().begin(tasks, sizes)
        self._weights = torch.tensor([1 / math.log(n) if n and n > 1 else 1.0 for n in sizes])

    def weights(self, step: int, progress: float, seed: int) -> torch.Tensor:
        """The weights of a step."""
        return self._weights


class DynamicWeightAverage(LossWeights):
    """More for tasks whose loss falls slowly: see [`dwa_weights`].

    Args:
        window: Steps over which a loss is averaged.
        temperature: Larger ones make the weights more alike.

    Raises:
        ValueError: If one is not positive.
    """

    observes_losses = True

    def __init__(self, window: int = 100, temperature: float = 2.0) -> None:
        if window < 1 or not temperature > 0:
            raise ValueError(f"window={window} and temperature={temperature} must be positive.")
        self.window, self.temperature = window, temperature

    def begin(self, tasks: Sequence[str], sizes: Sequence[int | None]) -> None:
        """Learn of the tasks."""
        super().begin(tasks, sizes)
        nothing = torch.zeros(len(tasks), dtype=torch.float64)
        self._state: dict[str, Any] = {
            "steps": 0,
            "sums": nothing,
            "counts": nothing.clone(),
            "previous": None,
            "before": None,
        }

    def weights(self, step: int, progress: float, seed: int) -> torch.Tensor:
        """The weights of a step."""
        before = self._state["before"]
        if before is None:
            return torch.ones(len(self.tasks))
        previous: torch.Tensor = self._state["previous"]
        return dwa_weights(previous, before, self.temperature)

    def observe(self, losses: torch.Tensor, norms: torch.Tensor | None) -> None:
        """See the losses of a step."""
        state, known = self._state, ~losses.isnan()
        state["sums"] = state["sums"] + losses.nan_to_num(0.0)
        state["counts"] = state["counts"] + known
        state["steps"] += 1
        if state["steps"] >= self.window and bool((state["counts"] > 0).all()):
            mean = (state["sums"] / state["counts"]).float()
            tiny = torch.finfo(mean.dtype).tiny
            state["before"], state["previous"] = state["previous"], mean.clamp(min=tiny)
            state["sums"], state["counts"] = state["sums"] * 0, state["counts"] * 0
            state["steps"] = 0

    def state_dict(self) -> dict[str, Any]:
        """The windows."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._state = dict(state)


class RandomWeights(LossWeights):
    """Others are drawn in each step: K times [`random_weights`], a baseline."""

    def weights(self, step: int, progress: float, seed: int) -> torch.Tensor:
        """The weights of a step: a pure function of the seed and the step."""
        return len(self.tasks) * random_weights(len(self.tasks), seed, step)


class _Learnt(LossWeights):
    """Weights found by an optimizer of their own from what a step shows."""

    observes_losses = True

    def _start(self, value: torch.Tensor, learning_rate: float, decay: float) -> None:
        self._value = nn.Parameter(value)
        self._optimizer = torch.optim.Adam([self._value], lr=learning_rate, weight_decay=decay)
        self._last: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The weights, their optimizer, and the last losses."""
        optimizer = self._optimizer.state_dict()
        return {"value": self._value.detach(), "optimizer": optimizer, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        with torch.no_grad():
            self._value.copy_(state["value"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._last = state["last"]


class Uncertainty(_Learnt):
    """The noise of each task is learnt beside the model: see [`uncertainty_loss`].

    The log-variances have an Adam of their own, without weight decay: at a learning rate for
    fine-tuning they would move by 0.03 in a hundred steps. Regressions are the tasks whose head
    gives one number.

    Args:
        learning_rate: Of Adam on the log-variances.
    """

    def __init__(self, learning_rate: float = 0.025) -> None:
        self.learning_rate = learning_rate

    def begin(self, tasks: Sequence[str], sizes: Sequence[int | None]) -> None:
        """Learn of the tasks."""
        super().begin(tasks, sizes)
        self._is_regression = torch.tensor([size == 1 for size in sizes])
        self._start(torch.zeros(len(tasks)), self.learning_rate, 0.0)

    def weights(self, step: int, progress: float, seed: int) -> torch.Tensor:
        """The factors of the losses in a step."""
        factors = torch.where(self._is_regression, 0.5, 1.0)
        return factors * torch.exp(-self._value.detach())

    def observe(self, losses: torch.Tensor, norms: torch.Tensor | None) -> None:
        """See the losses of a step."""
        known = losses.isfinite()
        with torch.enable_grad():
            loss = uncertainty_loss(losses[known], self._value[known], self._is_regression[known])
        (self._value.grad,) = torch.autograd.grad(loss, self._value)
        self._optimizer.step()


class FAMO(_Learnt):
    """All losses shall fall in proportion: see [`famo_weights`]; K times these weights are used.

    The weights of a step follow from the losses of the steps before, so that no further forward is
    needed: how much a loss fell is seen on the next step's rows, not on the same ones again.

    Args:
        learning_rate: Of Adam on the scores.
        decay: Their weight decay.
    """

    def __init__(self, learning_rate: float = 0.025, decay: float = 1e-3) -> None:
        self.learning_rate, self.decay = learning_rate, decay

    def begin(self, tasks: Sequence[str], sizes: Sequence[int | None]) -> None:
        """Learn of the tasks."""
        super().begin(tasks, sizes)
        self._start(torch.zeros(len(tasks)), self.learning_rate, self.decay)

    def weights(self, step: int, progress: float, seed: int) -> torch.Tensor:
        """The weights of a step."""
        number = len(self.tasks)
        if self._last is None:
            return torch.ones(number)
        return number * famo_weights(self._last, self._value.detach())

    def observe(self, losses: torch.Tensor, norms: torch.Tensor | None) -> None:
        """See the losses of a step."""
        losses = losses.clamp(min=1e-8)  # NaN stays
        if self._last is None:
            self._last = torch.where(losses.isnan(), torch.ones_like(losses), losses)
            return
        fell = (self._last.log() - losses.log()).nan_to_num(0.0)
        shares = torch.softmax(self._value.detach(), 0)
        self._value.grad = shares * (fell - (shares * fell).sum())
        self._optimizer.step()
        self._last = torch.where(losses.isnan(), self._last, losses)


class GradNorm(_Learnt):
    """Tasks shall train at similar rates: see [`gradnorm_loss`].

    Costs a backward through the last shared layer for each task.

    Args:
        alpha: How strongly the rates are balanced.
        learning_rate: Of Adam on the weights.
    """

    observes_norms = True

    def __init__(self, alpha: float = 1.5, learning_rate: float = 0.025) -> None:
        self.alpha, self.learning_rate = alpha, learning_rate

    def begin(self, tasks: Sequence[str], sizes: Sequence[int | None]) -> None:
        """Learn of the tasks."""
        super().begin(tasks, sizes)
        self._start(torch.ones(len(tasks)), self.learning_rate, 0.0)

    def weights(self, step: int, progress: float, seed: int) -> torch.Tensor:
        """The weights of a step."""
        return self._value.detach().clone()

    def observe(self, losses: torch.Tensor, norms: torch.Tensor | None) -> None:
        """See the losses and the norms of a step."""
        assert norms is not None
        if bool(losses.isnan().any()):  # not all tasks can be compared
            return
        if self._last is None:
            self._last = losses.clamp(min=1e-8)
        ratios = (losses / self._last).clamp(min=1e-8)
        with torch.enable_grad():
            loss = gradnorm_loss(norms, ratios, self._value, self.alpha)
        (self._value.grad,) = torch.autograd.grad(loss, self._value)
        self._optimizer.step()
        with torch.no_grad():
            self._value.clamp_(min=1e-3)
            self._value.mul_(len(self.tasks) / self._value.sum())
