"""Moving averages of a model's weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances of a model's batch norms, by their names."""
    return {
        f"{name}.{which}".lstrip("."): getattr(module, which)
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
        for which in ("running_mean", "running_var")
    }


def move_towards(
    average: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], decay: float
) -> None:
    """One step of an exponential moving average, in place: a ← decay · a + (1 - decay) · w."""
    with torch.no_grad():
        for name, value in average.items():
            value.lerp_(weights[name].to(value.dtype), 1.0 - decay)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def blend(start: torch.Tensor, end: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - alpha) · start + alpha · end in float32, a new tensor like `end`.

    Where both are equal, and at alpha 0 and 1, no bit changes.
    """
    if alpha in (0.0, 1.0):
        return (end if alpha else start).detach().to(end.device, end.dtype, copy=True)
    one, other = wide(start.detach().to(end.device)), wide(end.detach())
    kind = torch.promote_types(one.dtype, other.dtype)
    return torch.lerp(one.to(kind), other.to(kind), alpha).to(end.dtype)


class RunningAverage:
    """The moving average of a model's weights, in float32 or the weights' own dtype if wider.

    Reference:
        Tarvainen & Valpola 2017, "Mean teachers are better role models", arXiv:1703.01780. In
        `follow` the decay starts at 0.1 and rises to its value, as (1 + step) / (10 + step), so
        that the weights that training starts from are soon forgotten.

    Args:
        decay: Decay for each optimizer step, from 0 to below 1, in `follow`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = RunningAverage(0.9)
        >>> average.start(model)
        >>> sorted(average.weights)
        ['weight']
    """

    def __init__(self, decay: float = 0.0) -> None:
        self.decay = decay
        self.weights: dict[str, torch.Tensor] = {}
        self._model: nn.Module | None = None
        self._step: int | None = None

    def start(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Begin at the weights that a model has now.

        Args:
            model: The model.
            names: The parameters and buffers to average; by default the trainable parameters.
        """
        self._model, self._step = model, None
        if names is None:
            names = [name for name, value in model.named_parameters() if value.requires_grad]
        own = self.own()
        self.weights = {name: wide(own[name].detach()).clone() for name in names}

    def own(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers that the model has now; tied ones once."""
        assert self._model is not None
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def take_in(self, decay: float) -> None:
        """Move towards the weights that the model has now: a ← decay · a + (1 - decay) · w."""
        move_towards(self.weights, self.own(), decay)

    def follow(self, step: int) -> None:
        """Take in the weights that the model has before this step; called again it does nothing."""
        if self._step is not None and step > self._step:
            self.take_in(min(self.decay, (1 + step) / (10 + step)))
        self._step = step if self._step is None else max(step, self._step)

    def state_dict(self) -> dict[str, Any]:
        """The average, on the CPU, and the step it belongs to."""
        return {"weights": {n: w.cpu() for n, w in self.weights.items()}, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`.

        Raises:
            ValueError: If it is the average of other weights.
        """
        if other := sorted(state["weights"].keys() ^ self.weights.keys()):
            raise ValueError(
                f"The checkpoint's average is one of other weights than this run trains: "
                f"{', '.join(other[:3])}{', …' if len(other) > 3 else ''}. Resume with the same "
                "model and adaptations."
            )
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)
        self._step = state["step"]
