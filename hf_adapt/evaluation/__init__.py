"""Metrics that compare a student with its teacher: functions, and metrics of `evaluate`."""

from typing import TYPE_CHECKING, Any

from hf_adapt.evaluation.distillation import (
    agreement,
    calibration_error,
    calibration_error_from,
    calibration_histogram,
    retained_share,
    teacher_divergence,
)

if TYPE_CHECKING:
    from hf_adapt.evaluation.metrics import (
        Agreement,
        CalibrationError,
        RetainedShare,
        TeacherDivergence,
    )

__all__ = [
    "Agreement",
    "CalibrationError",
    "RetainedShare",
    "TeacherDivergence",
    "agreement",
    "calibration_error",
    "calibration_error_from",
    "calibration_histogram",
    "retained_share",
    "teacher_divergence",
]


def __getattr__(name: str) -> Any:
    """Import the metrics when they are first used, because their package is an extra."""
    if name in __all__:
        from hf_adapt.evaluation import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
