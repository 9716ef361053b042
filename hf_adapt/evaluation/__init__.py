"""What a model is worth: without target labels, against its teacher, and as probabilities."""

from typing import TYPE_CHECKING, Any

from hf_adapt.evaluation import validators
from hf_adapt.evaluation.attributions import (
    AttributionChange,
    TokenAttributions,
    compare_attributions,
    token_attributions,
)
from hf_adapt.evaluation.calibration import brier_score, fitted_temperature, reliability
from hf_adapt.evaluation.collapsed import collapse
from hf_adapt.evaluation.distillation import (
    agreement,
    calibration_error,
    calibration_error_from,
    calibration_histogram,
    retained_share,
    teacher_divergence,
)
from hf_adapt.evaluation.estimates import AccuracyEstimate, estimate_accuracy
from hf_adapt.evaluation.groups import GroupAccuracy, WorstGroupAccuracy, group_accuracy
from hf_adapt.evaluation.importance_weights import (
    density_ratio,
    effective_sample_size,
    proxy_a_distance,
)
from hf_adapt.evaluation.influence import source_influence
from hf_adapt.evaluation.layers import LayerDistance, layer_distances
from hf_adapt.evaluation.neighborhoods import Neighborhoods, neighbor_agreement
from hf_adapt.evaluation.selection import Candidate, Choice, choose
from hf_adapt.evaluation.train_and_choose import Chosen, train_and_choose
from hf_adapt.evaluation.validation import LabelFreeValidation

if TYPE_CHECKING:
    from hf_adapt.evaluation.metrics import (
        Agreement,
        CalibrationError,
        RetainedShare,
        TeacherDivergence,
    )

__all__ = [
    "AccuracyEstimate",
    "Agreement",
    "AttributionChange",
    "CalibrationError",
    "Candidate",
    "Choice",
    "Chosen",
    "GroupAccuracy",
    "LabelFreeValidation",
    "LayerDistance",
    "Neighborhoods",
    "RetainedShare",
    "TeacherDivergence",
    "TokenAttributions",
    "WorstGroupAccuracy",
    "agreement",
    "brier_score",
    "calibration_error",
    "calibration_error_from",
    "calibration_histogram",
    "choose",
    "collapse",
    "compare_attributions",
    "density_ratio",
    "effective_sample_size",
    "estimate_accuracy",
    "fitted_temperature",
    "group_accuracy",
    "layer_distances",
    "neighbor_agreement",
    "proxy_a_distance",
    "reliability",
    "retained_share",
    "source_influence",
    "teacher_divergence",
    "token_attributions",
    "train_and_choose",
    "validators",
]


def __getattr__(name: str) -> Any:
    """Import the metrics when they are first used, because their package is an extra."""
    if name in __all__:
        from hf_adapt.evaluation import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
