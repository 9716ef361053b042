"""Gradual unfreezing and layer-wise learning rates."""

from hf_adapt.models.groups import LayerGroup, layer_groups
from hf_adapt.models.layers import Stack, find_stacks
from hf_adapt.unfreezing.gradual import GradualUnfreezing, GradualUnfreezingCallback
from hf_adapt.unfreezing.phases import Moment, Phase
from hf_adapt.unfreezing.plan import UnfreezingPlan
from hf_adapt.unfreezing.planning import unfreezing_plan
from hf_adapt.unfreezing.schedules import (
    LPFT,
    FreezeOnly,
    Gradual,
    Plateau,
    RandomLayers,
    Surgical,
    UnfreezingSchedule,
)

__all__ = [
    "LPFT",
    "FreezeOnly",
    "Gradual",
    "GradualUnfreezing",
    "GradualUnfreezingCallback",
    "LayerGroup",
    "Moment",
    "Phase",
    "Plateau",
    "RandomLayers",
    "Stack",
    "Surgical",
    "UnfreezingPlan",
    "UnfreezingSchedule",
    "find_stacks",
    "layer_groups",
    "unfreezing_plan",
]
