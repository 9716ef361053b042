"""Freezing that is exact: no bit of a frozen part moves, and its backward is not computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

BatchNorm = nn.modules.batchnorm._BatchNorm

INPUT_GRADIENT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
"""The hooks that transformers and PEFT put on input embeddings for gradient checkpointing."""

logger = logging.getLogger(__name__)


class Freezer:
    """Freezes and unfreezes named parameters of a model during a run, and undoes it at its end.

    Args:
        model: The unwrapped model, as the optimizer knows it.
        parameters: The scheduled parameters, by name.
        dropout: Whether dropout in frozen parts stays live.
        batch_norm: Whether batch norm in frozen parts normalises by its running statistics and
            leaves them alone.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        dropout: bool = True,
        batch_norm: bool = True,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self._dropout = dropout
        self._batch_norm = batch_norm
        self._in_eval: list[nn.Module] = []
        self._hooks: list[tuple[nn.Module, int, Any]] = []

    def train_only(self, names: frozenset[str]) -> None:
        """Let exactly these parameters train.

        A gradient left behind would be taken for one of this step by decay and momentum, so a
        frozen parameter has none. Only for between optimizer steps.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # A forward without a backward (an evaluation) leaves the whole parameters in
                # place, and these take over `requires_grad` only when they are gathered again.
                module.reshard()
        for name, parameter in self.parameters.items():
            trains = name in names
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
        self._in_eval = [
            module
            for frozen in self._frozen_modules()
            for module in frozen.modules()
            if not self._dropout or (self._batch_norm and isinstance(module, BatchNorm))
        ]

    def _frozen_modules(self) -> list[nn.Module]:
        """The outermost modules that hold parameters, none of which trains."""
        found: list[nn.Module] = []

        def visit(module: nn.Module) -> None:
            flags = [p.requires_grad for p in module.parameters()]
            if flags and not any(flags):
                found.append(module)
            elif flags:
                for child in module.children():
                    visit(child)

        visit(self.model)
        return found

    def before_forward(self) -> None:
        """Set the mode of frozen modules; the Trainer puts all in training mode for each batch."""
        for module in self._in_eval:
            module.training = False

    def drop_input_gradients(self) -> None:
        """Take off the hooks that give the embeddings' output a gradient.

        Gradient checkpointing needs them only in its reentrant form; with them, the backward
        recomputes every frozen layer for a gradient that nothing uses.
        """
        for module in self.model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "") in INPUT_GRADIENT_HOOKS:
                    self._hooks.append((module, key, hook))
                    del module._forward_hooks[key]

    def undo(self) -> None:
        """Leave every scheduled parameter trainable and every module as the Trainer made it."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        for module in self._in_eval:
            module.training = self.model.training
        self._in_eval = []
        for module, key, hook in self._hooks:
            module._forward_hooks[key] = hook  # under its own key, so its handle removes it still
        self._hooks = []
