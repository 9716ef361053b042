"""Minimum class confusion: predictions on target rows that do not mix pairs of classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_adapt.alignment.predictions import TargetPredictions, check_logits
from hf_adapt.engine.progress import Schedule


def mcc_loss(target_logits: torch.Tensor, temperature: float = 2.5) -> torch.Tensor:
    r"""How much the classes are confused with each other in the predictions of a batch.

    .. math::
        L = \frac{1}{C} \sum_{j \neq j'} \frac{M_{jj'}}{\sum_{k} M_{jk}}, \qquad
        M = P^\top \mathrm{diag}(w) P, \quad P = \mathrm{softmax}(Z / T), \quad
        w_i = \frac{n (1 + e^{-H(P_i)})}{\sum_{k=1}^{n} (1 + e^{-H(P_k)})}

    The entropies H give confident rows more weight; no gradient flows through w. It needs many more
    rows than classes: use a large micro-batch, or [`EntropyMinimization`], which looks at each row
    alone.

    Reference:
        Jin et al. 2020, "Minimum Class Confusion for Versatile Domain Adaptation", Eq. 2-7,
        arXiv:1912.03699.

    Args:
        target_logits: Scores of each class for target rows, any floating dtype; computed in at
            least float32.
        temperature: T, which keeps confident predictions from hiding the confusion.

    Shape:
        - target_logits: (N, C), N at least 1, C at least 2; output: (), between 0 and 1 - 1/C.

    Raises:
        ValueError: If the shape does not fit, or the temperature is not positive.

    Example:
        >>> round(mcc_loss(torch.zeros(8, 4)).item(), 4)
        0.75
    """
    check_logits("mcc_loss", target_logits)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    dtype = torch.promote_types(target_logits.dtype, torch.float32)
    logp = F.log_softmax(target_logits.to(dtype) / temperature, dim=-1)
    p = logp.exp()
    with torch.no_grad():
        log_weight = torch.log1p(torch.exp((p * logp).sum(-1, keepdim=True)))
    # Row j of M sums to Σ_i w_i p_ij, so M_jk / Σ M_jk = Σ_i a_ij p_ik with a a softmax over the
    # rows: no C × C matrix, and no quotient of two numbers that may underflow.
    share = F.softmax(log_weight + logp, dim=0)
    return (share * (1 - p)).sum(0).mean()


class MCC(TargetPredictions):
    """Minimum class confusion: trains predictions on target rows that do not mix pairs of classes.

    A strong and stable method where the classes of the domains are the same and a micro-batch holds
    several target rows of each. It does not need the domains' features to be alike, so it stands
    changes of class frequencies better than [`MMD`] or [`DANN`]. With many classes and small
    batches use [`EntropyMinimization`] or [`InformationMaximization`].

    Reference:
        Jin et al. 2020, "Minimum Class Confusion for Versatile Domain Adaptation",
        arXiv:1912.03699.

    Args:
        weight: Factor of the term, or a schedule of it. 1 is the authors' value.
        temperature: Softmax temperature.
        name: Prefix of the logs.

    Logs:
        `loss/mcc`.

    Raises:
        ValueError: If the weight is negative or the temperature not positive.

    Example:
        >>> MCC(weight=0.5).name
        'mcc'
    """

    name = "mcc"

    def __init__(
        self, weight: float | Schedule = 1.0, temperature: float = 2.5, name: str | None = None
    ) -> None:
        super().__init__(weight, name=name)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive.")
        self.temperature = temperature

    def batch_term(self, target_logits: torch.Tensor) -> torch.Tensor:
        """The confusion of classes in the micro-batch."""
        return mcc_loss(target_logits, self.temperature)
