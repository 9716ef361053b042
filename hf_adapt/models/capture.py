"""Hooks that capture the outputs of modules during a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Extract = Callable[[Any], Any]
"""Turns a module's output into (the value to capture, its mask or None), or into None."""


def hidden_state(output: Any) -> torch.Tensor | None:
    """The hidden state in a module's output, which may be a tensor, a tuple or a mapping."""
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
    """The hidden state in a module's output, and its mask if the output contains one.

    The inputs of a sentence-transformer have one mask per text column; its modules return the mask
    of their own output.
    """
    if (hidden := hidden_state(output)) is None:
        return None
    mask = output.get("attention_mask") if isinstance(output, Mapping) else None
    return hidden, mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def _with_mask(
    hidden: torch.Tensor, mask: torch.Tensor | None, given: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The mask of the output, else the mask that the module was called with, if it fits."""
    if mask is None and isinstance(given, torch.Tensor) and given.shape == hidden.shape[:2]:
        mask = given
    return hidden, mask


class OutputCapture:
    """Captures the outputs of one module while recording is on.

    Gradient checkpointing runs the module again during the backward, and evaluation runs it as
    well. Neither is captured, because recording is on only while a training loss is computed. A
    forward without gradients inside a training loss (a teacher, a virtual adversary) is not
    captured either.

    Args:
        module: The module to hook.
        extract: What to capture of its output.
    """

    def __init__(self, module: nn.Module, extract: Callable[[Any], Any] = hidden_and_mask) -> None:
        self._extract = extract
        self._handle = module.register_forward_hook(self._hook, with_kwargs=True)
        self._recording = self._with_gradient = False
        self.captured: list[Any] = []

    def record(self) -> None:
        """Start recording; forwards with another gradient mode than the current one are ignored."""
        self.captured = []
        self._recording, self._with_gradient = True, torch.is_grad_enabled()

    def stop(self) -> None:
        """Stop recording."""
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
        """Return the captured outputs and forget them."""
        captured, self.captured = self.captured, []
        return captured

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()


class InputCapture(OutputCapture):
    """Captures the hidden state that a module is given, as [`OutputCapture`] its output."""

    def _hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        super()._hook(module, args, kwargs, [*args, *kwargs.values()])


@contextmanager
def capturing(
    modules: Mapping[nn.Module, Extract | None],
) -> Iterator[Callable[[], dict[nn.Module, Any]]]:
    """Capture the outputs of modules while the context is open, in any gradient mode.

    Args:
        modules: The modules, each with what to capture of its output; None for the hidden state.

    Yields:
        A function that returns the first output of each module and forgets it.
    """
    with ExitStack() as stack:
        captures: dict[nn.Module, OutputCapture] = {}
        for module, extract in modules.items():
            capture = OutputCapture(module, extract or hidden_and_mask)
            stack.callback(capture.remove)
            capture.record()
            captures[module] = capture

        def take() -> dict[nn.Module, Any]:
            seen = {}
            for module, capture in captures.items():
                if captured := capture.take():
                    seen[module] = captured[0][0]
            return seen

        yield take
