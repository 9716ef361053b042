"""The numbers of a report; those that need target labels stand under `oracle`, and nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from hf_adapt.engine.item_outputs import ItemOutputs
from hf_adapt.evaluation import (
    brier_score,
    calibration_error,
    collapse,
    proxy_a_distance,
    reliability,
)
from hf_adapt.evaluation.scores import TargetScores, strided
from hf_adapt.experiments.outputs import RunOutputs
from hf_adapt.report.runs import Run

Numbers = dict[str, Any]

MOST_ITEMS = 5_000
"""Items of each side that the estimates and distances are computed on at most."""
BINS = 10
"""Of the calibration error and of its diagram."""
NO_CURVES = re.compile(r"^(step|epoch|total_flos|train_.*|.*_runtime|.*_per_second)$")
"""What a Trainer logs that is no curve."""


def class_names(result: Mapping[str, Any], count: int | None = None) -> list[str]:
    """The classes of a run in their order; numbers where the result does not have them all."""
    names = [str(name) for name in result.get("target_predicted_shares") or ()]
    return names if count is None or len(names) == count else [str(n) for n in range(count)]


def numbers_of(run: Run, outputs: RunOutputs | None) -> Numbers:
    """All numbers of a run, as plain data.

    Args:
        run: The run.
        outputs: What its model gave; None if that is not there.
    """
    result = run.result
    found: Numbers = {
        "method": run.method,
        "seed": run.seed,
        "role": run.role,
        "folder": run.folder.name,
        "warnings": result.get("warnings") or 0,
        "first_warning": result.get("first_warning"),
        "seconds": result.get("seconds"),
        "classes": class_names(result),
        "source_accuracy": result.get("source_accuracy"),
        "predicted_shares": result.get("target_predicted_shares") or {},
        "curves": curves(run.logs),
        "layers": (run.diagnostics or {}).get("layers") or [],
        "notes": list(run.notes),
    }
    if "error" in result:
        found["error"] = result["error"]
    oracle: Numbers = {
        name: result.get(key)
        for name, key in (
            ("accuracy", "target_accuracy"),
            ("f1", "target_f1"),
            ("true_shares", "target_true_shares"),
        )
    }
    oracle["groups"] = (run.diagnostics or {}).get("groups") or {}
    if outputs is not None:
        found |= _without_labels(outputs, found)
        if outputs.target_test is not None and len(test := outputs.target_test.labelled):
            oracle["notes"] = []
            oracle["calibration"] = _attempt(oracle["notes"], _calibration, test)
            oracle["confusion"] = _attempt(oracle["notes"], _confusion, test)
    return {**found, "oracle": oracle}


def _without_labels(outputs: RunOutputs, so_far: Numbers) -> Numbers:
    """What held-out source items and unlabelled target items tell."""
    notes, found = so_far["notes"], Numbers()
    source, target = outputs.source_dev or outputs.source_test, outputs.target_unlabelled
    if source is not None:
        source = strided(source.labelled, MOST_ITEMS)
        if len(source):
            found["source_calibration"] = _attempt(notes, _calibration, source)
    if target is None:
        notes.append("There are no outputs for unlabelled target rows, so nothing is estimated.")
        return found
    target = strided(target, MOST_ITEMS)
    names = so_far["classes"] = _names(so_far["classes"], target)
    if not target.logits.isfinite().all():
        notes.append("The predictions are not finite: the model has diverged.")
        return Numbers(found, collapsed="its predictions are not finite")
    reason = _attempt(notes, collapse, target.logits, target.features)
    found["collapsed"] = re.sub(
        r"(?<=class )\d+$", lambda number: names[int(number[0])], reason or ""
    )
    if source is not None and len(source):
        found["a_distance"] = _attempt(notes, proxy_a_distance, source.features, target.features)
        found["estimates"] = {
            method: _attempt(notes, _estimate, source, target, method) for method in ("atc", "iwv")
        }
    return found


def _names(names: Sequence[str], items: ItemOutputs) -> list[str]:
    count = items.logits.shape[1]
    return list(names) if len(names) == count else [str(number) for number in range(count)]


def _attempt(notes: list[str], compute: Callable[..., Any], *arguments: Any) -> Any:
    """A value; None if it refuses, with its reason among the notes."""
    try:
        return compute(*arguments)
    except ValueError as error:
        if (note := f"{compute.__name__.strip('_').replace('_', ' ')}: {error}") not in notes:
            notes.append(note)
        return None


def _calibration(items: ItemOutputs) -> Numbers:
    return {
        "ece": calibration_error(items.logits, items.labels, n_bins=BINS),
        "brier": brier_score(items.logits, items.labels),
        "bins": reliability(items.logits, items.labels, BINS),
        "count": len(items),
    }


def _confusion(items: ItemOutputs) -> list[list[int]]:
    """Rows are the true classes, columns the predicted ones."""
    classes = range(items.logits.shape[1])
    counts = confusion_matrix(items.labels, items.logits.argmax(1), labels=classes)
    return [list(map(int, row)) for row in counts]


def _estimate(source: ItemOutputs, target: ItemOutputs, method: Any) -> Numbers:
    estimate = TargetScores(source, target).estimate(method)
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "warnings": list(estimate.warnings),
        "effective_sample_size": estimate.effective_sample_size,
    }


def curves(logs: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Each logged number over the steps, as [step, value]: the losses first."""
    found: dict[str, list[list[float]]] = {}
    for entry in logs:
        for key, value in entry.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and not NO_CURVES.match(key):
                found.setdefault(key, []).append([entry.get("step", 0), value])

    return {key: found[key] for key in sorted(found, key=curve_order)}


def curve_order(key: str) -> tuple[int, str]:
    """To sort curves by: the losses, what methods log, evaluations, and the rest."""
    if key in ("learning_rate", "grad_norm"):
        return 4, key
    places = [key == "loss", key.startswith("loss/"), not key.startswith("eval_"), True]
    return places.index(True), key


def plain(value: Any) -> Any:
    """The same as strict JSON: None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
