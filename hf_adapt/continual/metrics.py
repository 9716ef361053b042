"""The numbers of learning one task after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def continual_metrics(
    matrix: Sequence[Sequence[float]] | npt.ArrayLike,
    baseline: Sequence[float] | npt.ArrayLike | None = None,
    joint: Sequence[float] | npt.ArrayLike | None = None,
    trained: Sequence[int] | None = None,
) -> dict[str, float]:
    r"""Average accuracy, transfer between tasks and forgetting, from the scores after each task.

    With :math:`R_{ij}` the score on task j after training on task i, of T tasks trained, and
    :math:`b_j` the score on task j before any training:

    .. math::
        \text{average accuracy} &= \tfrac1T \textstyle\sum_j R_{Tj} \\
        \text{learning accuracy} &= \tfrac1T \textstyle\sum_j R_{jj} \\
        \text{incremental accuracy} &= \tfrac1T \textstyle\sum_t \tfrac1t \sum_{j \le t} R_{tj} \\
        \text{BWT} &= \tfrac1{T-1} \textstyle\sum_{j<T} (R_{Tj} - R_{jj}) \\
        \text{FWT} &= \tfrac1{T-1} \textstyle\sum_{j>1} (R_{j-1,j} - b_j) \\
        \text{forgetting} &= \tfrac1{T-1} \textstyle\sum_{j<T} (\max_{l<T} R_{lj} - R_{Tj})

    Read BWT beside the learning accuracy: a model that never learnt a task cannot forget it.

    Reference:
        Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory for Continual Learning",
        arXiv:1706.08840 (average accuracy, BWT, FWT); Chaudhry et al. 2018, "Riemannian Walk for
        Incremental Learning", arXiv:1801.10112 (forgetting, intransigence). Forgetting may be
        negative: the later tasks have then helped the earlier ones.

    Args:
        matrix: Scores, higher is better (negate losses). NaN where a task was not evaluated.
        baseline: Score on each task before the first training; FWT needs it.
        joint: Score on each task k of a model trained on tasks 1 to k together; intransigence, its
            mean distance to the diagonal, needs it.
        trained: The column of the task that each row has trained, where that is not simply the
            first, the second and so on. A task may be trained several times: :math:`R_{jj}` is then
            its score after the last of them, and BWT and forgetting are means over the tasks other
            than the one trained last.

    Shape:
        - matrix: (T, N), a row for each training and a column for each task, both in the order
          of training. Columns of tasks that are not trained yet are left out of account.
        - baseline, joint: (N,), or (T,) without `trained`.

    Returns:
        `average_accuracy`, `learning_accuracy`, `incremental_accuracy`; from two tasks on `bwt`,
        `forgetting` and, with a baseline, `fwt`; with joint scores `intransigence`. One that needs
        a missing score is NaN; forgetting takes the maximum of the scores that there are.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> matrix = [[0.9, 0.1, 0.2], [0.95, 0.8, 0.3], [0.6, 0.85, 0.85]]
        >>> found = continual_metrics(matrix, baseline=[0.5, 0.1, 0.15])
        >>> {name: round(value, 4) for name, value in found.items()}
        {'average_accuracy': 0.7667, 'learning_accuracy': 0.85, 'incremental_accuracy': 0.8472,
         'bwt': -0.125, 'forgetting': 0.15, 'fwt': 0.075}
    """
    try:
        scores = np.asarray(matrix, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"The rows of the matrix must be equally long: {error}.") from error
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(
            f"Expected a matrix with a row for each training and a column for each task, got shape "
            f"{scores.shape}."
        )
    order = list(range(len(scores)) if trained is None else trained)
    columns = scores.shape[1]
    if len(order) != len(scores) or not {*order} <= {*range(columns)}:
        raise ValueError(
            f"{len(scores)} rows and {columns} columns need the column of the task that each row "
            f"has trained, from 0 to {columns - 1}, got trained={trained}. A task that was trained "
            "twice has two rows: trained=[0, 1, 0]."
        )
    tasks = list(dict.fromkeys(order))
    learnt = np.array([scores[len(order) - 1 - order[::-1].index(j), j] for j in tasks])
    last = scores[-1, tasks]
    so_far = [list(dict.fromkeys(order[: t + 1])) for t in range(len(order))]
    found = {
        "average_accuracy": last.mean(),
        "learning_accuracy": learnt.mean(),
        "incremental_accuracy": np.mean([scores[t, seen].mean() for t, seen in enumerate(so_far)]),
    }
    before = _of_tasks("baseline", baseline, tasks, len(order), columns)
    together = _of_tasks("joint", joint, tasks, len(order), columns)
    is_past = np.array(tasks) != order[-1]
    if is_past.any():
        best = np.fmax.reduce(scores[:-1, tasks])
        found["bwt"] = (last - learnt)[is_past].mean()
        found["forgetting"] = (best - last)[is_past].mean()
        if before is not None:
            untrained = np.array([scores[order.index(j) - 1, j] for j in tasks[1:]])
            found["fwt"] = (untrained - before[1:]).mean()
    if together is not None:
        found["intransigence"] = (together - learnt).mean()
    return {name: float(value) for name, value in found.items()}


def _of_tasks(
    name: str, given: Any, tasks: list[int], rows: int, columns: int
) -> npt.NDArray[np.float64] | None:
    """The scores of the tasks trained."""
    if given is None:
        return None
    scores = np.asarray(given, dtype=np.float64)
    if scores.shape not in ((rows,), (columns,)) or len(scores) <= max(tasks):
        raise ValueError(
            f"{name} must have a score for each of the {columns} tasks, got shape {scores.shape}."
        )
    return scores[tasks]
