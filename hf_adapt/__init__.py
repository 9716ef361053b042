"""Domain-adaptation plugins for the Hugging Face `Trainer`."""

from hf_adapt.alignment import (
    DANN,
    MMD,
    DomainAdversarialCallback,
    InformationMaximization,
)
from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.callback import AdaptationCallback, adapt
from hf_adapt.engine.progress import dann_ramp, linear_ramp
from hf_adapt.engine.trainer import AdaptationMixin, AdaptationTrainer

__version__ = "0.1.0"

__all__ = [
    "DANN",
    "MMD",
    "Adaptation",
    "AdaptationCallback",
    "AdaptationMixin",
    "AdaptationTrainer",
    "DomainAdversarialCallback",
    "InformationMaximization",
    "Objective",
    "adapt",
    "dann_ramp",
    "linear_ramp",
]
