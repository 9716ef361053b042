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

__all__ = [
    "DANN",
    "MMD",
    "DomainAdversarialCallback",
    "DomainDiscriminator",
    "InformationMaximization",
    "dann_loss",
    "mmd_loss",
    "prediction_diversity",
    "prediction_entropy",
    "reverse_gradient",
]
