"""Objectives that align the features or predictions of a target domain with the source's."""

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

__all__ = [
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
    "classifier_discrepancy",
    "conditioned_features",
    "dann_loss",
    "density_ratio_weights",
    "disagreement_loss",
    "entropy_weights",
    "mdd_loss",
    "mmd_loss",
    "prediction_diversity",
    "prediction_entropy",
    "reverse_gradient",
]
