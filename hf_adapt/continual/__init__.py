"""Learning on without forgetting: a new task is learnt and the old ones are kept."""

from hf_adapt.continual.averaging import AveragedWeights
from hf_adapt.continual.interpolation import interpolate, interpolation_sweep
from hf_adapt.continual.memory import ReplayMemory, herding_order
from hf_adapt.continual.metrics import continual_metrics
from hf_adapt.continual.plots import plot_sweep
from hf_adapt.continual.record import ContinualMetrics
from hf_adapt.continual.replay import DarkReplay, Replay
from hf_adapt.continual.retention import KeepPredictions

__all__ = [
    "AveragedWeights",
    "ContinualMetrics",
    "DarkReplay",
    "KeepPredictions",
    "Replay",
    "ReplayMemory",
    "continual_metrics",
    "herding_order",
    "interpolate",
    "interpolation_sweep",
    "plot_sweep",
]
