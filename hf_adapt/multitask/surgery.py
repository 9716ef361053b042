"""One direction of the gradients of several tasks, where they disagree.

Each function takes the gradients (K, P) of K tasks and returns a direction (P,): their sum with
weights that follow from their products alone.
"""

from __future__ import annotations

import torch

_COLUMNS = 2**18
"""How many columns of gradients are in float64 at a time: they fit a cache."""


def pcgrad(gradients: torch.Tensor, seed: int | None = None) -> torch.Tensor:
    r"""Takes from each task's gradient what conflicts with the others', and adds them up.

    .. math::
        g_i \leftarrow g_i - \frac{\min(g_i \cdot g_j, 0)}{\lVert g_j \rVert^2} g_j

    for all j ≠ i in a random order, with the other tasks' gradients as they were. Projections of
    whole steps and of micro-batches are not the same: use the step's gradients.

    Reference:
        Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Alg. 1, arXiv:2001.06782.

    Args:
        gradients: A gradient for each task.
        seed: Seed of the orders; None for torch's random state,
            which [`MultiTask`] sets in each step.

    Shape:
        - gradients: (K, P); output: (P,), of their dtype.

    Raises:
        ValueError: If the gradients are no matrix of numbers.

    Example:
        >>> pcgrad(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    return _weighed(gradients, pcgrad_weights(_gram(gradients), generator))


def pcgrad_weights(
    products: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The weights of [`pcgrad`] from the products of the gradients, (K, K) to (K,).

    A projected gradient is a sum of the given ones, and so are its products with them.
    """
    number = len(products)
    shares = torch.eye(number).to(products)
    for task, own in enumerate(shares):
        for other in torch.randperm(number, generator=generator).tolist():
            product = own @ products[other]
            if other != task and product < 0:  # then the other's norm is not 0
                own[other] -= product / products[other, other]
    return shares.sum(0)


def mgda(gradients: torch.Tensor) -> torch.Tensor:
    r"""The shortest vector in the convex hull of the gradients: it hurts no task.

    .. math::
        d = \sum_k \alpha_k g_k, \qquad
        \alpha = \arg\min_{\alpha \in \Delta} \Big\lVert \sum_k \alpha_k g_k \Big\rVert^2

    Reference:
        Sener & Koltun 2018, "Multi-Task Learning as Multi-Objective Optimization", Eq. 3,
        arXiv:1810.04650.

    Args:
        gradients: A gradient for each task.

    Shape:
        - gradients: (K, P); output: (P,).

    Raises:
        ValueError: If the gradients are no matrix of numbers.

    Example:
        >>> mgda(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.2000, 0.4000])
    """
    return _weighed(gradients, mgda_weights(_gram(gradients)))


def mgda_weights(gram: torch.Tensor) -> torch.Tensor:
    """The weights of [`mgda`] from the products of the gradients, (K, K) to (K,)."""
    scaled = gram / gram.diagonal().max().clamp_min(torch.finfo(gram.dtype).tiny)
    return _on_simplex(scaled, torch.zeros_like(gram[0]))


def imtl_g(gradients: torch.Tensor) -> torch.Tensor:
    r"""The direction whose projections on all gradients are equal.

    .. math::
        d \cdot \frac{g_i}{\lVert g_i \rVert} = d \cdot \frac{g_j}{\lVert g_j \rVert}, \qquad
        d = \sum_k \alpha_k g_k, \quad \sum_k \alpha_k = 1

    Weights may be negative.

    Reference:
        Liu et al. 2021, "Towards Impartial Multi-Task Learning", Eq. 3-6, ICLR.

    Args:
        gradients: A gradient for each task.

    Shape:
        - gradients: (K, P); output: (P,).

    Raises:
        ValueError: If the gradients are no matrix of numbers.

    Example:
        >>> imtl_g(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.1716, 0.4142])
    """
    return _weighed(gradients, imtl_g_weights(_gram(gradients)))


def imtl_g_weights(gram: torch.Tensor) -> torch.Tensor:
    """The weights of [`imtl_g`] from the products of the gradients, (K, K) to (K,)."""
    norms = gram.diagonal().sqrt()
    number = len(gram)
    if number == 1 or bool((norms == 0).any()):
        return _equal_of_moving(norms)
    # With unit gradients u: g_k · (u_1 - u_j) summed with α is 0 for each j, and Σ α = 1.
    products = gram / norms  # (k, j): g_k · u_j
    system = torch.cat([(products[:, :1] - products[:, 1:]).T, torch.ones(1, number).to(gram)])
    known = torch.zeros(number).to(gram)
    known[-1] = 1.0
    weights: torch.Tensor = torch.linalg.lstsq(system, known[:, None], driver="gelsd").solution
    return weights[:, 0]


def nash_mtl(gradients: torch.Tensor) -> torch.Tensor:
    r"""The direction that tasks would agree on in a bargain: each gains in proportion.

    .. math::
        G G^\top \alpha = 1 / \alpha, \qquad d = \sum_k \alpha_k g_k

    Its squared length is the number of tasks, whatever the gradients'.

    Reference:
        Navon et al. 2022, "Multi-Task Learning as a Bargaining Game", Claim 3.1, arXiv:2202.01017.

    Args:
        gradients: A gradient for each task.

    Shape:
        - gradients: (K, P); output: (P,).

    Raises:
        ValueError: If the gradients are no matrix of numbers.

    Example:
        >>> nash_mtl(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5412, 1.3066])
    """
    return _weighed(gradients, nash_mtl_weights(_gram(gradients)))


def nash_mtl_weights(gram: torch.Tensor) -> torch.Tensor:
    """The weights of [`nash_mtl`] from the products of the gradients, (K, K) to (K,).

    They are the minimum of the convex ½ αᵀMα - Σ log α; Newton's method on log α finds it.
    """
    norms = gram.diagonal().sqrt()
    moving = norms > 0
    if not bool(moving.all()):
        weights = torch.zeros_like(norms)
        if bool(moving.any()):
            weights[moving] = nash_mtl_weights(gram[moving][:, moving])
        return weights
    # α of unit gradients is α times the norm. Opposite ones would gain without end.
    unit = gram / norms.outer(norms) + 1e-9 * torch.eye(len(gram)).to(gram)
    alpha = torch.ones_like(norms)
    for _ in range(200):
        slope = unit @ alpha - 1 / alpha
        if float(slope.abs().max()) < 1e-12:
            break
        step = torch.linalg.solve(unit + torch.diag(alpha**-2), slope)
        # The decrement of a self-concordant function bounds the step (damped Newton).
        decrement = float((slope @ step).clamp_min(0).sqrt())
        size = 1.0 if decrement < 0.25 else 1 / (1 + decrement)
        alpha = alpha - size * step
    return alpha / norms


def cagrad(gradients: torch.Tensor, c: float = 0.5) -> torch.Tensor:
    r"""The direction near the mean gradient that helps the task helped least.

    .. math::
        d = \arg\max_{\lVert d - g_0 \rVert \le c \lVert g_0 \rVert} \min_k \, g_k \cdot d
          = g_0 + \frac{c \lVert g_0 \rVert}{\lVert g_w \rVert} g_w

    with the mean gradient :math:`g_0` and :math:`g_w = \sum_k w_k g_k` for the weights w of the
    dual problem.

    Reference:
        Liu et al. 2021, "Conflict-Averse Gradient Descent", Eq. 4-6, arXiv:2110.14048.
        Deviation: not divided by 1 + c², as their code does; d is of the length of the paper's.

    Args:
        gradients: A gradient for each task.
        c: How far from the mean it may lie, from 0 (the mean) to below 1.

    Shape:
        - gradients: (K, P); output: (P,).

    Raises:
        ValueError: If c is out of range or the gradients are no matrix of numbers.

    Example:
        >>> cagrad(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), c=0.5)
        tensor([0.2500, 0.5000])
    """
    return _weighed(gradients, cagrad_weights(_gram(gradients), c))


def cagrad_weights(gram: torch.Tensor, c: float = 0.5) -> torch.Tensor:
    """The weights of [`cagrad`] from the products of the gradients, (K, K) to (K,)."""
    if not 0 <= c <= 1:
        raise ValueError(f"c={c} must lie from 0 (the mean gradient) to 1.")
    mean = torch.full_like(gram[0], 1 / len(gram))
    scaled = gram / gram.diagonal().max().clamp_min(torch.finfo(gram.dtype).tiny)
    radius = c * (mean @ scaled @ mean).sqrt()
    # The dual is min c·w + r‖g_w‖; as ‖g_w‖ = min_t ‖g_w‖² / 2t + t / 2, a quadratic for each t.
    w = mean
    for _ in range(200):
        length = (w @ scaled @ w).sqrt().clamp_min(1e-12)
        last, w = w, _on_simplex(scaled * (radius / length), scaled @ mean)
        if float((w - last).abs().max()) < 1e-13:
            break
    length = (w @ scaled @ w).sqrt()
    return mean if float(length) == 0 else mean + radius / length * w


def aligned_mtl(gradients: torch.Tensor) -> torch.Tensor:
    r"""The sum of the gradients after their principal components are made equally long.

    .. math::
        \alpha = \sqrt{\lambda_{min}} \; V \Lambda^{-1/2} V^\top 1, \qquad
        G G^\top = V \Lambda V^\top

    Reference:
        Senushkin et al. 2023, "Independent Component Alignment for Multi-Task Learning", Alg. 1,
        arXiv:2305.19000.

    Args:
        gradients: A gradient for each task.

    Shape:
        - gradients: (K, P); output: (P,).

    Raises:
        ValueError: If the gradients are no matrix of numbers.

    Example:
        >>> aligned_mtl(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.2764, 0.8292])
    """
    return _weighed(gradients, aligned_mtl_weights(_gram(gradients)))


def aligned_mtl_weights(gram: torch.Tensor) -> torch.Tensor:
    """The weights of [`aligned_mtl`] from the products of the gradients, (K, K) to (K,)."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.max() * len(gram) * torch.finfo(gram.dtype).eps
    if not bool(kept.any()):
        return torch.ones(len(gram)).to(gram)
    values, vectors = values[kept], vectors[:, kept]
    weights: torch.Tensor = values.min().sqrt() * (vectors / values.sqrt()) @ vectors.T.sum(1)
    return weights


# ---- what they share ----


def _gram(gradients: torch.Tensor) -> torch.Tensor:
    """The products of gradients with each other in float64, (K, P) to (K, K) on the CPU.

    Raises:
        ValueError: If the gradients are no matrix of numbers.
    """
    if gradients.ndim != 2 or not len(gradients):
        raise ValueError(
            f"gradients has the shape {tuple(gradients.shape)}; expected (K, P), one row for each "
            "task."
        )
    parts = torch.split(gradients.detach(), _COLUMNS, dim=1)
    found = torch.stack([(own := part.double()) @ own.T for part in parts]).sum(0).cpu()
    if not bool(torch.isfinite(found).all()):
        raise ValueError("gradients holds NaN or infinity: skip the step, or lower the loss scale.")
    return found


def _weighed(gradients: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = weights.to(gradients) @ gradients.detach()
    return total


def _equal_of_moving(norms: torch.Tensor) -> torch.Tensor:
    """Equal weights of the tasks that have a gradient; of all, where none has."""
    moving = (norms > 0).to(norms)
    return moving / moving.sum() if float(moving.sum()) else torch.full_like(norms, 1 / len(norms))


def _on_simplex(quadratic: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """The weights, 0 or more and adding up to 1, of the smallest ½ wᵀQw + cᵀw.

    An active set method for a few tasks: exact, in about as many rounds as there are tasks.
    """
    number = len(linear)
    own = quadratic.diagonal()
    least = 1e-16 * max(float(own.max()), 1e-200)
    matrix = quadratic + torch.diag(1e-12 * own + least)  # equal gradients are one
    best = int((matrix.diagonal() / 2 + linear).argmin())
    weights, active = torch.zeros_like(linear), [best]
    weights[best] = 1.0
    for _ in range(20 * number):
        wanted = torch.zeros_like(linear)
        wanted[active] = _on_plane(matrix[active][:, active], linear[active])
        outside = [k for k in active if wanted[k] < 0]
        if outside:  # as far as the first that becomes 0
            steps = {k: float(weights[k] / (weights[k] - wanted[k])) for k in outside}
            first = min(steps, key=lambda k: steps[k])
            weights = weights + steps[first] * (wanted - weights)
            weights[first] = 0.0
            active.remove(first)
            continue
        weights = wanted
        slopes = matrix @ weights + linear
        steepest = int(slopes.argmin())
        level = float(weights @ slopes)
        scale = float(slopes.abs().max())
        if float(slopes[steepest]) >= level - 1e-12 * scale or steepest in active:
            break
        active.append(steepest)
    return weights


def _on_plane(matrix: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """The same where weights need only add up to 1."""
    scales = matrix.diagonal().sqrt()
    unit = matrix / scales.outer(scales)  # gradients may be of very different lengths
    sides = torch.stack([torch.ones_like(linear), linear], 1) / scales[:, None]
    ones, others = (torch.linalg.solve(unit, sides) / scales[:, None]).T
    weights: torch.Tensor = ones * (1 + others.sum()) / ones.sum() - others
    return weights
