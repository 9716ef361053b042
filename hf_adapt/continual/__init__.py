"""Learning on without forgetting: a new task is learnt and the old ones are kept."""

from hf_adapt.continual.memory import ReplayMemory, herding_order
from hf_adapt.continual.replay import DarkReplay, Replay
from hf_adapt.continual.retention import KeepPredictions

__all__ = ["DarkReplay", "KeepPredictions", "Replay", "ReplayMemory", "herding_order"]
