"""Exact freezing: frozen parameters do not change by a bit, and their backward is not computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_adapt.models.layers import find_stacks

BatchNorm = nn.modules.batchnorm._BatchNorm

INPUT_GRADIENT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
"""The hooks that transformers and PEFT put on input embeddings for gradient checkpointing."""


class Freezer:
    """Freezes and unfreezes named parameters of a model during a run, and undoes it at its end.

    Args:
        model: The unwrapped model, as the optimizer knows it.
        parameters: The scheduled parameters, by name.
        dropout: Whether dropout in frozen modules stays active.
        batch_norm: Whether batch norm in frozen modules uses its running statistics and does not
            update them.
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
        self._stacks = find_stacks(model)
        self._layers = {model.get_submodule(n) for stack in self._stacks for n in stack.layers}
        self._in_eval: list[nn.Module] = []
        self._hooks: list[tuple[nn.Module, int, Any]] = []

    def train_only(self, names: frozenset[str]) -> None:
        """Train exactly these parameters; call it between optimizer steps.

        The gradient of a frozen parameter is deleted: weight decay and momentum would use it as if
        it belonged to this step.
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
        """The outermost modules without trainable parameters.

        Inside a layer that trains, base weights under adapters do not count: the dropout beside
        them belongs to the adapters.
        """
        scheduled = {id(p) for p in self.parameters.values()}
        found: list[nn.Module] = []

        def visit(module: nn.Module, in_layer: bool) -> None:
            parameters = list(module.parameters())
            if not parameters:
                return
            if any(p.requires_grad for p in parameters):
                in_layer = in_layer or module in self._layers
                for child in module.children():
                    visit(child, in_layer)
            elif not in_layer or any(id(p) in scheduled for p in parameters):
                found.append(module)

        visit(self.model, False)
        return found + self._input_dropout(set(found))

    def _input_dropout(self, frozen: set[nn.Module]) -> list[nn.Module]:
        """Dropout between the embeddings and a frozen first layer (GPT-2's): it has no weights."""
        found: list[nn.Module] = []
        for stack in self._stacks:
            if self.model.get_submodule(stack.layers[0]) not in frozen:
                continue
            owner = self.model.get_submodule(stack.path.rpartition(".")[0])
            for name, child in owner.named_children():
                if name == stack.path.rpartition(".")[2]:
                    break
                if isinstance(child, nn.Dropout):
                    found.append(child)
        return found

    def before_forward(self) -> None:
        """Set the mode of frozen modules; the Trainer sets training mode for each batch."""
        for module in self._in_eval:
            module.training = False

    def drop_input_gradients(self) -> None:
        """Remove the hooks that give the embeddings' output a gradient.

        Only reentrant gradient checkpointing needs them. With them, the backward recomputes every
        frozen layer for a gradient that nothing uses.
        """
        for module in self.model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "") in INPUT_GRADIENT_HOOKS:
                    self._hooks.append((module, key, hook))
                    del module._forward_hooks[key]

    def undo(self) -> None:
        """Make every scheduled parameter trainable and restore modes and hooks."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        for module in self._in_eval:
            module.training = self.model.training
        self._in_eval = []
        for module, key, hook in self._hooks:
            module._forward_hooks[key] = hook  # under its key, by which its handle removes it
        self._hooks = []
