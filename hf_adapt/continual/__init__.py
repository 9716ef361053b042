"""Learning on without forgetting: a new task is learnt and the old ones are kept."""

from hf_adapt.continual.memory import ReplayMemory, herding_order
from hf_adapt.continual.replay import DarkReplay, Replay

__all__ = ["DarkReplay", "Replay", "ReplayMemory", "herding_order"]
