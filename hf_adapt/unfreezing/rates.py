"""Learning-rate factors of layer groups: decay by depth, rates by name, importance, re-warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.models.groups import LayerGroup
from hf_adapt.unfreezing.schedules import select


def depths(groups: Sequence[LayerGroup]) -> dict[str, int]:
    """How many levels lie above each group: 0 for the head, 1 for the top layer.

    Each tower of a model with several is counted from its own top; what they share (embeddings) is
    below all of them.
    """
    head = int(any(group.kind == "head" for group in groups))
    levels: dict[str, list[int]] = {}
    for group in groups:
        if group.kind != "head":
            levels.setdefault(group.tower, []).append(group.level)
    found = {}
    for group in groups:
        above = {level for level in levels.get(group.tower, ()) if level > group.level}
        found[group.name] = 0 if group.kind == "head" else len(above) + head
    if len(levels) > 1 and "" in levels:
        shared = [g for g in groups if g.tower == "" and g.kind == "embeddings"]
        for group in shared:
            found[group.name] = 1 + max(found[g.name] for g in groups if g not in shared)
    return found


def group_rates(
    groups: Sequence[LayerGroup],
    layer_decay: float | None = None,
    rates: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The factor of each group; groups of factor 1 are left out.

    Args:
        groups: The model's groups, bottom first.
        layer_decay: Factor from one level to the one below; 1 / 2.6 in ULMFiT.
        rates: Factors by name or regular expression; they take the place of the decayed one. Where
            several match, the last counts.

    Raises:
        ValueError: If a value is out of range or a name matches no group.

    Example:
        >>> groups = [LayerGroup(f"layer.{i}", (), "layer", "", i) for i in range(3)]
        >>> group_rates(groups, layer_decay=0.5, rates={"layer.1": 3.0})
        {'layer.0': 0.25, 'layer.1': 3.0}
    """
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(
            f"layer_decay={layer_decay}: expected a factor above 0 and up to 1 (0.9 gives each "
            "layer nine tenths of the rate of the one above it)."
        )
    found = {name: (layer_decay or 1.0) ** depth for name, depth in depths(groups).items()}
    for pattern, rate in (rates or {}).items():
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(
                f"rates[{pattern!r}]={rate}: expected a factor on the learning rate, 0 or more."
            )
        found.update(dict.fromkeys(select(pattern, groups), float(rate)))
    return {name: rate for name, rate in found.items() if rate != 1.0}


def importance_of(
    groups: Sequence[LayerGroup], importance: Mapping[str, float | Schedule] | None
) -> dict[str, float | Schedule]:
    """The importance of each group that has one.

    Raises:
        ValueError: If a constant is outside 0 to 1 or a name matches no group.
    """
    found: dict[str, float | Schedule] = {}
    for pattern, value in (importance or {}).items():
        if not callable(value) and not 0.0 <= value <= 1.0:
            raise ValueError(
                f"importance[{pattern!r}]={value}: expected 0 (nothing is lost by changing the "
                "group: full rate) to 1 (frozen), or a function of progress. Divide your "
                "importances by the largest."
            )
        found.update(dict.fromkeys(select(pattern, groups), value))
    return found


def importance_factor(value: float | Schedule, progress: float) -> float:
    """The rate that importance leaves: 1 - importance, never below 0."""
    return min(1.0, max(0.0, 1.0 - value_at(value, progress)))


def rewarm_factor(step: int, since: int, rewarm_steps: int) -> float:
    """The rate of a group that trains since `since`: a line that reaches 1 after `rewarm_steps`.

    Groups that train from the first step warm up with the run's own schedule.

    Example:
        >>> [rewarm_factor(step, since=10, rewarm_steps=4) for step in (10, 12, 13, 14)]
        [0.25, 0.75, 1.0, 1.0]
    """
    if since == 0 or rewarm_steps <= 0:
        return 1.0
    return min(1.0, (step - since + 1) / rewarm_steps)
