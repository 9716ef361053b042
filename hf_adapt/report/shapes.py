"""What the JSON files of a run must look like, so that a damaged one is named and left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NUMBER = (int, float)


@dataclass(frozen=True)
class EachOf:
    """The shape of an object with any keys, whose values have one shape."""

    values: Any


RESULT = {
    "source!": str,
    "target!": str,
    "method!": str,
    "seed!": int,
    "role": str,
    "seconds": NUMBER,
    "source_accuracy": NUMBER,
    "source_f1": NUMBER,
    "target_accuracy": NUMBER,
    "target_f1": NUMBER,
    "target_predicted_shares": EachOf(NUMBER),
    "target_true_shares": EachOf(NUMBER),
    "warnings": int,
    "first_warning": str,
    "error": str,
}
LOG_ENTRY = {"step": NUMBER}
DIAGNOSTICS = {
    "layers": [{"name!": str, "a_distance": NUMBER, "mmd": NUMBER}],
    "groups": EachOf({"accuracy!": NUMBER, "low!": NUMBER, "high!": NUMBER, "count!": int}),
}
CHOICE = {
    "chosen!": str,
    "baseline": str,
    "reason": str,
    "seed": int,
    "run": str,
    "candidates": [{"name!": str, "kept": bool, "reason": str, "scores": EachOf(NUMBER)}],
}

_NAMES = {str: "a text", int: "a whole number", bool: "true or false", NUMBER: "a number"}


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """What is wrong with a value that came from JSON; None if it has the shape.

    Args:
        value: The value.
        shape: A type; a list of the shape of its items; [`EachOf`]; or a dict of keys and shapes,
            where `!` ends a key that must be there. Others may be missing or null.
        place: Where the value stands, for the message.

    Example:
        >>> misfit({"name": "a", "seed": "7"}, {"name!": str, "seed": int})
        "seed: expected a whole number, got '7'"
    """
    parts: Iterable[tuple[str, Any, Any]]
    if isinstance(shape, dict | EachOf):
        if not isinstance(value, dict):
            return _wrong(place, "an object", value)
        if isinstance(shape, EachOf):
            parts = [(f".{key}", each, shape.values) for key, each in value.items()]
        else:
            parts = []
            for key, own in shape.items():
                each = value.get(key.removesuffix("!"))
                if each is not None:
                    parts.append((f".{key.removesuffix('!')}", each, own))
                elif key.endswith("!"):
                    return f"{place}: {key[:-1]} is missing".removeprefix(": ")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return _wrong(place, "a list", value)
        parts = [(f"[{number}]", each, shape[0]) for number, each in enumerate(value)]
    else:
        if shape is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # as other tools write whole numbers
        fits = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
        return None if fits else _wrong(place, _NAMES[shape], value)
    found = (misfit(each, own, f"{place}{key}".lstrip(".")) for key, each, own in parts)
    return next((wrong for wrong in found if wrong), None)


def _wrong(place: str, expected: str, value: Any) -> str:
    return f"{place}: expected {expected}, got {repr(value)[:40]}".removeprefix(": ")
