"""Several tasks in one training: their rows, their heads, their weights, and what they do."""

from hf_adapt.multitask.affinity import gradient_cosines, relative_gain, task_affinity
from hf_adapt.multitask.loss_weights import (
    FAMO,
    DynamicWeightAverage,
    GradNorm,
    InverseLogClasses,
    LossWeights,
    RandomWeights,
    Uncertainty,
)
from hf_adapt.multitask.mixture import (
    EpochCallback,
    Mixture,
    StreamedMixture,
    annealed,
    mix,
    temperature,
)
from hf_adapt.multitask.multi_task import MultiTask
from hf_adapt.multitask.plots import affinity_plot, cosine_plot
from hf_adapt.multitask.sampling import annealed_temperature, mixing_probabilities, quotas
from hf_adapt.multitask.soft_sharing import SoftSharing
from hf_adapt.multitask.surgery import aligned_mtl, cagrad, imtl_g, mgda, nash_mtl, pcgrad
from hf_adapt.multitask.task_models import TaskSpec
from hf_adapt.multitask.weighting import (
    dwa_weights,
    famo_weights,
    gradnorm_loss,
    random_weights,
    uncertainty_loss,
)

__all__ = [
    "FAMO",
    "DynamicWeightAverage",
    "EpochCallback",
    "GradNorm",
    "InverseLogClasses",
    "LossWeights",
    "Mixture",
    "MultiTask",
    "RandomWeights",
    "SoftSharing",
    "StreamedMixture",
    "TaskSpec",
    "Uncertainty",
    "affinity_plot",
    "aligned_mtl",
    "annealed",
    "annealed_temperature",
    "cagrad",
    "cosine_plot",
    "dwa_weights",
    "famo_weights",
    "gradient_cosines",
    "gradnorm_loss",
    "imtl_g",
    "mgda",
    "mix",
    "mixing_probabilities",
    "nash_mtl",
    "pcgrad",
    "quotas",
    "random_weights",
    "relative_gain",
    "task_affinity",
    "temperature",
    "uncertainty_loss",
]
