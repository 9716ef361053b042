"""Learning on without forgetting: a new task is learnt and the old ones are kept."""

from hf_adapt.continual.averaging import AveragedWeights
from hf_adapt.continual.consolidation import Consolidation
from hf_adapt.continual.episodic_gradients import AGEM, agem_projection
from hf_adapt.continual.importance import fisher_diagonal, mas_importance
from hf_adapt.continual.importance_folder import load_importance, save_importance
from hf_adapt.continual.importance_sources import MAS, SI, Fisher
from hf_adapt.continual.interpolation import interpolate, interpolation_sweep
from hf_adapt.continual.memory import ReplayMemory
from hf_adapt.continual.metrics import continual_metrics
from hf_adapt.continual.plots import plot_sweep
from hf_adapt.continual.record import ContinualMetrics
from hf_adapt.continual.replay import DarkReplay, Replay
from hf_adapt.continual.retention import KeepPredictions
from hf_adapt.continual.row_choice import herding_order

__all__ = [
    "AGEM",
    "MAS",
    "SI",
    "AveragedWeights",
    "Consolidation",
    "ContinualMetrics",
    "DarkReplay",
    "Fisher",
    "KeepPredictions",
    "Replay",
    "ReplayMemory",
    "agem_projection",
    "continual_metrics",
    "fisher_diagonal",
    "herding_order",
    "interpolate",
    "interpolation_sweep",
    "load_importance",
    "mas_importance",
    "plot_sweep",
    "save_importance",
]
