"""What a student may learn from inside its teacher: hidden states, attention, relations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.models.capture import Extract
from hf_adapt.models.layers import Stack, find_stacks
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

if TYPE_CHECKING:
    from hf_adapt.engine.parts import Part

LayerMap = Literal["uniform", "last"] | Sequence[tuple[int, int]] | Mapping[int, int]
"""Which teacher layer each student layer learns from, counted from 0 at the bottom."""

Captured = Mapping[nn.Module, torch.Tensor]
"""What the taps saw, by module."""


def layer_pairs(layers: LayerMap, student: int, teacher: int) -> list[tuple[int, int]]:
    """Pairs of a student layer and the teacher layer it learns from.

    Reference:
        Sun et al. 2019, "Patient Knowledge Distillation for BERT", section 3.2, arXiv:1908.09355
        (`"uniform"` is PKD-skip, `"last"` PKD-last; here the last layers are paired too).

    Args:
        layers: `"uniform"`: student layer i of n learns from teacher layer (i + 1) m / n - 1;
            `"last"`: the student's layers learn from as many of the teacher's last ones; or pairs
            (student, teacher), or a dict of them. Negative numbers count from the top.
        student: Number of the student's layers.
        teacher: Number of the teacher's layers.

    Raises:
        ValueError: If a layer does not exist, or the rule is unknown or does not fit.

    Example:
        >>> layer_pairs("uniform", 3, 12), layer_pairs("last", 2, 6), layer_pairs({-1: -1}, 3, 12)
        ([(0, 3), (1, 7), (2, 11)], [(0, 4), (1, 5)], [(2, 11)])
    """
    if isinstance(layers, str):
        if layers not in ("uniform", "last"):
            raise ValueError(
                f"layers={layers!r} is unknown: use 'uniform', 'last', or pairs "
                "{student layer: teacher layer}."
            )
        if student > teacher:
            raise ValueError(
                f"layers={layers!r}: the student has {student} layers and the teacher only "
                f"{teacher}. Name the pairs: layers={{student layer: teacher layer}}."
            )
        if layers == "last":
            return [(i, teacher - student + i) for i in range(student)]
        return [(i, round((i + 1) * teacher / student) - 1) for i in range(student)]
    pairs = list(layers.items()) if isinstance(layers, Mapping) else [(s, t) for s, t in layers]
    for index, size, whose in [
        *((s, student, "student") for s, _ in pairs),
        *((t, teacher, "teacher") for _, t in pairs),
    ]:
        if not -size <= index < size:
            raise ValueError(
                f"The layer map names layer {index} of the {whose}, which has layers 0 to "
                f"{size - 1} (or -{size} to -1)."
            )
    if not pairs:
        raise ValueError("The layer map is empty: name at least one pair of layers.")
    return [(s % student, t % teacher) for s, t in pairs]


class FeatureLoss:
    """A term on what layers of student and teacher compute: base of the losses below.

    Args:
        weight: Factor within the distillation term, or a schedule of it.
        layers: Which layers learn from which: see [`layer_pairs`].
        layer_weights: Factor of each pair, numbers or schedules; 1 for all by default.
        tower: Which stack of layers, where a model has several (`"encoder"`, `"decoder"`, …): the
            first by default.
        name: What it is logged as.

    Raises:
        ValueError: If a weight is negative, or there are not as many weights as pairs.
    """

    name = "features"
    per_token = True
    sees_feature_maps = True
    """Whether an output (B, C, H, W) is a map of features, whose places are the tokens."""

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        layers: LayerMap = "uniform",
        layer_weights: Sequence[float | Schedule] | None = None,
        tower: str | None = None,
        name: str | None = None,
    ) -> None:
        for value in [weight, *(layer_weights or ())]:
            if not callable(value) and not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{type(self).__name__}: weights must be finite numbers >= 0 or schedules, got "
                    f"{value}."
                )
        self.weight, self.layers, self.layer_weights = weight, layers, layer_weights
        self.tower = tower
        if name is not None:
            self.name = name
        self.pairs: list[tuple[int, int]] = []
        self._is_decoder = False
        self._modules: list[tuple[nn.Module, nn.Module]] = []

    def setup(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the layers.

        Raises:
            ValueError: If a layer does not exist.
        """
        own, theirs = _stack(student, self.tower), _stack(teacher, self.tower)
        self._is_decoder = own.tower == "decoder" and is_encoder_decoder(student)
        self.pairs = layer_pairs(self.layers, len(own.layers), len(theirs.layers))
        if self.layer_weights is not None and len(self.layer_weights) != len(self.pairs):
            raise ValueError(
                f"{type(self).__name__}: {len(self.layer_weights)} layer_weights for "
                f"{len(self.pairs)} pairs of layers {self.pairs}. Give one for each pair."
            )
        students, teachers = dict(student.named_modules()), dict(teacher.named_modules())
        self._modules = [
            (students[own.layers[s]], teachers[theirs.layers[t]]) for s, t in self.pairs
        ]

    def taps(self, layer: nn.Module) -> Mapping[nn.Module, Extract | None]:
        """What to see of a layer; the same of student and teacher."""
        return {layer: None}

    def close(self) -> None:
        """Let go of the models' layers; `setup` finds them again."""
        self._modules = []

    @property
    def student_taps(self) -> dict[nn.Module, Extract | None]:
        """The modules to see of the student."""
        return {m: e for layer, _ in self._modules for m, e in self.taps(layer).items()}

    @property
    def teacher_taps(self) -> dict[nn.Module, Extract | None]:
        """The modules to see of the teacher."""
        return {m: e for _, layer in self._modules for m, e in self.taps(layer).items()}

    def build_modules(self, student: Captured, teacher: Captured) -> nn.Module | None:
        """Projections, from the sizes seen in a first batch."""
        return None

    def token_mask(self, part: Part) -> torch.Tensor | None:
        """(B, T) true on real tokens; None where a row has no tokens that are known beforehand.

        The patches of an image and the frames of audio are: each row then is the mean over its own.
        """
        inputs = part.inputs
        if self._is_decoder:
            mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
            if isinstance(mask, torch.Tensor):
                return mask.bool()
            return labels.ne(IGNORED) if isinstance(labels, torch.Tensor) else None
        ids = inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return None
        mask = part.attention_mask
        return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()

    def num_items(self, part: Part) -> torch.Tensor:
        """How many items of a part the loss sums over: tokens or rows."""
        mask = self.token_mask(part) if self.per_token else None
        return part.domain.new_tensor(len(part.domain)) if mask is None else mask.sum()

    def loss(
        self,
        student: Captured,
        teacher: Captured,
        part: Part,
        module: nn.Module | None,
        progress: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over all items, mean over pairs of layers, and the number of items.

        Args:
            student: What the student's taps saw.
            teacher: What the teacher's taps saw.
            part: The rows.
            module: What `build_modules` returned.
            progress: From 0 to 1.
        """
        known = self.token_mask(part)
        total = torch.zeros((), device=part.domain.device)
        for index, (own, theirs) in enumerate(self._modules):
            weight = 1.0
            if self.layer_weights is not None:
                weight = value_at(self.layer_weights[index], progress)
            if weight:
                projection = module[index] if isinstance(module, nn.ModuleList) else None
                seen_own = [_seen(student, tap) for tap in self.taps(own)]
                device = seen_own[0].device
                seen_theirs = [_seen(teacher, tap).to(device) for tap in self.taps(theirs)]
                mask = known
                if mask is None:
                    if self.sees_feature_maps:
                        seen_own, seen_theirs = _in_tokens(seen_own), _in_tokens(seen_theirs)
                    shape = (len(part.domain), seen_own[0].shape[-2])
                    mask = part.domain.new_ones(shape, dtype=torch.bool)
                elif seen_own[0].shape[-2] != mask.shape[1]:  # a learned prompt comes first
                    seen_own, seen_theirs = _last(seen_own, mask), _last(seen_theirs, mask)
                value = self.pair_loss(seen_own, seen_theirs, mask, projection)
                if known is None and self.per_token:
                    value = value / mask.shape[1]
                total = total + weight * value
        total = total * value_at(self.weight, progress) / len(self._modules)
        return total, self.num_items(part)

    def pair_loss(
        self,
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        mask: torch.Tensor,
        projection: nn.Module | None,
    ) -> torch.Tensor:
        """The sum over the items of one pair of layers."""
        raise NotImplementedError


def _seen(captured: Captured, module: nn.Module) -> torch.Tensor:
    if module not in captured:
        raise ValueError(
            f"A tapped {type(module).__name__} was not run by the forward, or gave no tensor with "
            "one entry per row (reentrant gradient checkpointing hides it: use "
            "gradient_checkpointing_kwargs={'use_reentrant': False})."
        )
    return captured[module]


def _in_tokens(seen: list[torch.Tensor]) -> list[torch.Tensor]:
    """Feature maps (B, C, H, W) as tokens (B, H W, C); anything else as it is."""
    return [
        value.flatten(2).transpose(1, 2) if value.ndim == 4 and value.shape[2] > 0 else value
        for value in seen
    ]


def _last(seen: list[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """The last tokens of hidden states, as many as the mask has."""
    return [value[:, -mask.shape[1] :] if value.ndim == 3 else value for value in seen]


def _stack(model: nn.Module, tower: str | None) -> Stack:
    stacks = find_stacks(model)
    if tower is None:
        return stacks[0]
    for stack in stacks:
        if stack.tower == tower:
            return stack
    raise ValueError(
        f"tower={tower!r} is not in {type(unwrapped_base(model)).__name__}; it has "
        f"{', '.join(repr(stack.tower) for stack in stacks)}."
    )


class HiddenStates(FeatureLoss):
    """Mean squared distance of hidden states, after a learned projection where sizes differ.

    Reference:
        Jiao et al. 2020, "TinyBERT", Eq. 8, arXiv:1909.10351 (`distance="mse"`, all tokens);
        Sun et al. 2019, "Patient Knowledge Distillation", Eq. 7, arXiv:1908.09355
        (`distance="pkd"`: of the first token's normalised states);
        Sanh et al. 2019, "DistilBERT", section 2, arXiv:1910.01108 (`distance="cosine"`).

    Args:
        weight: Factor within the distillation term, or a schedule of it.
        layers: Which layers learn from which: see [`layer_pairs`].
        distance: `"mse"`: mean over dimensions and real tokens; `"cosine"`: one minus the cosine,
            mean over real tokens; `"pkd"`: squared distance of the first token's states, each
            divided by its norm, mean over rows.
        layer_weights: Factor of each pair, numbers or schedules; 1 for all by default.
        project: Always learn a projection, not only where sizes differ (TinyBERT does).
        tower: Which stack of layers, where a model has several.
        name: What it is logged as.

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
        """One projection for each pair, where the sizes differ."""
        sizes = [
            (_seen(student, own).shape[-1], _seen(teacher, theirs).shape[-1])
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
            first = mask.int().argmax(dim=1)
            rows = torch.arange(len(mask), device=mask.device)
            own, theirs = own[rows, first], theirs[rows, first]
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


class Contrastive(FeatureLoss):
    """Each row's pooled feature must tell its teacher's feature of the same row from other rows'.

    It couples the rows of a micro-batch: with gradient accumulation or several processes the
    negatives are those of the micro-batch, so a larger micro-batch is a harder task.

    Reference:
        Tian et al. 2020, "Contrastive Representation Distillation", arXiv:1910.10699. Deviation:
        the InfoNCE loss over the rows of the batch (van den Oord et al. 2018, arXiv:1807.03748)
        in place of noise-contrastive estimation with a memory of all rows.

    Args:
        weight: Factor within the distillation term, or a schedule of it.
        layers: Which layers learn from which: the last by default.
        dimension: Size of the space into which both are projected.
        contrast_temperature: Of the similarities.
        tower: Which stack of layers, where a model has several.
        name: What it is logged as.

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
        """A projection of each side for each pair."""
        return nn.ModuleList(
            nn.ModuleList(
                nn.Linear(_seen(captured, layer).shape[-1], self.dimension)
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
        own = projection[0](_mean(student[0], mask))
        theirs = projection[1](_mean(teacher[0], mask))
        return contrastive_loss(own, theirs, self.contrast_temperature).sum()


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden = hidden.float()
    real = mask.unsqueeze(-1)
    return hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)


def contrastive_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """InfoNCE: of all teacher rows, the one that is the student row's own.

    Shape:
        - student, teacher: (N, D); output: (N,), in nats.

    Example:
        >>> contrastive_loss(torch.eye(2), torch.eye(2), 1.0).mean().item() < 0.4
        True
    """
    similarity = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).T / temperature
    own = torch.arange(len(student), device=student.device)
    return F.cross_entropy(similarity, own, reduction="none")
