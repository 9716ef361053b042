"""An injector on a model, without a trace in the model's weights.

The model's `forward` becomes an object that takes the mentions out of the inputs and holds them
for as long as the call lasts; hooks on the places read them from there.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_adapt.knowledge.injection.forms import Record
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.inputs import NAMES, Knowledge, take_knowledge
from hf_adapt.knowledge.injection.sites import Site, find_sites
from hf_adapt.knowledge.injection.text_triples import VISIBILITY, additive_mask
from hf_adapt.models.structure import reader_of, unwrapped_base

logger = logging.getLogger(__name__)

CACHES = ("past_key_values", "cache")
"""What a decoder's cache is called: the second name is that of transformers from 5.24 on."""


class Attachment:
    """What connects a model with an injector.

    Args:
        model: The model; a PEFT model is looked through.
        injector: Where and how knowledge enters.

    Attributes:
        current: The mentions of the forward under way, None outside of one.
        link: Finds the mentions of a batch of tokens, where the inputs bring none: (input_ids,
            attention_mask) -> Knowledge. None if they are then simply left out.
        batcher: What `link` belongs to, with the graph and the tokenizer; None where unknown.
        mask_rate: Share of the mentions that are withheld in training (see [`EntityPrediction`]).
        records: One for each place, what happened at each mention, while `explain` is at work.

    Raises:
        ValueError: If the model has one already, or the places are not there.
    """

    def __init__(self, model: nn.Module, injector: KnowledgeInjector) -> None:
        base = unwrapped_base(model)
        if attachment_of(base) is not None:
            raise ValueError(
                f"This {type(base).__name__} has an injector already. Take it off first "
                "(attachment_of(model).detach()), or add places to its layers=."
            )
        self.injector = injector
        self.sites: list[Site] = find_sites(base, injector.places) if injector.text is None else []
        self.hidden_sizes: list[int | None] = [None] * len(self.sites)
        self.current: Knowledge | None = None
        self.link: Callable[[torch.Tensor, torch.Tensor | None], Knowledge] | None = None
        self.batcher: Any = None
        self.records: list[Record] | None = None
        self.mask_rate = 0.0
        self.mask_seed = torch.zeros((), dtype=torch.long)
        self.model = base
        self.reader = reader_of(base)
        self._pending: Knowledge | None = None
        self.has_warned = False
        self._checkpointed = [m for m in base.modules() if hasattr(m, "gradient_checkpointing")]
        self._handles = []
        for number, site in enumerate(self.sites):
            module = base.get_submodule(site.name)
            if site.kind == "output":
                hook = OutputHook(self, number)
                self._handles.append(module.register_forward_hook(hook))
            else:
                self._handles.append(module.register_forward_pre_hook(InputHook(self, number)))
        for module in {id(m): m for m in (base, self.reader)}.values():
            object.__setattr__(module, "forward", KnowledgeForward(module, self))

    def connect(self, batcher: Any) -> None:
        """Let inputs that bring no mentions be linked, where a form leaves the tokens as they are.

        Args:
            batcher: A `KnowledgeBatcher`.
        """
        self.batcher = batcher
        self.link = batcher.of_tokens if self.injector.form.changes == "hidden" else None

    def detach(self) -> None:
        """Take the injector off the model."""
        for module in (self.model, self.reader):
            own = module.__dict__.get("forward")
            if isinstance(own, KnowledgeForward):
                del module.__dict__["forward"]
                if own.original is not None:
                    object.__setattr__(module, "forward", own.original)
        for handle in self._handles:
            handle.remove()
        for module in self._checkpointed:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, KnowingCheckpoint):
                module.__dict__["_gradient_checkpointing_func"] = function.function

    # ---- one forward ----

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold the mentions of a forward that begins; `kwargs` no longer have them afterwards."""
        if (visible := kwargs.pop(VISIBILITY, None)) is not None:
            dtype = next(self.model.parameters()).dtype
            kwargs["attention_mask"] = additive_mask(visible, dtype)
            return
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
        position = 0
        for name in CACHES:
            if (cache := kwargs.get(name)) is not None:
                position = _cached_length(cache)
        mask = kwargs.get("attention_mask")
        if not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            mask = None
        if self.mask_rate and self.model.training and torch.is_grad_enabled():
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, torch.Tensor):
                knowledge = knowledge.without(self.withheld(knowledge, ids, mask))
        self.current = replace(knowledge.from_position(position), mask=mask)
        if not torch.compiler.is_compiling():
            self._follow_checkpoints()

    def leave(self, module: nn.Module) -> None:
        """The forward has ended."""
        if module is self.reader:
            self.current = None
        if module is self.model:
            self._pending = None

    def withheld(
        self, knowledge: Knowledge, input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Which mentions are withheld in this step, (B, M) bool: by seed and row."""
        there = knowledge.entities[..., 0] >= 0
        number = torch.arange(there.shape[1], device=there.device)
        mixed = _mixed(row_hash(input_ids, mask).unsqueeze(1) + 7919 * number)
        mixed = _mixed(mixed + self.mask_seed.to(there.device))
        return there & ((mixed & 0xFFFFFF) < int(self.mask_rate * 2**24))

    def _linked(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Knowledge | None:
        """The mentions of inputs that bring none, where they can be found."""
        if not self.injector.is_built:
            return None  # as in a copy of the model that was made before training: a self-teacher
        ids = kwargs.get("input_ids", args[0] if args else None)
        if any(_cached_length(kwargs.get(name)) > 0 for name in CACHES):
            return None  # what was said before lies in the cache
        if kwargs.get("encoder_outputs") is not None or torch.compiler.is_compiling():
            return None
        if self.link is not None and isinstance(ids, torch.Tensor) and ids.ndim == 2:
            return self.link(ids, kwargs.get("attention_mask"))
        self._warn(
            f"{type(self.model).__name__} has a knowledge injector and got inputs without mentions "
            f"({NAMES[0]}, ...): nothing is added. Make batches with the KnowledgeCallback's "
            "Trainer or knowledge_inputs, or load the model with load_knowledge_model, which links "
            "by itself."
        )
        return None

    def _warn(self, message: str) -> None:
        if not self.has_warned and not torch.compiler.is_compiling():
            self.has_warned = True
            logger.warning(message)

    def change(self, number: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The hidden states of a place with knowledge added; None to leave them."""
        self.hidden_sizes[number] = hidden.shape[-1]
        knowledge = self.current
        if self.sites[number].kind == "row_head" and knowledge is None:
            knowledge = self._pending  # a head over rows stands behind the decoder
        if knowledge is None or not self.injector.is_built:
            return None
        if hidden.shape[0] != knowledge.num_rows:
            self._warn(
                f"The place {self.sites[number].place!r} saw {hidden.shape[0]} rows and the "
                f"mentions are of {knowledge.num_rows}: nothing is added there."
            )
            return None
        weight = next(self.injector.parameters())
        if weight.device != hidden.device:
            self.injector.to(hidden.device)
        record: Record | None = None
        if self.records is not None:
            record = {}
            self.records.append(record)
        return self.injector.change(number, self.sites[number].kind, hidden, knowledge, record)

    def _follow_checkpoints(self) -> None:
        """Let what gradient checkpointing computes again see the mentions of its own forward."""
        for module in self._checkpointed:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, KnowingCheckpoint):
                module.__dict__["_gradient_checkpointing_func"] = KnowingCheckpoint(self, function)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, if it has one; a PEFT model is looked through."""
    own = unwrapped_base(model).__dict__.get("forward")
    return own.attachment if isinstance(own, KnowledgeForward) else None


def known_attachment(model: nn.Module) -> Attachment:
    """The attachment of a model, which knows its graph.

    Raises:
        ValueError: If the model has none.
    """
    attachment = attachment_of(model)
    if attachment is None or attachment.batcher is None:
        raise ValueError(
            f"This {type(model).__name__} has no knowledge injector. Load it with "
            "load_knowledge_model, or train it with a KnowledgeCallback first."
        )
    return attachment


class KnowledgeForward:
    """A module's `forward` that takes the mentions besides, and hands on the rest.

    An object rather than a function or a method: a copy of the model gets a copy of it, which
    belongs to the copy.
    """

    def __init__(self, module: nn.Module, attachment: Attachment) -> None:
        self.module, self.attachment = module, attachment
        self.original = module.__dict__.get("forward")
        signature = inspect.signature(self.original or type(module).forward)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        keyword = inspect.Parameter.KEYWORD_ONLY
        last = parameters[-1:] if parameters and parameters[-1].kind.name == "VAR_KEYWORD" else []
        names = (*NAMES, VISIBILITY)
        more = [inspect.Parameter(name, keyword, default=None) for name in names]
        self.__signature__ = signature.replace(
            parameters=[*parameters[: len(parameters) - len(last)], *more, *last]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        self.attachment.enter(self.module, args, kwargs)
        try:
            if self.original is not None:
                return self.original(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)
        finally:
            self.attachment.leave(self.module)


class OutputHook:
    """Changes the hidden states that a module gives."""

    def __init__(self, attachment: Attachment, number: int) -> None:
        self.attachment, self.number = attachment, number

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The changed output, in the form that it had."""
        hidden = output if isinstance(output, torch.Tensor) else None
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            hidden = output[0]
        elif isinstance(output, Mapping):
            hidden = output.get("last_hidden_state")
        if hidden is None:
            raise ValueError(
                f"{type(module).__name__} gives a {type(output).__name__} without hidden states, "
                "so no knowledge can be added to them. Choose another place in layers=."
            )
        changed = self.attachment.change(self.number, hidden)
        if changed is None:
            return None
        if isinstance(output, torch.Tensor):
            return changed
        if isinstance(output, tuple):
            return (changed, *output[1:])
        output["last_hidden_state"] = changed
        return output


class InputHook:
    """Changes the hidden states that a head is given."""

    def __init__(self, attachment: Attachment, number: int) -> None:
        self.attachment, self.number = attachment, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """The changed arguments."""
        changed = self.attachment.change(self.number, args[0])
        return None if changed is None else (changed, *args[1:])


class KnowingCheckpoint:
    """A gradient-checkpointing function that remembers the mentions of its forward.

    What is computed again in the backward would else see those of the latest forward, or none.
    """

    def __init__(self, attachment: Attachment, function: Any) -> None:
        self.attachment, self.function = attachment, function

    def __call__(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a layer, to be run once more."""
        return self.function(_Remembering(self.attachment, run), *args, **kwargs)


class _Remembering:
    """A layer's forward, with the mentions of when it was made."""

    def __init__(self, attachment: Attachment, run: Any) -> None:
        self.attachment, self.run, self.knowledge = attachment, run, attachment.current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self.attachment.current = self.attachment.current, self.knowledge
        try:
            return self.run(*args, **kwargs)
        finally:
            self.attachment.current = before


def row_hash(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A number for each row that its tokens decide, whatever its padding, (B,) long."""
    ids = input_ids.long()
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        ids = ids * mask.bool()
    return _mixed((ids * 2654435761 + ids * ids).sum(1))


def _mixed(number: torch.Tensor) -> torch.Tensor:
    """Bits well stirred: numbers that are near each other become far apart."""
    number = (number ^ (number >> 33)) * -49064778989728563
    number = (number ^ (number >> 33)) * -4265267296055464877
    return number ^ (number >> 33)


def _cached_length(cache: Any) -> int:
    """How many positions a decoder's cache holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if len(cache) else 0
