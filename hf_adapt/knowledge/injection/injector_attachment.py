"""An injector on a model: hooks at its injection points read the mentions of the forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_adapt.knowledge.injection.attachment import Attachment
from hf_adapt.knowledge.injection.injection_layers import Record
from hf_adapt.knowledge.injection.injection_points import InjectionPoint, find_injection_points
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.inputs import NAMES, Knowledge, take_knowledge
from hf_adapt.models.hashing import mixed_bits, row_hash
from hf_adapt.models.structure import reader_of

CACHES = ("past_key_values", "cache")
"""What a decoder's cache is called: the second name is that of transformers from 5.24 on."""


class InjectorAttachment(Attachment):
    """What connects a model with an injector."""

    input_names = NAMES

    def __init__(self, model: nn.Module, injector: KnowledgeInjector) -> None:
        super().__init__(model)
        self.injector = injector
        self.points: list[InjectionPoint] = find_injection_points(self.model, injector.layers)
        self.reader = reader_of(self.model)
        self.hidden_sizes: list[int | None] = [None] * len(self.points)
        self.current: Knowledge | None = None  # of the forward under way
        # Finds the mentions of a batch of tokens, where the inputs have none.
        self.link: Callable[[torch.Tensor, torch.Tensor | None], Knowledge] | None = None
        self.mask_rate = 0.0  # the share of mentions that EntityPrediction masks in training
        self.mask_seed = torch.zeros((), dtype=torch.long)
        self._pending: Knowledge | None = None
        self._checkpointed = [
            module for module in self.model.modules() if hasattr(module, "gradient_checkpointing")
        ]
        self._handles = []
        for number, point in enumerate(self.points):
            module = self.model.get_submodule(point.module)
            # Partials of methods: a copy of the model gets copies, which belong to the copy.
            if point.kind == "output":
                handle = module.register_forward_hook(partial(self._change_output, number))
            else:
                handle = module.register_forward_pre_hook(partial(self._change_input, number))
            self._handles.append(handle)
        self._install()

    def connect(self, batcher: Any) -> None:
        """Link inputs without mentions, where the injection layer leaves the tokens as they are."""
        self.batcher = batcher
        self.link = None if self.injector.layer_class.changes_input else batcher.of_tokens

    def detach(self) -> None:
        """Take the injector off the model."""
        super().detach()
        for handle in self._handles:
            handle.remove()
        for module in self._checkpointed:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, KnowledgeCheckpoint):
                module.__dict__["_gradient_checkpointing_func"] = function.function

    # ---- one forward ----

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the mentions of a forward that begins."""
        given = take_knowledge(kwargs)
        reads = module is self.reader
        if given is None and not (reads and self._pending is not None):
            given = self._linked(module, args, kwargs)
        if module is self.model and not reads:
            self._pending = given
            return
        knowledge = given if given is not None else self._pending
        if knowledge is None:
            return
        mask = kwargs.get("attention_mask")
        if not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            mask = None
        if self.mask_rate and self.model.training and torch.is_grad_enabled():
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, torch.Tensor):
                knowledge = knowledge.without(self.masked_mentions(knowledge, ids, mask))
        # Positions count from here: what lies before is in a cache.
        position = max(_cached_length(kwargs.get(name)) for name in CACHES)
        spans = knowledge.spans - position if position else knowledge.spans
        self.current = replace(knowledge, spans=spans, mask=mask)
        if not torch.compiler.is_compiling():
            self._follow_checkpoints()

    def leave(self, module: nn.Module) -> None:
        """The forward has ended."""
        if module is self.reader:
            self.current = None
        if module is self.model:
            self._pending = None

    def masked_mentions(
        self, knowledge: Knowledge, input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Which mentions are masked in this step, (B, M) bool: by seed and row."""
        there = knowledge.entities[..., 0] >= 0
        number = torch.arange(there.shape[1], device=there.device)
        mixed = mixed_bits(row_hash(input_ids, mask).unsqueeze(1) + 7919 * number)
        mixed = mixed_bits(mixed + self.mask_seed.to(there.device))
        return there & ((mixed & 0xFFFFFF) < int(self.mask_rate * 2**24))

    def _linked(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Knowledge | None:
        """The mentions of inputs that have none, where they can be found."""
        if not self.injector.is_built:
            return None  # as in a copy of the model that was made before training: a self-teacher
        ids = kwargs.get("input_ids", args[0] if args else None)
        if any(_cached_length(kwargs.get(name)) > 0 for name in CACHES):
            return None  # what was said before lies in the cache
        if kwargs.get("encoder_outputs") is not None or torch.compiler.is_compiling():
            return None
        if self.link is not None and isinstance(ids, torch.Tensor) and ids.ndim == 2:
            return self.link(ids, kwargs.get("attention_mask"))
        self.warn(
            f"{type(self.model).__name__} has a knowledge injector and got inputs without mentions "
            f"({NAMES[0]}, ...): nothing is added. Make batches with the KnowledgeCallback's "
            "Trainer or knowledge_inputs, or load the model with load_knowledge_model, which links "
            "by itself."
        )
        return None

    def inject(self, number: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The hidden states at an injection point with knowledge added; None to leave them."""
        self.hidden_sizes[number] = hidden.shape[-1]
        knowledge = self.current
        point = self.points[number]
        if point.kind == "row_head" and knowledge is None:
            knowledge = self._pending  # a head over rows stands behind the decoder
        if knowledge is None or not self.injector.is_built:
            return None
        if hidden.shape[0] != len(knowledge.spans):
            self.warn(
                f"The injection point {point.location!r} saw {hidden.shape[0]} rows and the "
                f"mentions are of {len(knowledge.spans)}: nothing is added there."
            )
            return None
        weight = next(self.injector.parameters())
        if weight.device != hidden.device:
            self.injector.to(hidden.device)
        record: Record | None = None if self.records is None else {}
        if self.records is not None:
            self.records.append(record)
        return self.injector.inject(number, point.kind, hidden, knowledge, record)

    def _change_output(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        """A hook: the output with changed hidden states, of the type that it had."""
        hidden = output if isinstance(output, torch.Tensor) else None
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            hidden = output[0]
        elif isinstance(output, Mapping):
            hidden = output.get("last_hidden_state")
        if hidden is None:
            raise ValueError(
                f"{type(module).__name__} gives a {type(output).__name__} without hidden states, "
                "so no knowledge can be added to them. Choose another module in layers=."
            )
        changed = self.inject(number, hidden)
        if changed is None or isinstance(output, torch.Tensor):
            return changed
        if isinstance(output, tuple):
            return (changed, *output[1:])
        output["last_hidden_state"] = changed
        return output

    def _change_input(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """A hook before a head: its arguments with changed hidden states."""
        changed = self.inject(number, args[0])
        return None if changed is None else (changed, *args[1:])

    def _follow_checkpoints(self) -> None:
        """Let what gradient checkpointing computes again see the mentions of its own forward."""
        for module in self._checkpointed:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, KnowledgeCheckpoint):
                own = KnowledgeCheckpoint(self, function)
                module.__dict__["_gradient_checkpointing_func"] = own


class KnowledgeCheckpoint:
    """A gradient-checkpointing function that remembers the mentions of its forward.

    What is computed again in the backward would else see those of the latest forward, or none.
    """

    def __init__(self, attachment: InjectorAttachment, function: Any) -> None:
        self.attachment, self.function = attachment, function

    def __call__(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a layer, to be run once more."""
        attachment, knowledge = self.attachment, self.attachment.current

        def run_again(*args: Any, **kwargs: Any) -> Any:
            before, attachment.current = attachment.current, knowledge
            try:
                return run(*args, **kwargs)
            finally:
                attachment.current = before

        return self.function(run_again, *args, **kwargs)


def _cached_length(cache: Any) -> int:
    """How many positions a decoder's cache holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if len(cache) else 0
