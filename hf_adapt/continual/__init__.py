"""Learning on without forgetting: a new task is learnt and the old ones are kept."""

from hf_adapt.continual.consolidation import Consolidation
from hf_adapt.continual.episodic_gradients import AGEM, agem_projection
from hf_adapt.continual.importance import fisher_diagonal, mas_importance
from hf_adapt.continual.importance_folder import load_importance, save_importance
from hf_adapt.continual.importance_sources import MAS, SI, Fisher

__all__ = [
    "AGEM",
    "MAS",
    "SI",
    "Consolidation",
    "Fisher",
    "agem_projection",
    "fisher_diagonal",
    "load_importance",
    "mas_importance",
    "save_importance",
]
