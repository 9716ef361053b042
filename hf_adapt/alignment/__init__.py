"""Objectives that align the features or predictions of a target domain with the source's."""

from hf_adapt.alignment.adversarial import (
    DANN,
    DomainAdversarialCallback,
    DomainDiscriminator,
    dann_loss,
    reverse_gradient,
)
from hf_adapt.alignment.entropy import (
    InformationMaximization,
    prediction_diversity,
    prediction_entropy,
)
from hf_adapt.alignment.mmd import MMD, mmd_loss
from hf_adapt.alignment.priors import (
    corrected_logits,
    estimate_priors,
    priors_from_sample,
)
from hf_adapt.alignment.self_training import (
    SelfTraining,
    aligned_predictions,
    balanced_pseudo_labels,
)

__all__ = [
    "DANN",
    "MMD",
    "DomainAdversarialCallback",
    "DomainDiscriminator",
    "InformationMaximization",
    "SelfTraining",
    "aligned_predictions",
    "balanced_pseudo_labels",
    "corrected_logits",
    "dann_loss",
    "estimate_priors",
    "mmd_loss",
    "prediction_diversity",
    "prediction_entropy",
    "priors_from_sample",
    "reverse_gradient",
]
