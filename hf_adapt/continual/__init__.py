"""Learning on without forgetting: a new task is learnt and the old ones are kept."""

from hf_adapt.continual.averaging import AveragedWeights
from hf_adapt.continual.interpolation import interpolate, interpolation_sweep
from hf_adapt.continual.metrics import continual_metrics
from hf_adapt.continual.plots import plot_sweep
from hf_adapt.continual.record import ContinualMetrics

__all__ = [
    "AveragedWeights",
    "ContinualMetrics",
    "continual_metrics",
    "interpolate",
    "interpolation_sweep",
    "plot_sweep",
]
