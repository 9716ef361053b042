"""One forward of the model on some rows, with everything captured that adaptations ask for."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.parts import Layout, Part
from hf_adapt.engine.trainer_kinds import is_sentence_trainer, sentence_inputs
from hf_adapt.engine.unlabelled_rows import TARGET_ROWS_FAIL, explained
from hf_adapt.models.capture import InputCapture, OutputCapture
from hf_adapt.models.structure import find_feature_module, is_encoder_decoder, unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

BaseLoss = Callable[[Any, dict[str, Any], Any], torch.Tensor]
"""The Trainer's own `compute_loss` as (model, inputs, num_items_in_batch) -> loss."""


class ForwardPass:
    """Runs the model on the parts of a micro-batch and captures outputs.

    Args:
        trainer: The Trainer.
        model: The unwrapped model.
        layout: What is known of the model's outputs; the captured modules are entered.
        adaptations: The active adaptations.
        base_loss: The Trainer's own `compute_loss`.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        layout: Layout,
        adaptations: Sequence[Adaptation],
        base_loss: BaseLoss,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.adaptations = adaptations
        self.base_loss = base_loss
        self.label_names = {*trainer.label_names, "labels", "shift_labels"}
        self._layout = layout
        self._captures: dict[int, OutputCapture] = {}
        self._outputs: OutputCapture | None = None
        self._warned_of_extra_forward = False
        self._named_inputs: frozenset[str] | None = None

    # ---- captures ----

    def connect(self) -> None:
        """Hook the modules whose outputs the objectives ask for.

        Raises:
            ValueError: If a layer that an objective names does not exist.
        """
        objectives = [a for a in self.adaptations if isinstance(a, Objective)]
        for layer in {objective.feature_layer for objective in objectives}:
            try:
                module = find_feature_module(self.model, layer)
            except ValueError as error:
                if layer is not None:
                    raise
                self._layout.module_of[layer] = error  # raised if an objective asks for features
                continue
            self._layout.module_of[layer] = module
            if id(module) not in self._captures:
                self._captures[id(module)] = OutputCapture(module)
        for objective in objectives:
            for module, extract in objective.captures(self.model).items():
                if extract is not None:
                    self._captures[id(module)] = OutputCapture(module, extract)
                elif id(module) not in self._captures:
                    self._captures[id(module)] = OutputCapture(module)
        self._outputs = OutputCapture(self.model, extract=lambda output: output)

    def capture_input(self, layer: str) -> str:
        """Hook what a module is given.

        Returns:
            The name of a feature layer whose output it is.
        """
        name, stand_in = f"the input of {layer}", nn.Identity()
        self._captures[id(stand_in)] = InputCapture(find_feature_module(self.model, layer))
        self._layout.module_of[name] = stand_in
        return name

    def close(self) -> None:
        """Remove all hooks from the model."""
        for capture in self._all_captures():
            capture.remove()

    def _all_captures(self) -> list[OutputCapture]:
        return [*self._captures.values(), *([self._outputs] if self._outputs else [])]

    @contextmanager
    def recording(self, part: Part) -> Iterator[None]:
        """Capture what the model gives for a part while the context is open."""
        captures = self._all_captures()
        for capture in captures:
            capture.record()
        try:
            yield
        finally:
            for capture in captures:
                capture.stop()
            captured = {key: capture.take() for key, capture in self._captures.items()}
            outputs = self._outputs.take() if self._outputs else []
        # A user's loss may run the model several times (R-Drop, adversarial training, one
        # forward per column): the first run over all rows is the plain one.
        size = len(part.domain)
        for key, values in captured.items():
            fitting = [v for v in values if v[0].shape[0] in (size, size * part.num_choices)]
            if fitting:
                part.hidden[key], mask = fitting[0]
                if mask is not None:
                    part.masks[key] = mask
        part.outputs = outputs[0] if outputs else None

    # ---- forwards ----

    def task_loss(
        self, model: nn.Module, part: Part, num_items: Any, has_loss: bool = True
    ) -> torch.Tensor:
        """The task's loss on a part, by the Trainer's own `compute_loss`; outputs are captured.

        Args:
            model: The model as the Trainer wrapped it.
            part: The rows.
            num_items: The Trainer's `num_items_in_batch`.
            has_loss: Whether there is a loss to compute; else it is 0.
        """
        with ExitStack() as stack:
            for adaptation in self.adaptations:
                stack.enter_context(adaptation.around_forward(part.inputs))
            with self.recording(part):
                if has_loss:
                    loss = self._explained_loss(model, part, num_items)
                else:
                    self._without_loss(model, part)
                    loss = torch.zeros((), device=self.trainer.args.device)
            if (
                is_sentence_trainer(self.trainer)
                and not self._captures.keys() <= part.hidden.keys()
            ):
                self._warn_of_extra_forward()
                with self.recording(part):
                    self._without_loss(model, part)
        return loss

    def features(self, model: nn.Module, part: Part) -> Part:
        """Run the model on rows alone, for their features and predictions; there is no loss.

        Returns:
            The part, with its outputs.
        """
        with self.recording(part):
            self._without_loss(model, part)
        return part

    def _explained_loss(self, model: nn.Module, part: Part, num_items: Any) -> torch.Tensor:
        """The base loss; where it fails on target rows only, the error says so."""

        def loss(inputs: Mapping[str, Any]) -> torch.Tensor:
            return self.base_loss(model, dict(inputs), num_items)

        try:
            return loss(part.inputs)
        except Exception as error:
            reason = explained(error, part, self.label_names, loss)
            if reason is error:
                raise
            raise reason from error

    def _warn_of_extra_forward(self) -> None:
        if not self._warned_of_extra_forward:
            self._warned_of_extra_forward = True
            logger.warning(
                "The training loss runs the model without gradients (cached losses) or on other "
                "rows than those of a batch (negatives), so the features of the source rows are "
                "computed by one more forward. It takes memory for all rows of a micro-batch: use "
                "a smaller per_device_train_batch_size if that is too much."
            )

    def _without_loss(self, model: nn.Module, part: Part) -> None:
        if is_sentence_trainer(self.trainer):  # one forward per text column
            for features in sentence_inputs(self.trainer, self.model, part.inputs):
                model(features) if isinstance(self.model, nn.Sequential) else model(**features)
                if all(capture.captured for capture in self._captures.values()):
                    return  # only the first column's features are used
            return
        drop = () if is_encoder_decoder(self.model) else self.trainer.label_names
        if (taken := self._taken_inputs()) is not None:
            # What the user's own loss takes from the batch before the model is called.
            drop = (*drop, *(part.inputs.keys() - taken))
        try:
            model(**{key: value for key, value in part.inputs.items() if key not in drop})
        except Exception as error:
            if bool((part.domain > 0).any()):
                error.add_note(TARGET_ROWS_FAIL)
            raise

    def _taken_inputs(self) -> frozenset[str] | None:
        """The inputs that the model's forward names, read once; None if it takes any."""
        if self._named_inputs is None:
            taken = inspect.signature(unwrapped_base(self.model).forward).parameters
            takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
            self._named_inputs = frozenset() if takes_any else frozenset(taken)
        return self._named_inputs or None
