"""Captures the outputs of modules during a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Extract = Callable[[Any], Any]
"""What to keep of a module's output: (the value, its mask or None), or None for nothing."""


def hidden_state(output: Any) -> torch.Tensor | None:
    """The hidden state in a module's output, whatever form the output has."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("last_hidden_state", "token_embeddings", "sentence_embedding"):
            if isinstance(value := output.get(key), torch.Tensor):
                return value
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value
    return None


def hidden_and_mask(output: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The hidden state in a module's output, and the mask where the output holds one.

    A sentence-transformer's inputs have a mask per text column; its modules hand on the one that
    belongs to what they give.
    """
    if (hidden := hidden_state(output)) is None:
        return None
    mask = output.get("attention_mask") if isinstance(output, Mapping) else None
    return hidden, mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def _with_mask(
    hidden: torch.Tensor, mask: torch.Tensor | None, given: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The mask of the output, else the one its module was called with, where it fits."""
    if mask is None and isinstance(given, torch.Tensor) and given.shape == hidden.shape[:2]:
        mask = given
    return hidden, mask


class OutputCapture:
    """Keeps the outputs of one module while it records.

    Gradient checkpointing runs the module once more during the backward, and evaluation runs it
    too: neither is seen, because recording is on only while a training loss is computed. Nor is a
    forward without gradients inside a loss that is trained (a teacher, a virtual adversary).
    """

    def __init__(self, module: nn.Module, extract: Callable[[Any], Any] = hidden_and_mask) -> None:
        self._extract = extract
        self._handle = module.register_forward_hook(self._hook, with_kwargs=True)
        self._recording = self._with_gradient = False
        self.captured: list[Any] = []

    def record(self) -> None:
        """Start recording; gradients are on or off throughout what is recorded, as they are now."""
        self.captured = []
        self._recording, self._with_gradient = True, torch.is_grad_enabled()

    def stop(self) -> None:
        """Record no more."""
        self._recording = False

    def _hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._recording and torch.is_grad_enabled() == self._with_gradient:
            value = self._extract(output)
            if value is not None and self._extract is hidden_and_mask:
                hidden, mask = value
                value = _with_mask(hidden, mask, kwargs.get("attention_mask"))
            if value is not None:
                self.captured.append(value)

    def take(self) -> list[Any]:
        """What was captured, which is then forgotten."""
        captured, self.captured = self.captured, []
        return captured

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()


@contextmanager
def capturing(
    extracts: Mapping[nn.Module, Extract | None],
) -> Iterator[Callable[[], dict[nn.Module, Any]]]:
    """Record what modules give while the context is open, whatever the gradient mode.

    Yields:
        A function that hands over the first output of each module.
    """
    with ExitStack() as stack:
        recorders: dict[nn.Module, OutputCapture] = {}
        for module, extract in extracts.items():
            capture = OutputCapture(module, extract or hidden_and_mask)
            stack.callback(capture.remove)
            capture.record()
            recorders[module] = capture

        def take() -> dict[nn.Module, Any]:
            seen = {}
            for module, capture in recorders.items():
                if captured := capture.take():
                    seen[module] = captured[0][0]
            return seen

        yield take
