"""A loss on hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.distillation.features import Captured, FeatureLoss, LayerMap, captured_output
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.pooling import pool


class HiddenStates(FeatureLoss):
    r"""Distance of hidden states, after a learned projection where sizes differ.

    .. math::
        d_{mse} = \frac{1}{D} \lVert W s - t \rVert^2, \quad
        d_{cosine} = 1 - \frac{s \cdot t}{\lVert s \rVert \lVert t \rVert}, \quad
        d_{pkd} = \left\lVert \frac{s}{\lVert s \rVert} - \frac{t}{\lVert t \rVert}
        \right\rVert^2

    The choice for a student with the teacher's width, or started from its layers. With another
    width or depth [`SelfAttentionRelations`] usually needs no tuning of layers.

    Reference:
        Jiao et al. 2020, "TinyBERT", Eq. 8, arXiv:1909.10351 (`distance="mse"`, all tokens);
        Sun et al. 2019, "Patient Knowledge Distillation", Eq. 7, arXiv:1908.09355
        (`distance="pkd"`: of the first token's normalised states);
        Sanh et al. 2019, "DistilBERT", section 2, arXiv:1910.01108 (`distance="cosine"`).

    Args:
        weight: Factor within the distillation term, or a schedule of it.
        layers: The pairs of layers: see [`layer_pairs`].
        distance: `"mse"`: mean over dimensions and real tokens; `"cosine"`: one minus the cosine,
            mean over real tokens; `"pkd"`: squared distance of the first token's states, each
            divided by its norm, mean over rows.
        layer_weights: Factor of each pair, numbers or schedules; 1 for all by default.
        project: Always learn a projection, not only where sizes differ (TinyBERT does).
        tower: The stack of layers, where a model has several.
        name: Name in the logs.

    Raises:
        ValueError: If `distance` is unknown.

    Example:
        >>> HiddenStates(distance="pkd", layers="last").name
        'hidden_states'
    """

    name = "hidden_states"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        layers: LayerMap = "uniform",
        distance: Literal["mse", "cosine", "pkd"] = "mse",
        layer_weights: Sequence[float | Schedule] | None = None,
        project: bool = False,
        tower: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, layers, layer_weights, tower, name)
        if distance not in ("mse", "cosine", "pkd"):
            raise ValueError(f"distance={distance!r} is unknown: use 'mse', 'cosine' or 'pkd'.")
        self.distance, self.project = distance, project
        self.per_token = distance != "pkd"

    def build_modules(self, student: Captured, teacher: Captured) -> nn.Module | None:
        """Build a projection for each pair, where the sizes differ."""
        sizes = [
            (captured_output(student, own).shape[-1], captured_output(teacher, theirs).shape[-1])
            for own, theirs in self._modules
        ]
        if not self.project and all(own == theirs for own, theirs in sizes):
            return None
        return nn.ModuleList(nn.Linear(own, theirs, bias=False) for own, theirs in sizes)

    def pair_loss(
        self,
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        mask: torch.Tensor,
        projection: nn.Module | None,
    ) -> torch.Tensor:
        """The sum over tokens (rows for PKD)."""
        own, theirs = student[0].float(), teacher[0].float()
        if self.distance == "pkd":
            own, theirs = pool(own, mask, "cls"), pool(theirs, mask, "cls")
        else:
            own, theirs = own[mask], theirs[mask]
        if projection is not None:
            own = projection(own)
        return hidden_distance(own, theirs, self.distance).sum()


def hidden_distance(
    student: torch.Tensor, teacher: torch.Tensor, distance: Literal["mse", "cosine", "pkd"]
) -> torch.Tensor:
    """The distance of each pair of vectors; see [`HiddenStates`].

    Shape:
        - student, teacher: (N, D); output: (N,).

    Example:
        >>> a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> [hidden_distance(a, b, how).item() for how in ("mse", "cosine", "pkd")]
        [6.5, 1.0, 2.0]
    """
    if distance == "mse":
        return (student - teacher).square().mean(-1)
    if distance == "cosine":
        return 1.0 - F.cosine_similarity(student, teacher, dim=-1)
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)
