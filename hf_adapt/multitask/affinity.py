"""What tasks do to each other: their gradients, a step on one of them, and training together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch


def gradient_cosines(gradients: torch.Tensor) -> torch.Tensor:
    r"""The cosines between the gradients of tasks: below 0 two tasks pull against each other.

    .. math::
        C_{ij} = \frac{g_i \cdot g_j}{\lVert g_i \rVert \, \lVert g_j \rVert}

    A cosine is about directions alone: what a step on one task does to the loss of another shows
    in [`task_affinity`].

    Reference:
        Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Definition 1, arXiv:2001.06782.

    Args:
        gradients: A gradient for each task, of all shared weights or of one layer.

    Shape:
        - gradients: (K, P); output: (K, K), NaN for a task whose gradient is 0.

    Raises:
        ValueError: If the gradients are no matrix.

    Example:
        >>> gradient_cosines(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([[ 1.0000, -0.7071],
                [-0.7071,  1.0000]])
    """
    if gradients.ndim != 2 or not len(gradients):
        raise ValueError(
            f"gradients has the shape {tuple(gradients.shape)}; expected (K, P), one row for each "
            "task."
        )
    given = gradients.detach().double()
    return cosines_of(given @ given.T).to(gradients.dtype)


def cosines_of(gram: torch.Tensor) -> torch.Tensor:
    """[`gradient_cosines`] from the products of the gradients, (K, K) to (K, K)."""
    norms = gram.diagonal().sqrt()
    return (gram / norms.outer(norms)).clamp(-1, 1)  # which keeps NaN


def task_affinity(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    r"""By which share a step on one task lowers the loss of another; below 0 it raises it.

    .. math::
        Z_{ij} = 1 - \frac{\ell_j(\theta_i)}{\ell_j(\theta)}

    with the weights :math:`\theta_i` after a step on task i alone. Average it over many steps: of
    single ones it is noisy. Not symmetric: one task may help another that harms it.

    Reference:
        Fifty et al. 2021, "Efficiently Identifying Task Groupings for Multi-Task Learning" (TAG),
        Eq. 1, arXiv:2109.04617.

    Args:
        before: The loss of each task before.
        after: In row i and column j the loss of task j after a step on task i.

    Shape:
        - before: (K,), after: (K, K); output: (K, K).

    Raises:
        ValueError: If a loss before is not positive or the shapes do not fit.

    Example:
        >>> task_affinity(torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 2.0], [1.25, 1.0]]))
        tensor([[ 0.5000,  0.0000],
                [-0.2500,  0.5000]])
    """
    if before.ndim != 1 or after.shape != (len(before), len(before)):
        raise ValueError(
            f"before and after have the shapes {tuple(before.shape)} and {tuple(after.shape)}; "
            "expected (K,) and (K, K) of K tasks."
        )
    if not bool((before > 0).all()):
        raise ValueError(f"The losses before are {before.tolist()}; a share needs positive ones.")
    return 1 - after / before


def relative_gain(
    results: Mapping[str, float],
    baselines: Mapping[str, float],
    lower_is_better: Collection[str] = (),
) -> float:
    r"""How much better tasks are together than each alone, as a mean share of the latter.

    .. math::
        \Delta m = \frac1K \sum_k (-1)^{l_k} \, \frac{M_k - B_k}{B_k}

    with :math:`l_k = 1` where lower is better. Below 0 the tasks harm each other on average.

    Reference:
        Maninis et al. 2019, "Attentive Single-Tasking of Multiple Tasks", arXiv:1904.08918.

    Args:
        results: M, a metric of each task.
        baselines: B, the same metrics of models that were trained on one task each.
        lower_is_better: The tasks whose metric is an error or a loss.

    Raises:
        ValueError: If the names of the tasks differ, there are none, or a number does not fit.

    Example:
        >>> alone = {"spam": 0.8, "stars": 0.5}
        >>> round(relative_gain({"spam": 0.84, "stars": 0.4}, alone, lower_is_better=["stars"]), 3)
        0.125
    """
    if not results or results.keys() != baselines.keys():
        raise ValueError(
            f"The results are of {', '.join(results) or 'no task'}, and the baselines of "
            f"{', '.join(baselines) or 'no task'}; expected the same tasks, one or more."
        )
    if isinstance(lower_is_better, str):
        lower_is_better = [lower_is_better]
    if unknown := sorted(set(lower_is_better) - results.keys()):
        raise ValueError(
            f"lower_is_better names {', '.join(unknown)}, and the tasks are {', '.join(results)}."
        )
    gains = []
    for task, baseline in baselines.items():
        if not (baseline > 0 and math.isfinite(baseline) and math.isfinite(results[task])):
            raise ValueError(
                f"The task {task!r} has the result {results[task]} and the baseline {baseline}; a "
                "share needs finite numbers and a baseline above 0. Use another metric for it."
            )
        gain = (results[task] - baseline) / baseline
        gains.append(-gain if task in lower_is_better else gain)
    return math.fsum(gains) / len(gains)
