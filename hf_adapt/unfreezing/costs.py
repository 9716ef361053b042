"""The cost of a phase: predicted time and memory of a step, relative to full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hf_adapt.models.groups import LayerGroup
from hf_adapt.models.layers import prefixes
from hf_adapt.models.structure import unwrapped_base

WEIGHT, GRADIENT, MOMENTS = 1.0, 1.0, 2.0
"""Numbers stored per parameter: its value, its gradient, AdamW's two moments."""


@dataclass(frozen=True)
class GroupCost:
    """The size of a layer group.

    Attributes:
        level: The level of the group; 0 is the bottom.
        parameters: Number of trainable parameters.
        frozen: Number of parameters beside them that never train (under adapters).
        work: Multiplications per token of the forward: the number of weights in matrix products,
            including those that never train (under adapters), but not of embedding look-ups.
        trained_work: The share of `work` whose weights can train.
    """

    level: int
    parameters: int
    work: float
    trained_work: float
    frozen: int = 0


@dataclass(frozen=True)
class PhaseCost:
    """The cost of a step, relative to a step in which every group trains.

    Attributes:
        parameters: Number of parameters that train.
        time: Time of forward and backward; the backward ends at the lowest group that trains.
        memory: Memory of weights, gradients and AdamW's moments.
        activations: Activations that the forward stores for the backward.
    """

    parameters: int
    time: float
    memory: float
    activations: float


def group_costs(model: nn.Module, groups: Sequence[LayerGroup]) -> dict[str, GroupCost]:
    """Measure the groups of a model, from the shapes of its weights alone.

    Frozen weights count towards the group in whose module they are, or else the bottom group.
    """
    parameters = dict(model.named_parameters())
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    group_of = {name: group.name for group in groups for name in group.parameters}
    work = {group.name: 0.0 for group in groups}
    trained = dict(work)
    sizes = {group.name: 0 for group in groups}
    frozen = dict(sizes)
    nearest: dict[str, str] = {}  # module path -> group of a trainable parameter in it
    for name, group in group_of.items():
        for path in prefixes(name)[1:-1]:
            nearest.setdefault(path, group)
    for name, parameter in parameters.items():
        owner = group_of.get(name)
        if owner is None:
            paths = [path for path in prefixes(name)[1:-1] if path in nearest]
            owner = nearest[paths[-1]] if paths else groups[0].name
        products = parameter.numel() if parameter.ndim >= 2 and id(parameter) not in lookups else 0
        work[owner] += products
        if name in group_of:
            trained[owner] += products
            sizes[owner] += parameter.numel()
        else:
            frozen[owner] += parameter.numel()
    base = unwrapped_base(model)
    output = getattr(base, "get_output_embeddings", lambda: None)()
    weight = getattr(output, "weight", None)
    if weight is not None and id(weight) in lookups:
        work[groups[-1].name] += weight.numel()  # a tied output layer is a matrix product
    return {
        group.name: GroupCost(
            group.level,
            sizes[group.name],
            work[group.name],
            trained[group.name],
            frozen[group.name],
        )
        for group in groups
    }


def phase_cost(costs: Mapping[str, GroupCost], trained: frozenset[str]) -> PhaseCost:
    """The cost of a step in which `trained` train.

    Time is counted in passes over the weights: one forward; in the backward one for the gradient
    of each layer's input, down to the lowest group that trains, and one for each weight's own.

    Example:
        >>> layers = {f"layer.{i}": GroupCost(i, 100, 100.0, 100.0) for i in range(12)}
        >>> cost = phase_cost(layers, frozenset(["layer.9", "layer.10", "layer.11"]))
        >>> round(cost.time, 2), cost.parameters  # F + B (1 - 9/12), with B = 2 F
        (0.5, 300)
    """

    def units(names: frozenset[str]) -> tuple[float, float, float]:
        lowest = min((costs[name].level for name in names), default=0)
        forward = sum(c.work for c in costs.values())
        above = sum(c.work for c in costs.values() if c.level >= lowest)
        own = sum(costs[name].trained_work for name in names)
        size = sum(costs[name].parameters for name in names)
        everything = sum(c.parameters + c.frozen for c in costs.values())
        states = WEIGHT * everything + (GRADIENT + MOMENTS) * size
        return forward + above + own, states, above

    whole = units(frozenset(costs))
    part = units(trained)
    time, memory, kept = (p / w if w else 1.0 for p, w in zip(part, whole, strict=True))
    return PhaseCost(sum(costs[name].parameters for name in trained), time, memory, kept)
