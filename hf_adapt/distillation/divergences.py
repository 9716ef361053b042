"""Divergences of a student's predictions from its teacher's, one value for each item."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Divergence = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(student logits (N, C), teacher logits (N, C), temperature) -> (N,)."""

ABSENT = -1e9
"""The logit of a class that an item does not have (padding among the positions of an answer)."""


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities at a temperature, in at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits.to(dtype) / temperature, dim=-1)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q); classes of probability 0 in p (-inf) add nothing, in value and gradient."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    r"""KL(teacher ‖ student): the student must cover every class that its teacher finds likely.

    .. math::
        L = T^2 \sum_c p_c \log \frac{p_c}{q_c}, \quad
        p = \sigma(t / T), \; q = \sigma(s / T)

    The usual choice for classifiers. A student too small to cover everything is better off with
    [`reverse_kl`] or [`JensenShannon`].

    Reference:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2,
        arXiv:1503.02531. T² keeps the gradient's size as the temperature changes.

    Args:
        student_logits: Scores of each class, any floating dtype; computed in at least float32.
        teacher_logits: The teacher's scores of the same classes.
        temperature: Softmax temperature T of student and teacher; positive.

    Shape:
        - logits: (..., C); output: (...), in nats times T².

    Example:
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> [round(v, 4) for v in forward_kl(torch.tensor([[2.0, 0.0]]), teacher, 2.0).tolist()]
        [0.4805]
    """
    student = _tempered(student_logits, temperature)
    teacher = _tempered(teacher_logits, temperature)
    return temperature**2 * _divergence(teacher, student)


def reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    r"""KL(student ‖ teacher): the student may concentrate on some of the likely classes.

    .. math::
        L = T^2 \sum_c q_c \log \frac{q_c}{p_c}, \quad
        p = \sigma(t / T), \; q = \sigma(s / T)

    Better than [`forward_kl`] where the student is too small to cover everything (generation).
    Infinite where the teacher has a class of probability 0 (a logit of -inf) and the student does
    not.

    Reference:
        Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models",
        arXiv:2306.08543. Deviation: of each token's distribution, not of whole sequences.

    Args:
        student_logits: Scores of each class, any floating dtype; computed in at least float32.
        teacher_logits: The teacher's scores of the same classes.
        temperature: Softmax temperature T of student and teacher; positive.

    Shape:
        - logits: (..., C); output: (...), in nats times T².

    Example:
        >>> student = torch.tensor([[0.0, 0.0]])
        >>> [round(v, 4) for v in reverse_kl(student, torch.tensor([[2.0, 0.0]]), 2.0).tolist()]
        [0.4805]
    """
    return forward_kl(teacher_logits, student_logits, temperature)


def logit_mse(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    r"""Mean squared difference of the logits: the limit of a high temperature.

    .. math::
        L = \frac{1}{C} \sum_c (s_c - t_c)^2

    For regressions, whose outputs are not a distribution, and for logits of equal scale; it also
    compares what a softmax ignores, so [`forward_kl`] is better where only probabilities matter.

    Reference:
        Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?", Eq. 1, arXiv:1312.6184.
        Deviation: the mean over classes, not half the sum.

    Args:
        student_logits: Scores of each class, any floating dtype; computed in at least float32.
        teacher_logits: The teacher's scores of the same classes.
        temperature: Has no effect.

    Shape:
        - logits: (..., C); output: (...), in squared logits.

    Example:
        >>> logit_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).tolist()
        [2.5]
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    present = student > ABSENT / 2
    difference = torch.where(present, student - teacher, 0.0)
    return difference.square().sum(-1) / present.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class JensenShannon:
    r"""Generalised Jensen–Shannon divergence: between [`forward_kl`] and [`reverse_kl`], bounded.

    .. math::
        L = T^2 \left(\beta \, KL(p \| m) + (1 - \beta) \, KL(q \| m)\right), \quad
        m = \beta p + (1 - \beta) q

    with the predictions p of the teacher and q of the student at temperature T. Robust where the
    two differ much; where they are close its gradient is smaller than that of the others.

    Reference:
        Agarwal et al. 2024, "On-Policy Distillation of Language Models", Eq. 1, arXiv:2306.13649.
        Deviation: times T², as the other divergences here.

    Args:
        beta: Weight of the teacher, between 0 and 1 (both excluded). Its gradient is that of β
            times the forward KL near 0 and of (1 − β) times the reverse KL near 1.

    Shape:
        - logits: (..., C); output: (...), in nats times T², at most T² ln 2 for β = 0.5.

    Raises:
        ValueError: If `beta` is not between 0 and 1.

    Example:
        >>> far = JensenShannon(0.5)(torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]]), 1.0)
        >>> [round(value, 4) for value in far.tolist()]
        [0.6931]
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"JensenShannon(beta={self.beta}): beta must lie between 0 and 1. At the ends the "
                "divergence is 0 for all predictions: use divergence='forward_kl' or 'reverse_kl'."
            )

    def __call__(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        """The divergence of each item."""
        student = _tempered(student_logits, temperature)
        teacher = _tempered(teacher_logits, temperature)
        own, theirs = student.clamp(min=ABSENT), teacher.clamp(min=ABSENT)  # -inf of both is NaN
        mixture = torch.logaddexp(own + math.log1p(-self.beta), theirs + math.log(self.beta))
        from_teacher, from_student = _divergence(teacher, mixture), _divergence(student, mixture)
        return temperature**2 * (self.beta * from_teacher + (1.0 - self.beta) * from_student)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": JensenShannon(0.5),
    "mse": logit_mse,
}
"""The divergences with a name; `JensenShannon(beta)` and any function may be passed too."""


def named_divergence(divergence: str | Divergence) -> Divergence:
    """The divergence of a name; a callable is returned unchanged.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> named_divergence("forward_kl") is forward_kl
        True
    """
    if callable(divergence):
        return divergence
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence={divergence!r} is unknown: use {', '.join(map(repr, DIVERGENCES))}, "
            "JensenShannon(beta), or a function (student_logits, teacher_logits, temperature) -> "
            "one value for each item."
        )
    return DIVERGENCES[divergence]
