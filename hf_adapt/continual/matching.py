"""Which weights two models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]
"""The shape of each weight, by its name."""


def shared_weights(
    start: Shapes,
    tuned: Shapes,
    prefixes: tuple[str, str] = ("", ""),
    same_labels: bool = True,
) -> dict[str, str]:
    """The weights of a model that the model it was tuned from has too.

    The base model must be the same, except for whole modules that one of them lacks (a pooler). A
    head that `start` lacks, or that has another shape or other labels there, is not shared.

    Args:
        start: The model that training began from, perhaps without a head.
        tuned: The model.
        prefixes: `base_model_prefix` of both.
        same_labels: Whether the heads of both predict the same labels.

    Returns:
        Names in `tuned`, with their names in `start`.

    Raises:
        ValueError: If the models are of different architectures; names the first weights that
            differ.

    Example:
        >>> body, head = {"encoder.weight": (2, 2)}, {"classifier.weight": (3, 2)}
        >>> shared_weights(body, {"bert.encoder.weight": (2, 2), **head}, ("bert", "bert"))
        {'bert.encoder.weight': 'encoder.weight'}
    """
    other, own = _located(start, prefixes[0]), _located(tuned, prefixes[1])
    modules = {_module(w) for w in own if w[0]} & {_module(w) for w in other if w[0]}
    differing = []
    for where in dict.fromkeys([*own, *other]):
        if _module(where) in modules:
            mine = tuple(tuned[own[where]]) if where in own else None
            theirs = tuple(start[other[where]]) if where in other else None
            if mine != theirs:
                differing.append(
                    f"{own.get(where, where[1])} ({theirs or 'none'}, {mine or 'none'})"
                )
    if differing or not modules:
        first = ", ".join(differing[:3]) or "no module of the base model has the same name"
        raise ValueError(
            f"The models are of different architectures: {first}{', …' if differing[3:] else ''} "
            "(shapes in the first and the second). Pass the model that training began from and the "
            "one that it ended with, saved by the same version of transformers."
        )
    return {
        name: other[where]
        for where, name in own.items()
        if where in other
        and tuple(start[other[where]]) == tuple(tuned[name])
        and (where[0] or same_labels)
    }


def _located(names: Shapes, prefix: str) -> dict[tuple[bool, str], str]:
    """Names by whether they are of the base model, and where in it (or in the model) they stand."""
    start = f"{prefix}."
    has_prefix = bool(prefix) and any(name.startswith(start) for name in names)
    located = {}
    for name in names:
        is_base = not has_prefix or name.startswith(start)
        where = name.removeprefix(start) if has_prefix else name
        for old, new in (("gamma", "weight"), ("beta", "bias")):  # of the first checkpoints of BERT
            where = where.replace(f"LayerNorm.{old}", f"LayerNorm.{new}")
        located[is_base, where] = name
    return located


def _module(where: tuple[bool, str]) -> tuple[bool, str]:
    """The module of the base model, or of the model, that a weight belongs to."""
    return where[0], where[1].split(".")[0]
