"""Injection points: the modules of a model whose hidden states knowledge enters."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hf_adapt.models.heads import has_head
from hf_adapt.models.layers import find_stacks
from hf_adapt.models.structure import is_encoder_decoder, reader_of, unwrapped_base

Location = int | str
"""`"embeddings"`, `"head"`, a layer's number (negative from the top) or a module's dotted name."""

Kind = Literal["output", "head", "row_head"]
"""The output of a module, the input of a head over tokens, the input of a head over rows."""


@dataclass(frozen=True)
class InjectionPoint:
    """A module whose hidden states knowledge enters."""

    location: Location
    module: str
    kind: Kind = "output"


def find_injection_points(model: nn.Module, layers: Sequence[Location]) -> list[InjectionPoint]:
    """The modules behind `layers=`."""
    base = unwrapped_base(model)
    names = {id(module): name for name, module in base.named_modules()}
    found = []
    for location in layers:
        if location == "head":
            found.append(_head(base, names))
        elif location == "embeddings":
            found.append(InjectionPoint(location, names[id(_embeddings(base))]))
        else:
            name = location if isinstance(location, str) else _layer(base, names, location)
            found.append(InjectionPoint(location, _named(base, names, name)))
    modules = [point.module for point in found]
    if twice := {module for module in modules if modules.count(module) > 1}:
        raise ValueError(
            f"layers={list(layers)} name {', '.join(sorted(twice))} more than once: name each "
            "module once."
        )
    return found


def _embeddings(base: nn.Module) -> nn.Module:
    reader: Any = reader_of(base)
    owners: list[Any] = [reader, getattr(base, "base_model", None), base]
    for owner in owners:
        try:
            module = owner.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            return module
    raise ValueError(
        f"{type(base).__name__} has no get_input_embeddings(). Name a module instead, such as "
        "layers=['encoder.embeddings']."
    )


def _layer(base: nn.Module, names: dict[int, str], number: int) -> str:
    inside = names[id(reader_of(base))]
    stacks = [s for s in find_stacks(base) if not inside or s.path.startswith(inside + ".")]
    if len(stacks) != 1:
        there = ", ".join(stack.path for stack in stacks) or "none"
        raise ValueError(
            f"A layer's number needs a model with one stack of layers; {type(base).__name__} has "
            f"{len(stacks)} ({there}). Name the module instead, such as "
            f"layers=['{stacks[0].layers[-1] if stacks else 'encoder.layer.3'}']."
        )
    layers = stacks[0].layers
    if not -len(layers) <= number < len(layers):
        raise ValueError(
            f"layers names layer {number}, but {stacks[0].path} has {len(layers)} layers: 0 to "
            f"{len(layers) - 1}, or -1 for the last."
        )
    return layers[number]


def _head(base: nn.Module, names: dict[int, str]) -> InjectionPoint:
    """The first module after the base model that has weights."""
    headless = getattr(base, "base_model", None)
    children = [
        child
        for child in base.children()
        if child is not headless and any(True for _ in child.parameters())
    ]
    if headless is base and isinstance(output := _output_embeddings(base), nn.Module):
        children = [output]  # a language model that is its own base
    elif headless is None or headless is base:
        children = []
    if not children:
        raise ValueError(
            f"{type(base).__name__} has no head on a base model. Use 'embeddings', a layer's "
            "number or a module's name."
        )
    of_rows = has_head(base, "sequence_classification", "multiple_choice", "next_sentence")
    rows = of_rows or is_encoder_decoder(base)
    return InjectionPoint("head", names[id(children[0])], "row_head" if rows else "head")


def _output_embeddings(base: Any) -> Any:
    get = getattr(base, "get_output_embeddings", None)
    return get() if callable(get) else None


def _named(base: nn.Module, names: dict[int, str], location: str) -> str:
    known = [name for name in names.values() if name]
    if location in known:
        return location
    near = difflib.get_close_matches(location, known, n=5, cutoff=0.3)
    raise ValueError(
        f"layers names {location!r}, which is not a module of {type(base).__name__}. Near names: "
        f"{', '.join(near) or 'none'}; or 'embeddings', 'head' or a layer's number."
    )
