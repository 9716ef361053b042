"""Objectives that align the features or predictions of a target domain with the source's."""

from hf_adapt.alignment.adversarial import (
    DANN,
    DomainAdversarialCallback,
    DomainDiscriminator,
    dann_loss,
    reverse_gradient,
)
from hf_adapt.alignment.discrepancy import MMD, mmd_loss
from hf_adapt.alignment.entropy import (
    InformationMaximization,
    prediction_diversity,
    prediction_entropy,
)
from hf_adapt.alignment.language_modeling import (
    TargetLanguageModeling,
    mask_tokens,
)
from hf_adapt.alignment.pretraining import adapt_pretrain

__all__ = [
    "DANN",
    "MMD",
    "DomainAdversarialCallback",
    "DomainDiscriminator",
    "InformationMaximization",
    "TargetLanguageModeling",
    "adapt_pretrain",
    "dann_loss",
    "mask_tokens",
    "mmd_loss",
    "prediction_diversity",
    "prediction_entropy",
    "reverse_gradient",
]
