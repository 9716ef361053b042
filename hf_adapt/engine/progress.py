"""Schedules: pure functions of training progress, so that resuming needs no state."""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]
"""Maps progress (``global_step / max_steps``, from 0 to 1) to a value."""


def dann_ramp(gamma: float = 10.0) -> Schedule:
    """The ramp of domain-adversarial training: 0 at the start, close to 1 at the end.

    Reference:
        Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", section 5.2.2,
        arXiv:1505.07818: ``2 / (1 + exp(-gamma * p)) - 1``.

    Args:
        gamma: Steepness of the ramp, unitless; must be positive.

    Returns:
        A schedule: progress to a factor from 0 to 1.

    Raises:
        ValueError: If ``gamma`` is not positive.

    Example:
        >>> ramp = dann_ramp()
        >>> [round(ramp(p), 6) for p in (0.0, 0.1, 0.5, 1.0)]
        [0.0, 0.462117, 0.986614, 0.999909]
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}. The published value is 10.")
    return lambda progress: 2.0 / (1.0 + math.exp(-gamma * progress)) - 1.0


def linear_ramp(
    *,
    start_value: float = 0.0,
    end_value: float = 1.0,
    start_progress: float = 0.0,
    end_progress: float = 1.0,
) -> Schedule:
    """A straight line between two values during a part of the run, flat before and after it.

    Args:
        start_value: Value until ``start_progress``.
        end_value: Value from ``end_progress`` on; may be smaller than ``start_value``.
        start_progress: Fraction of the run after which the value starts to change, from 0 to 1.
        end_progress: Fraction of the run after which the value no longer changes; must be greater
            than ``start_progress``.

    Returns:
        A schedule: progress to a value between ``start_value`` and ``end_value``.

    Raises:
        ValueError: If ``0 <= start_progress < end_progress <= 1`` does not hold.

    Example:
        >>> ramp = linear_ramp(end_value=0.5, start_progress=0.2, end_progress=0.6)
        >>> [round(ramp(p), 3) for p in (0.1, 0.4, 0.9)]
        [0.0, 0.25, 0.5]
    """
    if not 0.0 <= start_progress < end_progress <= 1.0:
        raise ValueError(
            "linear_ramp needs 0 <= start_progress < end_progress <= 1, which are fractions of the "
            f"run; got start_progress={start_progress} and end_progress={end_progress}."
        )

    def schedule(progress: float) -> float:
        done = (progress - start_progress) / (end_progress - start_progress)
        done = min(1.0, max(0.0, done))
        return (1.0 - done) * start_value + done * end_value

    return schedule


def slanted_triangular(cut_fraction: float = 0.1, ratio: float = 32.0) -> Schedule:
    """The learning-rate schedule of ULMFiT: a short steep rise, a long slow fall.

    Reference:
        Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", Eq. 3,
        arXiv:1801.06146. Deviation: progress is continuous, so the cut is not rounded to a step.

    Args:
        cut_fraction: Fraction of the steps during which the learning rate rises, between 0 and 1.
        ratio: Learning rate at the peak, divided by that at both ends; at least 1.

    Returns:
        A schedule: progress to a factor from ``1 / ratio`` to 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> rate = slanted_triangular()
        >>> [round(rate(p), 4) for p in (0.0, 0.1, 0.55, 1.0)]
        [0.0312, 1.0, 0.5156, 0.0312]
    """
    if not (0.0 < cut_fraction < 1.0 and ratio >= 1.0):
        raise ValueError(
            "slanted_triangular needs 0 < cut_fraction < 1 and ratio >= 1, got "
            f"cut_fraction={cut_fraction} and ratio={ratio}. Published: 0.1 and 32."
        )

    def schedule(progress: float) -> float:
        rising = progress / cut_fraction
        falling = (1.0 - progress) / (1.0 - cut_fraction)
        return (1.0 + max(0.0, min(rising, falling)) * (ratio - 1.0)) / ratio

    return schedule


def value_at(value: float | Schedule, progress: float) -> float:
    """The value of a constant or of a schedule at ``progress``.

    Example:
        >>> value_at(0.3, 0.5), value_at(lambda p: 2 * p, 0.5)
        (0.3, 1.0)
    """
    return value(progress) if callable(value) else value
