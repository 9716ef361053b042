"""How much the loss of each task counts, as a function of the losses."""

from __future__ import annotations

import torch

from hf_adapt.engine.auxiliary import seed_for


def uncertainty_loss(
    losses: torch.Tensor, log_variances: torch.Tensor, is_regression: torch.Tensor
) -> torch.Tensor:
    r"""The loss of tasks whose noise is learnt beside them.

    .. math::
        L = \sum_{k \in reg} \tfrac12 \big(e^{-s_k} \ell_k + s_k\big)
          + \sum_{k \in class} \big(e^{-s_k} \ell_k + \tfrac12 s_k\big), \qquad s = \log \sigma^2

    The terms without a loss enter once for each optimizer step; the log-variances must see no
    weight decay.

    Reference:
        Kendall et al. 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", Eq. 7 and 10,
        arXiv:1705.07115.

    Args:
        losses: The loss of each task.
        log_variances: s.
        is_regression: Which tasks are regressions (squared errors).

    Shape:
        - all: (K,); output: ().

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> s = torch.zeros(2)
        >>> uncertainty_loss(torch.tensor([1.0, 2.0]), s, torch.tensor([True, True])).item()
        1.5
    """
    if not losses.shape == log_variances.shape == is_regression.shape or losses.ndim != 1:
        raise ValueError(
            f"losses, log_variances and is_regression have the shapes {tuple(losses.shape)}, "
            f"{tuple(log_variances.shape)} and {tuple(is_regression.shape)}; expected (K,) of K "
            "tasks."
        )
    factor = torch.where(is_regression, 0.5, 1.0)
    return (factor * torch.exp(-log_variances) * losses + 0.5 * log_variances).sum()


def dwa_weights(
    previous: torch.Tensor, before: torch.Tensor, temperature: float = 2.0
) -> torch.Tensor:
    r"""Weights that grow for tasks whose loss falls slowly (dynamic weight average).

    .. math::
        \lambda_k = K \frac{e^{r_k / T}}{\sum_i e^{r_i / T}}, \qquad
        r_k = \frac{\ell_k(t-1)}{\ell_k(t-2)}

    Reference:
        Liu et al. 2019, "End-to-End Multi-Task Learning with Attention", Eq. 7, arXiv:1803.10704.

    Args:
        previous: The mean loss of each task over the last window of steps.
        before: The same over the window before it.
        temperature: T; larger ones make the weights more alike.

    Shape:
        - previous, before: (K,); output: (K,), adding up to K.

    Raises:
        ValueError: If the temperature or a loss is not positive, or the shapes differ.

    Example:
        >>> dwa_weights(torch.tensor([0.8, 0.9]), torch.ones(2))
        tensor([0.9750, 1.0250])
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    if previous.shape != before.shape or previous.ndim != 1:
        raise ValueError(
            f"The losses have the shapes {tuple(previous.shape)} and {tuple(before.shape)}; "
            "expected (K,) of K tasks, twice."
        )
    if not bool((before > 0).all()):
        raise ValueError(f"The losses before are {before.tolist()}; a ratio needs positive ones.")
    return len(previous) * torch.softmax(previous / before / temperature, 0)


def famo_weights(losses: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    r"""Weights under which the logarithms of all losses fall equally fast (FAMO).

    .. math::
        w_k = \frac{z_k / \ell_k}{\sum_i z_i / \ell_i}, \qquad z = \mathrm{softmax}(\xi)

    The scores ξ take a step along :math:`J^\top(\log \ell_t - \log \ell_{t+1})`, J the Jacobian of
    the softmax.

    Reference:
        Liu et al. 2023, "FAMO: Fast Adaptive Multitask Optimization", Alg. 1, arXiv:2306.03792.

    Args:
        losses: The loss of each task, positive.
        scores: ξ.

    Shape:
        - losses, scores: (K,); output: (K,), adding up to 1.

    Raises:
        ValueError: If a loss is not positive or the shapes differ.

    Example:
        >>> famo_weights(torch.tensor([1.0, 2.0]), torch.zeros(2))
        tensor([0.6667, 0.3333])
    """
    if losses.shape != scores.shape or losses.ndim != 1:
        raise ValueError(
            f"losses and scores have the shapes {tuple(losses.shape)} and {tuple(scores.shape)}; "
            "expected (K,) of K tasks."
        )
    if not bool((losses > 0).all()):
        raise ValueError(
            f"The losses are {losses.tolist()}; their logarithms need positive ones. Add a "
            "constant to a loss that may reach 0."
        )
    shares = torch.softmax(scores, 0) / losses
    return shares / shares.sum()


def gradnorm_loss(
    norms: torch.Tensor, ratios: torch.Tensor, weights: torch.Tensor, alpha: float = 1.5
) -> torch.Tensor:
    r"""The loss of the weights under which all tasks train at similar rates (GradNorm).

    .. math::
        L = \sum_k \Big| w_k n_k - \bar G \, r_k^{\alpha} \Big|, \qquad
        \bar G = \frac1K \sum_k w_k n_k, \quad
        r_k = \frac{\tilde\ell_k}{\frac1K \sum_i \tilde\ell_i}

    Minimise it over the weights alone; the targets :math:`\bar G r_k^\alpha` are constants. After
    each step, scale the weights so that they add up to K.

    Reference:
        Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing", Eq. 2,
        arXiv:1711.02257.

    Args:
        norms: n, the norm of the gradient of each task's loss, without its weight, at the last
            shared layer.
        ratios: The loss of each task divided by its first one; the smaller, the faster it trains.
        weights: w, the weight of each task.
        alpha: How strongly the rates are balanced; 0 asks for gradients of one norm.

    Shape:
        - norms, ratios, weights: (K,); output: ().

    Raises:
        ValueError: If alpha or a norm is negative, a ratio is not positive, or the shapes differ.

    Example:
        >>> weights = torch.ones(2, requires_grad=True)
        >>> loss = gradnorm_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.8, 0.8]), weights)
        >>> loss.item(), torch.autograd.grad(loss, weights)[0].tolist()
        (1.0, [-1.0, 2.0])
    """
    if not norms.shape == ratios.shape == weights.shape or norms.ndim != 1:
        raise ValueError(
            f"norms, ratios and weights have the shapes {tuple(norms.shape)}, "
            f"{tuple(ratios.shape)} and {tuple(weights.shape)}; expected (K,) of K tasks."
        )
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha} must be 0 or more.")
    if not (bool((norms >= 0).all()) and bool((ratios > 0).all())):
        raise ValueError(
            f"The norms are {norms.tolist()} and the ratios {ratios.tolist()}; expected norms of "
            "0 or more and ratios above 0."
        )
    own = weights * norms.detach()
    rates = ratios.detach() / ratios.detach().mean()
    return (own - own.detach().mean() * rates**alpha).abs().sum()


def random_weights(num_tasks: int, seed: int, step: int) -> torch.Tensor:
    r"""Weights that are drawn for each optimizer step: a baseline that others should beat.

    .. math::
        w = \mathrm{softmax}(\xi), \qquad \xi_k \sim N(0, 1)

    A pure function of its arguments: the same in each process, and after resuming.

    Reference:
        Lin et al. 2022, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
        Learning" (RLW), arXiv:2111.10603.

    Args:
        num_tasks: K.
        seed: Seed of the run.
        step: Number of the optimizer step.

    Shape:
        - output: (K,), float32 on the CPU, adding up to 1.

    Raises:
        ValueError: If there is no task.

    Example:
        >>> weights = random_weights(3, seed=0, step=7)
        >>> torch.equal(weights, random_weights(3, seed=0, step=7)), round(weights.sum().item(), 5)
        (True, 1.0)
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks={num_tasks} must be at least 1.")
    generator = torch.Generator().manual_seed(seed_for(f"random weights {step}", seed))
    return torch.softmax(torch.randn(num_tasks, generator=generator), 0)
