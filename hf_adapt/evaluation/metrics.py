"""The functions of this package as metrics of `evaluate`, which work offline."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from numpy.typing import ArrayLike

try:
    import evaluate
except ImportError as error:
    raise ImportError(
        "The metrics of hf_adapt.evaluation need the package evaluate. Install it with "
        '`pip install "hf-adapt[evaluation]"`. The plain functions do not need it.'
    ) from error

from hf_adapt.evaluation.distillation import (
    Score,
    agreement,
    calibration_error,
    counted_items,
    retained_share,
    same_shape,
    teacher_divergence,
)


def _information(description: str, inputs: str, citation: str, *features: Any) -> Any:
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=list(features),
    )


def _pair(predictions: Any, references: Any) -> datasets.Features:
    return datasets.Features({"predictions": predictions, "references": references})


_CLASS = datasets.Value("int64")
_LOGITS = datasets.Sequence(datasets.Value("float32"))


class Agreement(evaluate.Metric):  # type: ignore[misc]
    """[`agreement`] as a metric of `evaluate`.

    The predictions are the student's, the references the teacher's; both are classes (integers) or
    logits (rows of floats). `labels` is an argument of `compute`.

    Example:
        >>> Agreement(keep_in_memory=True).compute(predictions=[0, 1], references=[0, 0])
        {'agreement': 0.5}
    """

    def _info(self) -> Any:
        return _information(
            "Share of items on which student and teacher predict the same class.",
            "predictions: the student's classes or logits; references: the teacher's.",
            "Stanton et al. 2021, arXiv:2106.05945",
            _pair(_CLASS, _CLASS),
            _pair(_LOGITS, _LOGITS),
        )

    def _compute(
        self, predictions: Any, references: Any, labels: ArrayLike | None = None
    ) -> dict[str, float]:
        return {"agreement": agreement(predictions, references, labels)}


class TeacherDivergence(evaluate.Metric):  # type: ignore[misc]
    """[`teacher_divergence`] as a metric of `evaluate`.

    The predictions are the student's logits, the references the teacher's. `temperature` and
    `labels` are arguments of `compute`.

    Example:
        >>> metric = TeacherDivergence(keep_in_memory=True)
        >>> metric.compute(predictions=[[0.0, 1.0]], references=[[0.0, 1.0]], temperature=2.0)
        {'teacher_divergence': 0.0}
    """

    def _info(self) -> Any:
        return _information(
            "Mean KL(teacher || student) in nats.",
            "predictions: the student's logits; references: the teacher's; temperature: a number.",
            "Hinton et al. 2015, arXiv:1503.02531",
            _pair(_LOGITS, _LOGITS),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        temperature: float = 1.0,
        labels: ArrayLike | None = None,
    ) -> dict[str, float]:
        value = teacher_divergence(predictions, references, temperature, labels)
        return {"teacher_divergence": value}


class CalibrationError(evaluate.Metric):  # type: ignore[misc]
    """[`calibration_error`] as a metric of `evaluate`.

    The predictions are logits, the references labels. `n_bins` and `from_logits` are arguments of
    `compute`.

    Example:
        >>> metric = CalibrationError(keep_in_memory=True)
        >>> metric.compute(predictions=[[0.75, 0.25]], references=[0], from_logits=False)
        {'calibration_error': 0.25}
    """

    def _info(self) -> Any:
        return _information(
            "Expected calibration error over bins of equal width.",
            "predictions: logits, or probabilities with from_logits=False; references: labels.",
            "Guo et al. 2017, arXiv:1706.04599",
            _pair(_LOGITS, _CLASS),
        )

    def _compute(
        self, predictions: Any, references: Any, n_bins: int = 15, from_logits: bool = True
    ) -> dict[str, float]:
        value = calibration_error(predictions, references, n_bins, from_logits)
        return {"calibration_error": value}


class RetainedShare(evaluate.Metric):  # type: ignore[misc]
    """[`retained_share`] as a metric of `evaluate`, from scores or from predictions.

    From scores, the predictions are the student's scores and the references the teacher's, one or
    one for each task; the share is that of their means. With `metric` and `teacher_predictions`,
    the predictions are the student's classes and the references the labels.

    Example:
        >>> RetainedShare(keep_in_memory=True).compute(predictions=[0.75], references=[0.8])
        {'retained_share': 0.9375}
    """

    def _info(self) -> Any:
        score = datasets.Value("float64")
        return _information(
            "The student's score as a share of its teacher's.",
            "predictions: the student's scores; references: the teacher's. Or, with metric= and "
            "teacher_predictions=, predictions: the student's classes; references: the labels.",
            "Sanh et al. 2019, arXiv:1910.01108",
            _pair(score, score),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        metric: Score | None = None,
        teacher_predictions: ArrayLike | None = None,
    ) -> dict[str, float]:
        if (metric is None) != (teacher_predictions is None):
            raise ValueError(
                "Expected `metric` and `teacher_predictions` together, got one of them. Pass "
                "both, or only the two scores."
            )
        if metric is None:
            value = retained_share(np.mean(predictions).item(), np.mean(references).item())
            return {"retained_share": value}
        student, labels = (np.asarray(x).astype(np.int64) for x in (predictions, references))
        teacher = np.asarray(teacher_predictions)
        same_shape(student, teacher, "predictions")
        kept = counted_items(labels.shape, labels)
        scores = (float(metric(x[kept], labels[kept])) for x in (student, teacher))
        return {"retained_share": retained_share(*scores)}
