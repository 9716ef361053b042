"""Pictures of what tasks do to each other: blue where they help, red where they harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_adapt.continual.plots import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def affinity_plot(
    matrix: torch.Tensor | np.ndarray, tasks: Sequence[str], title: str = "Affinity of the tasks"
) -> Figure:
    """A heat map of [`task_affinity`].

    The colours span what tasks do to each other; what a step does to its own task is usually more,
    and stands there as a number.

    Args:
        matrix: Z, (K, K): what a step on the task of the row does to that of the column.
        tasks: Their names.
        title: The title.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the matrix is not of these tasks.

    Example:
        >>> matrix = torch.tensor([[0.10, 0.02], [-0.04, 0.20]])
        >>> affinity_plot(matrix, ["spam", "stars"]).axes[0].get_ylabel()
        'a step on'
    """
    values = _checked(matrix, tasks)
    others = np.abs(values[~np.eye(len(tasks), dtype=bool)])
    largest = max((float(x) for x in others if np.isfinite(x)), default=0.0)
    label = "share by which the loss falls"
    figure = _diverging(values, tasks, title, largest or 1.0, label, "+.2g")
    axes = figure.axes[0]
    axes.set_xlabel("changes the loss of")
    axes.set_ylabel("a step on")
    return figure


def cosine_plot(
    matrix: torch.Tensor | np.ndarray,
    tasks: Sequence[str],
    title: str = "Directions of the tasks' gradients",
) -> Figure:
    """A heat map of [`gradient_cosines`].

    Args:
        matrix: C, (K, K).
        tasks: The names of the tasks.
        title: The title.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the matrix is not of these tasks.

    Example:
        >>> matrix = torch.tensor([[1.0, -0.71], [-0.71, 1.0]])
        >>> [text.get_text() for text in cosine_plot(matrix, ["spam", "stars"]).axes[0].texts]
        ['1.00', '-0.71', '-0.71', '1.00']
    """
    return _diverging(_checked(matrix, tasks), tasks, title, 1.0, "cosine of the gradients", ".2f")


def _checked(matrix: torch.Tensor | np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    given = matrix.detach().cpu().float() if isinstance(matrix, torch.Tensor) else matrix
    values = np.asarray(given, dtype=np.float64)
    if values.shape != (len(tasks), len(tasks)) or not len(tasks):
        raise ValueError(
            f"The matrix has the shape {values.shape}, and there are {len(tasks)} names of tasks "
            f"({', '.join(tasks)}); expected (K, K) of K tasks."
        )
    return values


def _diverging(
    values: np.ndarray, tasks: Sequence[str], title: str, largest: float, label: str, digits: str
) -> Figure:
    """A square heat map whose white is 0."""
    limits = (-largest, largest)
    figure = heat_map(
        values, tasks, tasks, colours="RdBu", limits=limits, label=label, digits=digits
    )
    figure.axes[0].set_title(title)
    return figure
