"""Objectives that align the features or predictions of a target domain with the source's."""

from hf_adapt.alignment.adda import ADDA
from hf_adapt.alignment.adversarial import reverse_gradient
from hf_adapt.alignment.cdan import CDAN, conditioned_features, entropy_weights
from hf_adapt.alignment.central_moments import CMD, cmd_loss
from hf_adapt.alignment.class_confusion import MCC, mcc_loss
from hf_adapt.alignment.contrastive import SupervisedContrastive, supervised_contrastive_loss
from hf_adapt.alignment.coral import CORAL, coral_loss
from hf_adapt.alignment.dann import DANN, DomainAdversarialCallback, dann_loss
from hf_adapt.alignment.discriminator import DomainDiscriminator
from hf_adapt.alignment.entropy import (
    EntropyMinimization,
    InformationMaximization,
    prediction_diversity,
    prediction_entropy,
)
from hf_adapt.alignment.feature_norm import AFN, hard_norm_loss, stepwise_norm_loss
from hf_adapt.alignment.importance_weighting import ImportanceWeighting, density_ratio_weights
from hf_adapt.alignment.joint_mmd import JMMD, jmmd_loss
from hf_adapt.alignment.language_modeling import TargetLanguageModeling, mask_tokens
from hf_adapt.alignment.mcd import MCD, classifier_discrepancy
from hf_adapt.alignment.mdd import MDD, disagreement_loss, mdd_loss
from hf_adapt.alignment.mmd import MMD, mmd_loss
from hf_adapt.alignment.neighbours import ATDOC, AaD
from hf_adapt.alignment.nuclear_norm import BNM, bnm_loss
from hf_adapt.alignment.optimal_transport import DeepJDOT, jdot_loss, sinkhorn_plan
from hf_adapt.alignment.pada import PADA
from hf_adapt.alignment.perturbation import FGM, VAT
from hf_adapt.alignment.prediction_time import T3A, Tent
from hf_adapt.alignment.pretraining import adapt_pretrain
from hf_adapt.alignment.prior_correction import PriorCorrection
from hf_adapt.alignment.priors import corrected_logits, estimate_priors, priors_from_sample
from hf_adapt.alignment.rdrop import RDrop, rdrop_loss
from hf_adapt.alignment.recommended import candidates, recommended
from hf_adapt.alignment.self_training import (
    SelfTraining,
    aligned_predictions,
    balanced_pseudo_labels,
)
from hf_adapt.alignment.sharpness import SAM
from hf_adapt.alignment.shot import SHOT, centroid_labels, shot

__all__ = [
    "ADDA",
    "AFN",
    "ATDOC",
    "BNM",
    "CDAN",
    "CMD",
    "CORAL",
    "DANN",
    "FGM",
    "JMMD",
    "MCC",
    "MCD",
    "MDD",
    "MMD",
    "PADA",
    "SAM",
    "SHOT",
    "T3A",
    "VAT",
    "AaD",
    "DeepJDOT",
    "DomainAdversarialCallback",
    "DomainDiscriminator",
    "EntropyMinimization",
    "ImportanceWeighting",
    "InformationMaximization",
    "PriorCorrection",
    "RDrop",
    "SelfTraining",
    "SupervisedContrastive",
    "TargetLanguageModeling",
    "Tent",
    "adapt_pretrain",
    "aligned_predictions",
    "balanced_pseudo_labels",
    "bnm_loss",
    "candidates",
    "centroid_labels",
    "classifier_discrepancy",
    "cmd_loss",
    "conditioned_features",
    "coral_loss",
    "corrected_logits",
    "dann_loss",
    "density_ratio_weights",
    "disagreement_loss",
    "entropy_weights",
    "estimate_priors",
    "hard_norm_loss",
    "jdot_loss",
    "jmmd_loss",
    "mask_tokens",
    "mcc_loss",
    "mdd_loss",
    "mmd_loss",
    "prediction_diversity",
    "prediction_entropy",
    "priors_from_sample",
    "rdrop_loss",
    "recommended",
    "reverse_gradient",
    "shot",
    "sinkhorn_plan",
    "stepwise_norm_loss",
    "supervised_contrastive_loss",
]
