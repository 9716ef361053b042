"""R-Drop: predictions that dropout leaves alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hf_adapt.alignment.predictions import ClassPredictions, check_logits
from hf_adapt.engine.adaptation import Term

if TYPE_CHECKING:
    from hf_adapt.engine.batch import Batch, Rows

logger = logging.getLogger(__name__)


def rdrop_loss(
    logits: torch.Tensor, other_logits: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    r"""Symmetric divergence of two predictions of the same rows.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{2} \big( KL(p_i \,\|\, q_i) + KL(q_i \,\|\, p_i)
            \big), \qquad p = \mathrm{softmax}(z), \quad q = \mathrm{softmax}(z')

    Reference:
        Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", Eq. 2,
        arXiv:2106.14448.

    Args:
        logits: Scores of each class, any floating dtype; computed in at least float32.
        other_logits: Scores of the same rows in another forward.
        reduction: `"mean"` over the rows, or `"sum"`.

    Shape:
        - logits, other_logits: (N, C); output: (), in nats.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> rdrop_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
        0.0
    """
    check_logits("rdrop_loss", logits)
    if logits.shape != other_logits.shape:
        raise ValueError(
            f"rdrop_loss expects two predictions of the same rows, got {tuple(logits.shape)} and "
            f"{tuple(other_logits.shape)}."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    one, other = (F.log_softmax(z.to(dtype), dim=-1) for z in (logits, other_logits))
    rows = ((one.exp() - other.exp()) * (one - other)).sum(-1) / 2
    return rows.sum() if reduction == "sum" else rows.mean()


class RDrop(ClassPredictions):
    """R-Drop: trains predictions that agree between two forwards with different dropout.

    A regulariser for small data that composes with every method; it needs no labels and is trained
    on source and target rows. It costs one further forward of all rows and does nothing in a model
    without dropout. [`VAT`] perturbs each row in its worst direction, at twice the cost.

    Reference:
        Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", arXiv:2106.14448.
        Deviation: the divergence alone; the task's loss is computed on the first forward only. It
        is averaged over all rows of an optimizer step, where the authors' code adds them up, so
        that their α of 5 for a batch of 32 sentences is no weight to copy.

    Args:
        weight: Factor of the term, or a schedule of it.
        name: Prefix of the logs.

    Logs:
        `loss/rdrop`.

    Raises:
        ValueError: If the weight is negative, or the model has no exclusive classes.

    Example:
        >>> RDrop(weight=0.5).name
        'rdrop'
    """

    name = "rdrop"
    _warned = False

    def num_items(self, rows: Rows) -> torch.Tensor:
        """Every row (or token) has a prediction."""
        return rows.num_predictions()

    def loss(self, batch: Batch) -> Term:
        """The divergence of two forwards, summed over the rows."""
        logits, _ = self.class_logits(batch)
        other, _ = self.class_logits(batch.forward())
        count = torch.as_tensor(len(logits), device=logits.device)
        return rdrop_loss(logits, other, reduction="sum"), count

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Warn if the term can only be 0."""
        if logs.get(f"loss/{self.name}") == 0 and not self._warned:
            self._warned = True
            logger.warning(
                "%s: two forwards gave the same predictions, so the term does nothing. Set the "
                "dropout probabilities in the model's config, or use VAT.",
                self.name,
            )
