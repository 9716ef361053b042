"""A student learns from a teacher: predictions, features, and how students are made."""

from hf_adapt.distillation.arguments import DistillationArguments
from hf_adapt.distillation.attention import AttentionMaps, SelfAttentionRelations
from hf_adapt.distillation.cache import CachedTeacher
from hf_adapt.distillation.contrastive import Contrastive
from hf_adapt.distillation.divergences import (
    JensenShannon,
    forward_kl,
    logit_mse,
    reverse_kl,
)
from hf_adapt.distillation.features import FeatureLoss, layer_pairs
from hf_adapt.distillation.hidden_states import HiddenStates
from hf_adapt.distillation.language_models.chunked import chunked_distillation_loss
from hf_adapt.distillation.objective import Distillation
from hf_adapt.distillation.self_teacher import SelfTeacher
from hf_adapt.distillation.student import student_from_teacher
from hf_adapt.distillation.teachers import CallableTeacher, ModelTeacher, Teacher
from hf_adapt.distillation.tokenizers import universal_logit_distance
from hf_adapt.distillation.trainer import DistillationTrainer

__all__ = [
    "AttentionMaps",
    "CachedTeacher",
    "CallableTeacher",
    "Contrastive",
    "Distillation",
    "DistillationArguments",
    "DistillationTrainer",
    "FeatureLoss",
    "HiddenStates",
    "JensenShannon",
    "ModelTeacher",
    "SelfAttentionRelations",
    "SelfTeacher",
    "Teacher",
    "chunked_distillation_loss",
    "forward_kl",
    "layer_pairs",
    "logit_mse",
    "reverse_kl",
    "student_from_teacher",
    "universal_logit_distance",
]
