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
    values = np.asarray(scores, dtype=np.float64)
    known = values[np.isfinite(values)]
    is_share = bool(((known >= 0) & (known <= 1)).all())
    limits = (0.0, 1.0) if is_share or not known.size else (known.min(), known.max())
    figure = heat_map(values, rows, columns, colours="Blues", limits=limits, label=metric)
    axes = figure.axes[0]
    axes.set_xlabel("evaluated on")
    axes.set_ylabel("after training on")
    return figure


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colours: str,
    limits: tuple[float, float],
    label: str,
    digits: str = ".3g",
) -> Figure:
    """A table as colours with its numbers in them; a cell without a number stays empty.

    Args:
        values: (rows, columns), NaN where there is none.
        rows: The names of the rows.
        columns: The names of the columns.
        colours: The name of matplotlib's colour map.
        limits: The values at its ends.
        label: What the values are.
        digits: How a number is written.
    """
    width = max(0.9, 0.09 * max(map(len, columns), default=0))  # of a column, in inches
    figure = new_figure(2.2 + width * len(columns), 1.4 + 0.5 * len(rows))
    axes = figure.subplots()
    low, high = limits
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            colour = "white" if is_dark else "black"
            axes.text(column, row, f"{value:{digits}}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, label=label)
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
