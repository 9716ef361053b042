"""Losses on what layers of student and teacher compute: their base class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.progress import Schedule, value_at
from hf_adapt.models.capture import Extract
from hf_adapt.models.layers import Stack, find_stacks
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

if TYPE_CHECKING:
    from hf_adapt.engine.parts import Part

LayerMap = Literal["uniform", "last"] | Sequence[tuple[int, int]] | Mapping[int, int]
"""The teacher layer that each student layer learns from, counted from 0 at the bottom."""

Captured = Mapping[nn.Module, torch.Tensor]
"""The captured outputs, by module."""


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
    r"""The base class of losses on what layers of student and teacher compute.

    .. math::
        L = \frac{w}{P} \sum_{p=1}^{P} w_p \sum_i d(s_{p,i}, t_{p,i})

    with P pairs of layers and items i (tokens or rows), divided by the number of items in the
    whole optimizer step.

    Args:
        weight: Factor w within the distillation term, or a schedule of it.
        layers: The pairs of layers: see [`layer_pairs`].
        layer_weights: Factor of each pair, numbers or schedules; 1 for all by default.
        tower: The stack of layers, where a model has several (`"encoder"`, `"decoder"`, …): the
            first by default.
        name: Name in the logs.

    Raises:
        ValueError: If a weight is negative, or there are not as many weights as pairs.
    """

    name = "features"
    per_token = True
    sees_feature_maps = True
    """Whether an output (B, C, H, W) is a feature map, whose positions are the tokens."""

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
        """Find the layers of both models.

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

    def captures(self, layer: nn.Module) -> Mapping[nn.Module, Extract | None]:
        """The modules of a layer whose outputs are captured, of student and teacher alike."""
        return {layer: None}

    def close(self) -> None:
        """Release the models' layers; `setup` finds them again."""
        self._modules = []

    @property
    def student_captures(self) -> dict[nn.Module, Extract | None]:
        """The modules of the student that are captured."""
        return {m: e for layer, _ in self._modules for m, e in self.captures(layer).items()}

    @property
    def teacher_captures(self) -> dict[nn.Module, Extract | None]:
        """The modules of the teacher that are captured."""
        return {m: e for _, layer in self._modules for m, e in self.captures(layer).items()}

    def build_modules(self, student: Captured, teacher: Captured) -> nn.Module | None:
        """Build projections from the sizes in a first batch."""
        return None

    def token_mask(self, part: Part) -> torch.Tensor | None:
        """(B, T) true on real tokens; None where the number of tokens is not known beforehand.

        That holds for the patches of an image and the frames of audio: each row is then the mean
        over its own tokens.
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
        """The number of items of a micro-batch that the loss sums over: tokens or rows."""
        mask = self.token_mask(part) if self.per_token else None
        return part.domain.new_tensor(len(part.domain)) if mask is None else mask.sum()

    def loss(
        self,
        student: Captured,
        teacher: Captured,
        part: Part,
        module: nn.Module | None,
        progress: float,
    ) -> torch.Tensor:
        """The sum over all items, as a mean over the pairs of layers.

        Args:
            student: The student's captured outputs.
            teacher: The teacher's captured outputs.
            part: The micro-batch.
            module: The output of `build_modules`.
            progress: From 0 to 1.
        """
        known = self.token_mask(part)
        total = torch.zeros((), device=part.domain.device)
        for index, (own, theirs) in enumerate(self._modules):
            weight = 1.0
            if self.layer_weights is not None:
                weight = value_at(self.layer_weights[index], progress)
            if not weight:
                continue
            projection = module[index] if isinstance(module, nn.ModuleList) else None
            outputs = self._outputs(student, own)
            targets = [value.to(outputs[0].device) for value in self._outputs(teacher, theirs)]
            outputs, targets, mask = self._tokens(outputs, targets, known, len(part.domain))
            value = self.pair_loss(outputs, targets, mask, projection)
            if known is None and self.per_token:
                value = value / mask.shape[1]
            total = total + weight * value
        return total * value_at(self.weight, progress) / len(self._modules)

    def _outputs(self, captured: Captured, layer: nn.Module) -> list[torch.Tensor]:
        return [captured_output(captured, module) for module in self.captures(layer)]

    def _tokens(
        self,
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        mask: torch.Tensor | None,
        rows: int,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """The outputs and the mask, with the same tokens."""
        if mask is None:
            if self.sees_feature_maps:
                student, teacher = _in_tokens(student), _in_tokens(teacher)
            shape = (rows, student[0].shape[-2])
            return student, teacher, torch.ones(shape, dtype=torch.bool, device=student[0].device)
        if student[0].shape[-2] != mask.shape[1]:  # a learned prompt comes first
            student, teacher = _last(student, mask), _last(teacher, mask)
        return student, teacher, mask

    def pair_loss(
        self,
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        mask: torch.Tensor,
        projection: nn.Module | None,
    ) -> torch.Tensor:
        """The sum over the items of one pair of layers."""
        raise NotImplementedError


def captured_output(captured: Captured, module: nn.Module) -> torch.Tensor:
    """The captured output of a module.

    Raises:
        ValueError: If it was not captured.
    """
    if module not in captured:
        raise ValueError(
            f"The output of a {type(module).__name__} was not captured: the forward did not run "
            "it, or its output is no tensor with one entry per row (reentrant gradient "
            "checkpointing hides it: use gradient_checkpointing_kwargs={'use_reentrant': False})."
        )
    return captured[module]


def _in_tokens(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Feature maps (B, C, H, W) as tokens (B, H W, C); other outputs unchanged."""
    return [
        value.flatten(2).transpose(1, 2) if value.ndim == 4 and value.shape[2] > 0 else value
        for value in outputs
    ]


def _last(outputs: list[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """The last tokens of hidden states, as many as the mask has."""
    return [value[:, -mask.shape[1] :] if value.ndim == 3 else value for value in outputs]


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
