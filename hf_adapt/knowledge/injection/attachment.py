"""What connects a model with knowledge: its `forward` takes further inputs.

The model's `forward` becomes an object that takes these out of the inputs and uses them for as long
as the call lasts. Nothing of it is in the model's weights.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn

from hf_adapt.models.structure import unwrapped_base

logger = logging.getLogger(__name__)


class Attachment:
    """What connects a model with knowledge.

    A subclass calls `_install` once all else is checked, and defines `enter` and `leave`.
    """

    input_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        base = unwrapped_base(model)
        if attachment_of(base) is not None:
            raise ValueError(
                f"This {type(base).__name__} has an injector already, and a model takes one: "
                "KnowledgeInjection and TextTriples do not go together. Take it off first "
                "(attachment_of(model).detach()), or add injection points to its layers=."
            )
        self.model = self.reader = base
        self.batcher: Any = None
        self.points: list[Any] = []
        self.records: list[Any] | None = None
        self.has_warned = False

    def _install(self) -> None:
        for module in {id(m): m for m in (self.model, self.reader)}.values():
            object.__setattr__(module, "forward", KnowledgeForward(module, self))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins; `kwargs` must not have the further inputs afterwards."""
        raise NotImplementedError

    def leave(self, module: nn.Module) -> None:
        """The forward has ended."""

    def detach(self) -> None:
        """Give the model its own `forward` back."""
        for module in (self.model, self.reader):
            own = module.__dict__.get("forward")
            if isinstance(own, KnowledgeForward):
                del module.__dict__["forward"]
                if own.original is not None:
                    object.__setattr__(module, "forward", own.original)

    def warn(self, message: str) -> None:
        """Warn, once."""
        if not self.has_warned and not torch.compiler.is_compiling():
            self.has_warned = True
            logger.warning(message)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, if it has one; a PEFT model is looked through."""
    own = unwrapped_base(model).__dict__.get("forward")
    return own.attachment if isinstance(own, KnowledgeForward) else None


def known_attachment(model: nn.Module) -> Attachment:
    """The attachment of a model, which knows its graph."""
    attachment = attachment_of(model)
    if attachment is None or attachment.batcher is None:
        raise ValueError(
            f"This {type(model).__name__} has no knowledge injector. Load it with "
            "load_knowledge_model, or train it with a KnowledgeCallback first."
        )
    return attachment


class KnowledgeForward:
    """A module's `forward` that takes the further inputs, and hands on the rest.

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
        more = [inspect.Parameter(n, keyword, default=None) for n in attachment.input_names]
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
