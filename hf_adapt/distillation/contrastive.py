"""A contrastive loss on pooled features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.distillation.features import Captured, FeatureLoss, LayerMap, captured_output
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import pool


class Contrastive(FeatureLoss):
    r"""InfoNCE: tell the teacher's feature of the same row from those of the other rows.

    .. math::
        L = -\sum_i \log \frac{\exp(\cos(f(s_i), g(t_i)) / \tau)}
        {\sum_j \exp(\cos(f(s_i), g(t_j)) / \tau)}

    with features s and t that are means over the tokens and learned projections f and g. For
    representations, such as those of a retriever; [`HiddenStates`] gives every token a target.

    The loss couples the rows of a micro-batch: the negatives are those of the micro-batch, also
    with gradient accumulation and several processes, so a larger micro-batch is a harder task.

    Reference:
        Tian et al. 2020, "Contrastive Representation Distillation", arXiv:1910.10699. Deviation:
        the InfoNCE loss over the rows of the batch (van den Oord et al. 2018, arXiv:1807.03748)
        in place of noise-contrastive estimation with a memory of all rows.

    Args:
        weight: Factor within the distillation term, or a schedule of it.
        layers: The pairs of layers: the last ones by default.
        dimension: Size of the projections.
        contrast_temperature: Temperature of the similarities.
        tower: The stack of layers, where a model has several.
        name: Name in the logs.

    Example:
        >>> Contrastive(dimension=64).name
        'contrastive'
    """

    name = "contrastive"
    per_token = False

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        layers: LayerMap = ((-1, -1),),
        dimension: int = 128,
        contrast_temperature: float = 0.1,
        tower: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, layers, None, tower, name)
        if dimension < 1 or not contrast_temperature > 0:
            raise ValueError(
                f"Contrastive(dimension={dimension}, contrast_temperature={contrast_temperature}): "
                "both must be positive."
            )
        self.dimension, self.contrast_temperature = dimension, contrast_temperature

    def build_modules(self, student: Captured, teacher: Captured) -> nn.Module | None:
        """Build a projection of each side for each pair."""
        return nn.ModuleList(
            nn.ModuleList(
                nn.Linear(captured_output(captured, layer).shape[-1], self.dimension)
                for captured, layer in ((student, own), (teacher, theirs))
            )
            for own, theirs in self._modules
        )

    def pair_loss(
        self,
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        mask: torch.Tensor,
        projection: nn.Module | None,
    ) -> torch.Tensor:
        """The sum over rows."""
        assert isinstance(projection, nn.ModuleList)
        own = projection[0](pool(student[0], mask, "mean"))
        theirs = projection[1](pool(teacher[0], mask, "mean"))
        return contrastive_loss(own, theirs, self.contrast_temperature).sum()


def contrastive_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """InfoNCE of each student row: among all teacher rows, find its own.

    Shape:
        - student, teacher: (N, D); output: (N,), in nats.

    Example:
        >>> contrastive_loss(torch.eye(2), torch.eye(2), 1.0).mean().item() < 0.4
        True
    """
    similarity = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).T / temperature
    own = torch.arange(len(student), device=student.device)
    return F.cross_entropy(similarity, own, reduction="none")
