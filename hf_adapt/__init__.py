"""Domain-adaptation plugins for the Hugging Face `Trainer`."""

from hf_adapt.alignment import (
    DANN,
    MMD,
    DomainAdversarialCallback,
    InformationMaximization,
)
from hf_adapt.distillation import (
    AttentionMaps,
    CachedTeacher,
    Contrastive,
    Distillation,
    DistillationArguments,
    DistillationTrainer,
    HiddenStates,
    JensenShannon,
    ModelTeacher,
    SelfAttentionRelations,
    SelfTeacher,
    student_from_teacher,
)
from hf_adapt.engine.adaptation import Adaptation, Objective
from hf_adapt.engine.callback import AdaptationCallback, adapt
from hf_adapt.engine.progress import dann_ramp, linear_ramp, slanted_triangular
from hf_adapt.engine.trainer import AdaptationMixin, AdaptationTrainer
from hf_adapt.unfreezing import (
    LPFT,
    FreezeOnly,
    GradualUnfreezing,
    GradualUnfreezingCallback,
    Phase,
    Plateau,
    RandomLayers,
    Surgical,
    UnfreezingPlan,
    layer_groups,
    unfreezing_plan,
)

__version__ = "0.1.0"

__all__ = [
    "DANN",
    "LPFT",
    "MMD",
    "Adaptation",
    "AdaptationCallback",
    "AdaptationMixin",
    "AdaptationTrainer",
    "AttentionMaps",
    "CachedTeacher",
    "Contrastive",
    "Distillation",
    "DistillationArguments",
    "DistillationTrainer",
    "DomainAdversarialCallback",
    "FreezeOnly",
    "GradualUnfreezing",
    "GradualUnfreezingCallback",
    "HiddenStates",
    "InformationMaximization",
    "JensenShannon",
    "ModelTeacher",
    "Objective",
    "Phase",
    "Plateau",
    "RandomLayers",
    "SelfAttentionRelations",
    "SelfTeacher",
    "Surgical",
    "UnfreezingPlan",
    "adapt",
    "dann_ramp",
    "layer_groups",
    "linear_ramp",
    "slanted_triangular",
    "student_from_teacher",
    "unfreezing_plan",
]
