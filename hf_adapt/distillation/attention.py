"""Losses on attention: relations of queries, keys and values, and attention maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from hf_adapt.distillation.features import FeatureLoss, LayerMap
from hf_adapt.engine.progress import Schedule
from hf_adapt.models.attention import attention_probabilities, attention_projections, is_joint
from hf_adapt.models.capture import Extract


class SelfAttentionRelations(FeatureLoss):
    r"""KL divergence between the relations of tokens: the self-similarities of q, k and v.

    .. math::
        L = \frac{1}{R H} \sum_{r \in \{q, k, v\}} \sum_{h} \sum_i
        KL\!\left(\sigma\!\left(\tfrac{t_{rh} t_{rh}^\top}{\sqrt{d}}\right)_i \,\middle\|\,
        \sigma\!\left(\tfrac{s_{rh} s_{rh}^\top}{\sqrt{d}}\right)_i\right)

    with R relations, H relation heads of size d and the softmax over the real tokens. It captures
    the outputs of the q/k/v projections, so SDPA and flash attention stay on, and needs no equal
    sizes or numbers of heads. Usually the best choice for a narrower student; [`HiddenStates`]
    fits one that was started from the teacher's layers.

    The last layer (or a late one of the teacher) is usually best:
    `layers={-1: -1}`, the default.

    Reference:
        Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation", Eq. 4 to 6,
        arXiv:2012.15828.

    Args:
        weight: Factor within the distillation term, or a schedule of it.
        layers: The pairs of layers: see [`layer_pairs`].
        relations: Some of `"query"`, `"key"`, `"value"`, each with itself.
        num_heads: Number of relation heads, into which the projections are split again; must
            divide the sizes of both models' projections. MiniLMv2 uses 48 for BERT-base.
        layer_weights: Factor of each pair, numbers or schedules.
        tower: The stack of layers, where a model has several.
        name: Name in the logs.

    Raises:
        ValueError: If a relation is unknown.

    Example:
        >>> SelfAttentionRelations(num_heads=12).relations
        ('query', 'key', 'value')
    """

    name = "relations"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        layers: LayerMap = ((-1, -1),),
        relations: Sequence[str] = ("query", "key", "value"),
        num_heads: int = 12,
        layer_weights: Sequence[float | Schedule] | None = None,
        tower: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, layers, layer_weights, tower, name)
        unknown = set(relations) - {"query", "key", "value"}
        if unknown or not relations or num_heads < 1:
            raise ValueError(
                f"relations={relations!r}, num_heads={num_heads}: expected some of 'query', 'key' "
                "and 'value', and at least one head."
            )
        self.relations, self.num_heads = tuple(relations), num_heads

    def captures(self, layer: nn.Module) -> Mapping[nn.Module, Extract | None]:
        """The projections, in the order of `relations`."""
        found = attention_projections(layer, self.relations)
        joint = {module for name, module in layer.named_modules() if is_joint(name)}
        return {module: self._chosen if module in joint else None for module in found}

    def _chosen(self, output: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The queries, keys and values in `relations`, of one projection's output."""
        parts = dict(zip(("query", "key", "value"), output.chunk(3, dim=-1), strict=True))
        return torch.cat([parts[name] for name in self.relations], dim=-1), None

    def pair_loss(
        self,
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        mask: torch.Tensor,
        projection: nn.Module | None,
    ) -> torch.Tensor:
        """The sum over query tokens of the mean over heads and relations."""
        own, theirs = self._split(student), self._split(teacher)
        total = mask.new_zeros((), dtype=torch.float32)
        for a, b in zip(own, theirs, strict=True):
            values = relation_divergence(a.float(), b.float(), mask, self.num_heads)
            total = total + values[mask].sum()
        return total / len(own)

    def _split(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """One tensor for each relation, also where one projection computes all of them."""
        if len(outputs) == len(self.relations):
            return outputs
        return list(outputs[0].chunk(len(self.relations), dim=-1))


def relation_divergence(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """KL(teacher ‖ student) of each token's relation to all tokens, mean over relation heads.

    Args:
        student: Queries, keys or values of all heads.
        teacher: The teacher's, of any size.
        mask: True on real tokens.
        num_heads: Number of relation heads.

    Shape:
        - student: (B, T, D_s), teacher: (B, T, D_t), mask: (B, T); output: (B, T), in nats.

    Raises:
        ValueError: If the heads do not divide a size.

    Example:
        >>> x = torch.randn(1, 3, 4)
        >>> relation_divergence(x, x, torch.ones(1, 3, dtype=torch.bool), 2).abs().max().item()
        0.0
    """

    def relations(vectors: torch.Tensor) -> torch.Tensor:
        rows, tokens, size = vectors.shape
        if size % num_heads:
            raise ValueError(
                f"{num_heads} relation heads do not divide the projection's size {size}. Choose "
                "num_heads that divides both models' sizes."
            )
        heads = vectors.view(rows, tokens, num_heads, -1).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / math.sqrt(size / num_heads)
        return scores.masked_fill(~mask[:, None, None, :], -1e9).log_softmax(-1)

    own, theirs = relations(student), relations(teacher)
    return (theirs.exp() * (theirs - own)).sum(-1).mean(1)


class AttentionMaps(FeatureLoss):
    r"""Distance of attention probabilities, where student and teacher have as many heads.

    .. math::
        d_{kl} = \frac{1}{H} \sum_h \sum_j A^t_{hij} \log \frac{A^t_{hij}}{A^s_{hij}}, \quad
        d_{mse} = \frac{1}{H T} \sum_h \sum_j (A^t_{hij} - A^s_{hij})^2

    Needs `attn_implementation="eager"` in both models, because fused attention never has the
    probabilities; [`SelfAttentionRelations`] does without.

    Reference:
        Sun et al. 2020, "MobileBERT", section 3.3, arXiv:2004.02984 (`distance="kl"`);
        Jiao et al. 2020, "TinyBERT", Eq. 7, arXiv:1909.10351 (`distance="mse"`). Deviation: of
        the probabilities, not of the scores before the softmax, which models do not give.

    Args:
        weight: Factor within the distillation term, or a schedule of it.
        layers: The pairs of layers: see [`layer_pairs`].
        distance: `"kl"`: KL(teacher ‖ student) of each token's attention; `"mse"`.
        layer_weights: Factor of each pair, numbers or schedules.
        tower: The stack of layers, where a model has several.
        name: Name in the logs.

    Raises:
        ValueError: If `distance` is unknown.

    Example:
        >>> AttentionMaps(distance="mse").name
        'attention_maps'
    """

    name = "attention_maps"
    sees_feature_maps = False

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        layers: LayerMap = "uniform",
        distance: Literal["kl", "mse"] = "kl",
        layer_weights: Sequence[float | Schedule] | None = None,
        tower: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, layers, layer_weights, tower, name)
        if distance not in ("kl", "mse"):
            raise ValueError(f"distance={distance!r} is unknown: use 'kl' or 'mse'.")
        self.distance: Literal["kl", "mse"] = distance

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the layers; refuse attention that computes no probabilities."""
        for model, whose in ((student, "student"), (teacher, "teacher")):
            found = getattr(getattr(model, "config", None), "_attn_implementation", None)
            if found not in ("eager", None):
                raise ValueError(
                    f"AttentionMaps needs attention probabilities, which attn_implementation="
                    f"{found!r} of the {whose} never computes. Load both models with "
                    "attn_implementation='eager', or use SelfAttentionRelations."
                )
        super().setup(student, teacher)

    def captures(self, layer: nn.Module) -> Mapping[nn.Module, Extract | None]:
        """The module whose output holds the probabilities."""
        return attention_probabilities(layer)

    def pair_loss(
        self,
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        mask: torch.Tensor,
        projection: nn.Module | None,
    ) -> torch.Tensor:
        """The sum over query tokens."""
        values = attention_distance(student[0], teacher[0], mask, self.distance)
        return values[mask].sum()


def attention_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    distance: Literal["kl", "mse"],
) -> torch.Tensor:
    """Distance of the attention of each token to the real tokens, mean over heads.

    Shape:
        - student, teacher: (B, heads, T, T), mask: (B, T); output: (B, T), in nats for `"kl"`.

    Raises:
        ValueError: If the numbers of heads differ.

    Example:
        >>> even = torch.full((1, 2, 2, 2), 0.5)
        >>> attention_distance(even, even, torch.ones(1, 2, dtype=torch.bool), "kl").tolist()
        [[0.0, 0.0]]
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's attention has shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}: AttentionMaps needs as many heads. Use "
            "SelfAttentionRelations, which does not."
        )
    own, theirs = student.float(), teacher.float()
    keys = mask[:, None, None, :]
    if distance == "mse":
        squared = (own - theirs).square().masked_fill(~keys, 0.0).sum(-1)
        return (squared / keys.sum(-1)).mean(1)
    tiny = torch.finfo(torch.float32).tiny
    log_ratio = theirs.clamp(min=tiny).log() - own.clamp(min=tiny).log()
    return (theirs * log_ratio).masked_fill(~keys, 0.0).sum(-1).mean(1)
