"""How often each of several data sets is drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mixing_probabilities(sizes: Sequence[int], temperature: float = 1.0) -> list[float]:
    r"""How often each data set is drawn from.

    .. math::
        p_k = \frac{n_k^{1/T}}{\sum_i n_i^{1/T}}

    1 is proportional to the sizes, infinity equal; 2 is the square root.

    Reference:
        Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
        Transformer", section 3.5.2, arXiv:1910.10683.

    Args:
        sizes: The number of rows of each data set.
        temperature: T, positive; may be infinite.

    Returns:
        A probability for each; they add up to 1.

    Raises:
        ValueError: If a size or the temperature is not positive.

    Example:
        >>> [round(p, 4) for p in mixing_probabilities([100, 10_000], temperature=2)]
        [0.0909, 0.9091]
    """
    if not sizes or any(size <= 0 for size in sizes):
        raise ValueError(f"sizes={list(sizes)}: each data set needs rows.")
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} must be positive: 1 is proportional, infinity equal."
        )
    largest = max(sizes)
    shares = [(size / largest) ** (1 / temperature) for size in sizes]
    return [share / sum(shares) for share in shares]


def annealed_temperature(epoch: int, epochs: int, least: float = 0.2) -> float:
    r"""The temperature of an epoch, from proportional towards equal.

    .. math::
        \frac1T = 1 - (1 - \alpha) \frac{e - 1}{E - 1}

    Reference:
        Stickland & Murray 2019, "BERT and PALs", section 4.1, arXiv:1902.02671 (α = 0.2).

    Args:
        epoch: e, from 1.
        epochs: E.
        least: α, the exponent of the last epoch.

    Raises:
        ValueError: If the epoch is not one of them or `least` is out of range.

    Example:
        >>> [round(1 / annealed_temperature(epoch, 3), 2) for epoch in (1, 2, 3)]
        [1.0, 0.6, 0.2]
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch={epoch} must lie from 1 to epochs={epochs}.")
    if not 0 <= least <= 1:
        raise ValueError(f"least={least} must lie from 0 (equal) to 1 (proportional).")
    share = 0.0 if epochs == 1 else (epoch - 1) / (epochs - 1)
    exponent = 1 - (1 - least) * share
    return math.inf if exponent == 0 else 1 / exponent


def quotas(probabilities: Sequence[float], total: int) -> list[int]:
    """Whole numbers of rows in these proportions that add up exactly, by largest remainders.

    Args:
        probabilities: Shares that add up to 1.
        total: How many rows.

    Raises:
        ValueError: If the shares do not add up to 1 or one is negative.

    Example:
        >>> quotas([0.5, 0.3, 0.2], 11)
        [6, 3, 2]
    """
    if any(p < 0 for p in probabilities) or not math.isclose(sum(probabilities), 1, abs_tol=1e-9):
        raise ValueError(
            f"The shares {list(probabilities)} must be 0 or more and add up to 1; they add up to "
            f"{sum(probabilities):.6g}."
        )
    exact = [p * total for p in probabilities]
    found = [math.floor(each + 1e-9) for each in exact]
    left = total - sum(found)
    order = sorted(range(len(exact)), key=lambda k: (found[k] - exact[k], k))
    for k in order[:left]:
        found[k] += 1
    return found
