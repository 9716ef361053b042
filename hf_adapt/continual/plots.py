"""Pictures of what was learnt and what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def score_map(
    rows: Sequence[str], columns: Sequence[str], scores: Sequence[Sequence[float]], metric: str
) -> Figure:
    """A heat map of the scores on each task after each training.

    Args:
        rows: What was trained; the names of the rows.
        columns: The tasks.
        scores: A row of scores for each of `rows`, NaN where there is none.
        metric: What the scores are.
    """
    figure = new_figure(2.2 + 0.9 * len(columns), 1.4 + 0.5 * len(rows))
    axes = figure.subplots()
    values = np.asarray(scores, dtype=np.float64)
    known = values[np.isfinite(values)]
    is_share = bool(((known >= 0) & (known <= 1)).all())
    low, high = (0.0, 1.0) if is_share or not known.size else (known.min(), known.max())
    image = axes.imshow(values, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            is_dark = value > low + 0.6 * (high - low)
            colour = "white" if is_dark else "black"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("evaluated on")
    axes.set_ylabel("after training on")
    figure.colorbar(image, label=metric)
    return figure


def plot_sweep(sweep: Sequence[Mapping[str, float]], x: str, y: str) -> Figure:
    """Two scores of an [`interpolation_sweep`] against each other, with the alphas at the points.

    Args:
        sweep: What it returned.
        x: A score in it, such as that on the old task.
        y: Another, such as that on the new task.

    Raises:
        ValueError: If a score is missing.
    """
    if missing := {x, y} - set(sweep[0] if sweep else ()):
        raise ValueError(
            f"The sweep has no {', '.join(sorted(missing))}; it has "
            f"{', '.join(sweep[0]) if sweep else 'no points'}."
        )
    figure = new_figure(5.0, 4.0)
    axes = figure.subplots()
    axes.plot([row[x] for row in sweep], [row[y] for row in sweep], "o-", color="#2a78c2")
    for row in sweep:
        label, place = f"{row['alpha']:g}", (row[x], row[y])
        axes.annotate(label, place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(0.1)
    axes.set_title("at each point: the share of the tuned model", fontsize=9)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, that no window shows.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib: pip install 'hf-adapt[run]'") from error
    return Figure(figsize=(width, height), layout="constrained")
