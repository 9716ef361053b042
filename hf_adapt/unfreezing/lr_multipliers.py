"""Learning-rate multipliers of layer groups: decay by depth, by name, importance, re-warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.models.groups import LayerGroup
from hf_adapt.unfreezing.schedules import select


def depths(groups: Sequence[LayerGroup]) -> dict[str, int]:
    """The number of levels above each group: 0 for the head, 1 for the top layer.

    In a model with several towers, each is counted from its own top; the embeddings that they
    share are below all of them.
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


def group_multipliers(
    groups: Sequence[LayerGroup],
    layer_decay: float | None = None,
    lr_multipliers: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The learning-rate multiplier of each group; groups with multiplier 1 are left out.

    Args:
        groups: The model's groups, bottom first.
        layer_decay: Learning rate of each level relative to the level above it; 1 / 2.6 in ULMFiT.
        lr_multipliers: Multipliers by group name or regular expression, which replace that of
            `layer_decay`. If several match a group, the last counts.

    Raises:
        ValueError: If a value is out of range or a name matches no group.

    Example:
        >>> groups = [LayerGroup(f"layer.{i}", (), "layer", "", i) for i in range(3)]
        >>> group_multipliers(groups, layer_decay=0.5, lr_multipliers={"layer.1": 3.0})
        {'layer.0': 0.25, 'layer.1': 3.0}
    """
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(
            f"layer_decay={layer_decay}: expected a number greater than 0 and at most 1 (0.9 gives "
            "each layer nine tenths of the learning rate of the layer above it)."
        )
    found = {name: (layer_decay or 1.0) ** depth for name, depth in depths(groups).items()}
    for pattern, multiplier in (lr_multipliers or {}).items():
        if not (math.isfinite(multiplier) and multiplier >= 0):
            raise ValueError(
                f"lr_multipliers[{pattern!r}]={multiplier}: expected a number of at least 0, which "
                "the learning rate is multiplied by."
            )
        found.update(dict.fromkeys(select(pattern, groups), float(multiplier)))
    return {name: multiplier for name, multiplier in found.items() if multiplier != 1.0}


def group_importance(
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
                f"importance[{pattern!r}]={value}: expected 0 (the group may change: full learning "
                "rate) to 1 (frozen), or a function of progress. Divide your importances by the "
                "largest."
            )
        found.update(dict.fromkeys(select(pattern, groups), value))
    return found


def importance_multiplier(value: float | Schedule, progress: float) -> float:
    """1 - importance, limited to the range from 0 to 1."""
    return min(1.0, max(0.0, 1.0 - value_at(value, progress)))


def rewarm_multiplier(step: int, since: int, rewarm_steps: int) -> float:
    """A linear warm-up that starts when a group is unfrozen, at step `since`.

    Groups that train from the first step on warm up with the run's own schedule only.

    Example:
        >>> [rewarm_multiplier(step, since=10, rewarm_steps=4) for step in (10, 12, 13, 14)]
        [0.25, 0.75, 1.0, 1.0]
    """
    if since == 0 or rewarm_steps <= 0:
        return 1.0
    return min(1.0, (step - since + 1) / rewarm_steps)
