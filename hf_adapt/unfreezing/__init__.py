"""Gradual unfreezing and layer-wise learning rates."""

from hf_adapt.models.groups import LayerGroup, layer_groups
from hf_adapt.models.layers import Stack, find_stacks
from hf_adapt.unfreezing.adaptation import GradualUnfreezing
from hf_adapt.unfreezing.callback import GradualUnfreezingCallback
from hf_adapt.unfreezing.phases import Moment, Phase
from hf_adapt.unfreezing.plan import UnfreezingPlan
from hf_adapt.unfreezing.plan_builder import unfreezing_plan
from hf_adapt.unfreezing.plateau import Plateau
from hf_adapt.unfreezing.schedules import (
    LPFT,
    FreezeOnly,
    Gradual,
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
