"""Supervised contrastive learning: source rows of a class close together, others far apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hf_adapt.alignment.predictions import refuse_heads, refuse_other_problems
from hf_adapt.engine.adaptation import Objective, Term
from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import Pooling

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch


def supervised_contrastive_loss(
    features: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    r"""Cross-entropy of finding the rows of the same class among all others of a batch.

    .. math::
        L = \frac{1}{|A|} \sum_{i \in A} \frac{-1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{e^{z_i \cdot z_p / \tau}}{\sum_{a \neq i} e^{z_i \cdot z_a / \tau}}, \qquad
        z = f / \lVert f \rVert

    P(i) are the other rows of i's class, and A the rows that have one.

    Reference:
        Khosla et al. 2020, "Supervised Contrastive Learning", Eq. 2, arXiv:2004.11362.
        Deviation: rows without another one of their class are left out; with none it is 0.

    Args:
        features: Features of rows, any floating dtype; computed in at least float32.
        labels: Their classes.
        temperature: τ.

    Shape:
        - features: (N, D), labels: (N,); output: (), in nats.

    Raises:
        ValueError: If the shapes do not fit, or the temperature is not positive.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> round(supervised_contrastive_loss(x, torch.tensor([0, 0, 1, 1]), 1.0).item(), 4)
        0.5514
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "supervised_contrastive_loss expects features (N, D) and labels (N,), got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    z = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = (z @ z.T / temperature).masked_fill(itself, torch.finfo(z.dtype).min)
    positive = (same & ~itself).to(z.dtype)
    count = positive.sum(1)
    rows = -(positive * F.log_softmax(scores, dim=1)).sum(1) / count.clamp(min=1)
    return rows.sum() / (count > 0).sum().clamp(min=1)


class SupervisedContrastive(Objective):
    """Supervised contrastive learning: source rows of a class close together, others far apart.

    It gives the features of the source a clearer structure, which helps where labelled rows are few
    and beside methods that look for clusters in the target. The term couples the rows of a
    micro-batch, which needs several rows of each class. It uses no target rows.

    Reference:
        Khosla et al. 2020, "Supervised Contrastive Learning", arXiv:2004.11362; beside the task's
        loss for text: Gunel et al. 2021, arXiv:2011.01403.
        Deviation: no projection head.

    Args:
        weight: Factor of the term, or a schedule of it.
        temperature: Of the similarities. 0.1 is the value of Khosla et al.; 0.3 that of Gunel et
            al.
        feature_layer: Dotted name of the module; by default the base model's last hidden state.
        pooling: `"mean"`, `"cls"`, `"last"`, `"tokens"`, a callable, or `"auto"`.
        name: Prefix of the logs.

    Logs:
        `loss/supervised_contrastive`, `supervised_contrastive/gradient_ratio`.

    Raises:
        ValueError: If the weight is negative, the temperature not positive, or the labels are no
            classes of the features' items.

    Example:
        >>> SupervisedContrastive(temperature=0.3).name
        'supervised_contrastive'
    """

    name = "supervised_contrastive"
    uses_logits = False
    streams = ()

    def __init__(
        self,
        weight: float | Schedule = 0.1,
        temperature: float = 0.1,
        feature_layer: str | None = None,
        pooling: Pooling = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, feature_layer, pooling, name)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive.")
        self.temperature = temperature

    def setup(self, trainer: Trainer) -> None:
        """Refuse a model without classes."""
        refuse_other_problems(trainer.model, "SupervisedContrastive")
        refuse_heads(trainer.model, "SupervisedContrastive", "question_answering")

    def loss(self, batch: Batch) -> Term:
        """The contrastive loss of the labelled rows."""
        refuse_other_problems(batch.model, "SupervisedContrastive")
        features, _ = batch.features()
        labels = batch.labels("features")
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                "SupervisedContrastive needs one class for each row, and the labels have shape "
                f"{tuple(labels.shape)} and dtype {labels.dtype}."
            )
        kept = labels != IGNORED
        term = supervised_contrastive_loss(features[kept], labels[kept], self.temperature)
        return term if bool(kept.any()) else features.sum() * 0.0
