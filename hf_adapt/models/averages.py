"""Moving averages of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def move_towards(
    average: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], decay: float
) -> None:
    """One step of an exponential moving average, in place: a ← decay · a + (1 - decay) · w."""
    with torch.no_grad():
        for name, value in average.items():
            value.lerp_(weights[name].to(value.dtype), 1.0 - decay)


class RunningAverage:
    """The moving average of a model's trainable weights, in float32.

    Reference:
        Tarvainen & Valpola 2017, "Mean teachers are better role models", arXiv:1703.01780. The
        decay starts at 0.1 and rises to its value, as (1 + step) / (10 + step), so that the weights
        that training starts from are soon forgotten.

    Args:
        decay: Decay for each optimizer step, from 0 to below 1.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = RunningAverage(0.9)
        >>> average.start(model)
        >>> sorted(average.weights)
        ['weight']
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, torch.Tensor] = {}
        self._model: nn.Module | None = None
        self._step: int | None = None

    def start(self, model: nn.Module) -> None:
        """Begin at the weights that a model has now."""
        self._model, self._step = model, None
        own = model.named_parameters()
        self.weights = {n: p.detach().float().clone() for n, p in own if p.requires_grad}

    def follow(self, step: int) -> None:
        """Take in the weights that the model has before this step; called again it does nothing."""
        assert self._model is not None
        if self._step is not None and step > self._step:
            decay = min(self.decay, (1 + step) / (10 + step))
            move_towards(self.weights, dict(self._model.named_parameters()), decay)
        self._step = step if self._step is None else max(step, self._step)

    def state_dict(self) -> dict[str, Any]:
        """The average, on the CPU, and the step it belongs to."""
        return {"weights": {n: w.cpu() for n, w in self.weights.items()}, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)
        self._step = state["step"]
