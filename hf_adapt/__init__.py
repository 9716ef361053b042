"""Domain-adaptation plugins for the Hugging Face `Trainer`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from hf_adapt.knowledge import (
        EntityLinker,
        EntityVectors,
        KnowledgeCallback,
        KnowledgeGraph,
        KnowledgeInjection,
        KnowledgeInjector,
        KnowledgeTrainer,
        explain,
        knowledge_inputs,
        load_knowledge_model,
    )
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
    "EntityLinker",
    "EntityVectors",
    "FreezeOnly",
    "GradualUnfreezing",
    "GradualUnfreezingCallback",
    "HiddenStates",
    "InformationMaximization",
    "JensenShannon",
    "KnowledgeCallback",
    "KnowledgeGraph",
    "KnowledgeInjection",
    "KnowledgeInjector",
    "KnowledgeTrainer",
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
    "explain",
    "knowledge_inputs",
    "layer_groups",
    "linear_ramp",
    "load_knowledge_model",
    "slanted_triangular",
    "student_from_teacher",
    "unfreezing_plan",
]

_FAMILIES = ("alignment", "distillation", "engine", "evaluation", "knowledge", "unfreezing")

_NAMES = {
    "alignment": "DANN MMD DomainAdversarialCallback InformationMaximization",
    "distillation": (
        "AttentionMaps CachedTeacher Contrastive Distillation DistillationArguments "
        "DistillationTrainer HiddenStates JensenShannon ModelTeacher SelfAttentionRelations "
        "SelfTeacher student_from_teacher"
    ),
    "engine.adaptation": "Adaptation Objective",
    "engine.callback": "AdaptationCallback adapt",
    "engine.progress": "dann_ramp linear_ramp slanted_triangular",
    "engine.trainer": "AdaptationMixin AdaptationTrainer",
    "knowledge": (
        "EntityLinker EntityVectors KnowledgeCallback KnowledgeGraph KnowledgeInjection "
        "KnowledgeInjector KnowledgeTrainer explain knowledge_inputs load_knowledge_model"
    ),
    "unfreezing": (
        "LPFT FreezeOnly GradualUnfreezing GradualUnfreezingCallback Phase Plateau "
        "RandomLayers Surgical UnfreezingPlan layer_groups unfreezing_plan"
    ),
}
"""Where the names are: they are imported when they are asked for, because torch and transformers
take seconds, which `hf-adapt --help` needs none of."""

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _FAMILIES:
            return importlib.import_module(f"hf_adapt.{name}")
        for module, names in _NAMES.items():
            if name in names.split():
                return getattr(importlib.import_module(f"hf_adapt.{module}"), name)
        raise AttributeError(f"module 'hf_adapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FAMILIES})
