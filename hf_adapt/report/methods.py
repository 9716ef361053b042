"""What the runs of a pair say together, method by method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_adapt.report.numbers import Numbers

Runs = Sequence[Numbers]
"""The numbers of the runs of one pair that ended well, by method and seed."""


def methods_of(runs: Runs) -> dict[str, list[Numbers]]:
    """The runs of each method."""
    found: dict[str, list[Numbers]] = {}
    for run in runs:
        found.setdefault(run["method"], []).append(run)
    return found


def trained_on_target(runs: Runs) -> list[str]:
    """The methods that trained on target labels."""
    return [name for name, own in methods_of(runs).items() if own[0]["role"] == "bound"]


def mean_estimate(runs: Runs, method: str) -> Mapping[str, Any] | None:
    """An estimate and the ends of its interval, averaged over the seeds; None if one lacks it.

    It is `trusted` if it is for every seed.
    """
    found = [each for run in runs if (each := (run.get("estimates") or {}).get(method))]
    if not found or len(found) < len(runs):
        return None
    means = {key: float(np.mean([e[key] for e in found])) for key in ("value", "low", "high")}
    return {**means, "trusted": not any(each["warnings"] for each in found)}


def number(value: float | None, digits: int = 3) -> str:
    """A value as the cell of a table."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}" if 0 < abs(value) < 0.01 else f"{value:.{digits}f}"
