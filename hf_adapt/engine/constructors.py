"""What a constructor takes: its arguments, their types, and what the docstring says of them."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any


def parameters(called: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments of a class or function by name, and whether there may be others.

    Their annotations are no strings: types, or None where only type checkers know. A class
    whose `**arguments` go to its base class takes those of the base class.

    Example:
        >>> from hf_adapt.engine.adaptation import Objective
        >>> class Own(Objective):
        ...     def __init__(self, size: int = 3, **objective):
        ...         super().__init__(**objective)
        >>> known, _ = parameters(Own)
        >>> list(known), known["size"].annotation
        (['size', 'weight', 'feature_layer', 'pooling', 'name'], <class 'int'>)
    """
    known: dict[str, inspect.Parameter] = {}
    steps = [called]
    if isinstance(called, type):
        steps = [vars(each)["__init__"] for each in called.__mro__ if "__init__" in vars(each)][:-1]
    for step in steps:
        found = [p for p in inspect.signature(step).parameters.values() if p.name != "self"]
        others = None
        for each in found:
            kind = _evaluated(each.annotation, step)
            if each.kind is not each.VAR_KEYWORD:
                known.setdefault(each.name, each.replace(annotation=kind))
            elif typing.get_origin(kind) is typing.Unpack:
                for name, hint in typing.get_type_hints(typing.get_args(kind)[0]).items():
                    known[name] = inspect.Parameter(name, each.KEYWORD_ONLY, annotation=hint)
            else:
                others = each
        if others is None:
            return known, False
    return known, bool(steps)


def _evaluated(annotation: Any, function: Any) -> Any:
    """What an annotation stands for; None where only type checkers know: a model, a tokenizer."""
    try:
        return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
    except NameError:
        return None


def descriptions(cls: type) -> dict[str, str]:
    """What the docstring of a class says of each argument."""
    section = re.search(r"\nArgs:\n((?: {4}.*\n|\n)+)", inspect.cleandoc(cls.__doc__ or "") + "\n")
    entries = re.findall(
        r"^ {4}(\w+): ((?:.*\n)(?: {5,}.*\n)*)", section[1] if section else "", re.M
    )
    return {name: re.sub(r"\[(`.*?`)\]", r"\1", " ".join(text.split())) for name, text in entries}
