"""What a model is worth: without target labels, against its teacher, and as probabilities."""

from typing import TYPE_CHECKING, Any

from hf_adapt.evaluation import validators
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
from hf_adapt.evaluation.importance_weights import (
    density_ratio,
    effective_sample_size,
    proxy_a_distance,
)
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
    "CalibrationError",
    "LabelFreeValidation",
    "RetainedShare",
    "TeacherDivergence",
    "agreement",
    "brier_score",
    "calibration_error",
    "calibration_error_from",
    "calibration_histogram",
    "collapse",
    "density_ratio",
    "effective_sample_size",
    "estimate_accuracy",
    "fitted_temperature",
    "proxy_a_distance",
    "reliability",
    "retained_share",
    "teacher_divergence",
    "validators",
]


def __getattr__(name: str) -> Any:
    """Import the metrics when they are first used, because their package is an extra."""
    if name in __all__:
        from hf_adapt.evaluation import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
