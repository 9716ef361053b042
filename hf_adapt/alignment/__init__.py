"""Objectives that align the features or predictions of a target domain with the source's."""

from hf_adapt.alignment.adda import ADDA
from hf_adapt.alignment.adversarial import reverse_gradient
from hf_adapt.alignment.cdan import CDAN, conditioned_features, entropy_weights
from hf_adapt.alignment.dann import DANN, DomainAdversarialCallback, dann_loss
from hf_adapt.alignment.discriminator import DomainDiscriminator
from hf_adapt.alignment.entropy import (
    InformationMaximization,
    prediction_diversity,
    prediction_entropy,
)
from hf_adapt.alignment.importance_weighting import ImportanceWeighting, density_ratio_weights
from hf_adapt.alignment.mcd import MCD, classifier_discrepancy
from hf_adapt.alignment.mdd import MDD, disagreement_loss, mdd_loss
from hf_adapt.alignment.mmd import MMD, mmd_loss
from hf_adapt.alignment.pada import PADA
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
    "ADDA",
    "CDAN",
    "DANN",
    "MCD",
    "MDD",
    "MMD",
    "PADA",
    "DomainAdversarialCallback",
    "DomainDiscriminator",
    "ImportanceWeighting",
    "InformationMaximization",
    "SelfTraining",
    "aligned_predictions",
    "balanced_pseudo_labels",
    "classifier_discrepancy",
    "conditioned_features",
    "corrected_logits",
    "dann_loss",
    "density_ratio_weights",
    "disagreement_loss",
    "entropy_weights",
    "estimate_priors",
    "mdd_loss",
    "mmd_loss",
    "prediction_diversity",
    "prediction_entropy",
    "priors_from_sample",
    "reverse_gradient",
]
