"""Metrics of a student beside its teacher: plain functions, and metrics of `evaluate`."""

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
    """The metrics, whose package is an extra, when they are asked for."""
    if name in ("Agreement", "CalibrationError", "RetainedShare", "TeacherDivergence"):
        from hf_adapt.evaluation import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
