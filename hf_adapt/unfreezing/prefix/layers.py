"""The frozen layers of a prefix, whose output is captured or replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Wrapper = Callable[[torch.Tensor], Any]
"""Turns a hidden state into what a layer returns."""


@dataclass
class PrefixOutput:
    """What the layers of a prefix returned in one forward.

    Attributes:
        wrappers: How each layer returns its hidden state; None for a layer that returns other
            tensors as well.
        hidden: The hidden state that the last layer returned.
        random_before: Random states before the forward.
        random_after: Random states after the last layer.
    """

    wrappers: list[Wrapper | None]
    hidden: torch.Tensor | None = None
    random_before: list[torch.Tensor] = field(default_factory=list)
    random_after: list[torch.Tensor] = field(default_factory=list)


class PrefixLayers:
    """Replaces the forward of the layers of a prefix during one forward of the model.

    Args:
        layers: The frozen layers, bottom first.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        self.layers = list(layers)
        self._replaced: list[tuple[nn.Module, Any]] = []

    def capture(self) -> PrefixOutput:
        """Record what the layers return, until `restore` is called."""
        output = PrefixOutput([None] * len(self.layers), random_before=_random_states())
        for number, layer in enumerate(self.layers):
            self._replace(layer, self._recording_forward(layer.forward, number, output))
        return output

    def skip(self, wrappers: Sequence[Wrapper], hidden: torch.Tensor) -> None:
        """Let the last layer return `hidden` and compute nothing, until `restore` is called."""
        for number, layer in enumerate(self.layers):
            value = hidden if number == len(self.layers) - 1 else None
            self._replace(layer, _skipping_forward(wrappers[number], value))

    def restore(self) -> None:
        """Restore the forward of each layer."""
        for layer, forward in self._replaced:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
        self._replaced = []

    def _replace(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self._replaced.append((layer, layer.__dict__.get("forward")))
        layer.forward = forward

    def _recording_forward(self, forward: Any, number: int, output: PrefixOutput) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            output.wrappers[number] = _wrapper_of(returned)
            if number == len(self.layers) - 1:
                output.hidden = returned[0] if isinstance(returned, tuple) else returned
                output.random_after = _random_states()
            return returned

        return run


def _wrapper_of(output: Any) -> Wrapper | None:
    """How a layer returns its hidden state; None if it returns other tensors as well."""
    if isinstance(output, torch.Tensor):
        return lambda hidden: hidden
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        rest = output[1:]
        if not any(isinstance(item, torch.Tensor) for item in rest):
            return lambda hidden: (hidden, *rest)
    return None


def _skipping_forward(wrap: Wrapper, value: torch.Tensor | None) -> Callable[..., Any]:
    """A forward that returns `value`, or else its input."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if value is not None:
            return wrap(value)
        return wrap(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()))))

    return forward


def _random_states() -> list[torch.Tensor]:
    """The states of torch's random number generators."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states
