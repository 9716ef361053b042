"""Batch nuclear-norm maximisation: predictions on target rows that are confident and diverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_adapt.alignment.predictions import TargetPredictions, check_logits
from hf_adapt.engine.progress import Schedule


def bnm_loss(target_logits: torch.Tensor) -> torch.Tensor:
    r"""The negative nuclear norm of the predictions of a batch, per row.

    .. math::
        L = -\frac{1}{N} \lVert P \rVert_* = -\frac{1}{N} \sum_{k} \sigma_k(P), \qquad
        P = \mathrm{softmax}(Z)

    Minimising it makes predictions confident (the Frobenius norm grows) and diverse (the rank
    grows). Diverse does not mean equally frequent, so it stands unequal class frequencies better
    than [`InformationMaximization`].

    Reference:
        Cui et al. 2020, "Towards Discriminability and Diversity: Batch Nuclear-norm Maximization
        under Label Insufficient Situations", Eq. 8, arXiv:2003.12237.
        Deviation: where singular values are 0 the gradient is the subgradient of the smallest
        norm, so that it does not depend on how the decomposition chose their vectors.

    Args:
        target_logits: Scores of each class for target rows, any floating dtype; computed in at
            least float32.

    Shape:
        - target_logits: (N, C), N at least 1, C at least 2; output: (), at least -1.

    Raises:
        ValueError: If the shape does not fit.

    Example:
        >>> round(bnm_loss(torch.tensor([[50.0, 0.0], [0.0, 50.0]])).item(), 4)
        -1.0
    """
    check_logits("bnm_loss", target_logits)
    dtype = torch.promote_types(target_logits.dtype, torch.float32)
    p = F.softmax(target_logits.to(dtype), dim=-1)
    if not bool(torch.isfinite(p).all()):
        return p.sum() * torch.nan  # the decomposition would raise; a term of NaN is reported
    u, sigma, vh = torch.linalg.svd(p.detach(), full_matrices=False)
    kept = sigma > sigma[0] * max(p.shape) * torch.finfo(dtype).eps
    # ⟨U Vᵀ, P⟩ = Σ σ, and U Vᵀ is its gradient: nothing is divided by differences of σ.
    norm: torch.Tensor = ((u * kept) @ vh * p).sum()
    return -norm / len(p)


class BNM(TargetPredictions):
    """Batch nuclear-norm maximisation: trains confident predictions that use all classes.

    Like [`InformationMaximization`] it sharpens predictions and keeps them from collapsing into one
    class, without asking for equally frequent classes. It needs several rows of each class in a
    micro-batch; a decomposition of an (N, C) matrix is its cost.

    Reference:
        Cui et al. 2020, "Towards Discriminability and Diversity: Batch Nuclear-norm Maximization
        under Label Insufficient Situations", arXiv:2003.12237.

    Args:
        weight: Factor of the term, or a schedule of it. The authors' 1 put most rows into one class
            on text.
        name: Prefix of the logs.

    Logs:
        `loss/bnm`.

    Raises:
        ValueError: If the weight is negative.

    Example:
        >>> BNM(weight=0.5).name
        'bnm'
    """

    name = "bnm"

    def __init__(self, weight: float | Schedule = 0.3, name: str | None = None) -> None:
        super().__init__(weight, name=name)

    def batch_term(self, target_logits: torch.Tensor) -> torch.Tensor:
        """The negative nuclear norm of the micro-batch's predictions."""
        return bnm_loss(target_logits)
