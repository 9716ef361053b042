"""A micro-batch as an objective sees it: its rows, their domains, features and logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.models.pooling import (
    Pooling,
    pool,
    resolve_pooling,
    token_mask,
    without_virtual_tokens,
)
from hf_adapt.models.structure import is_encoder_decoder

if TYPE_CHECKING:
    from typing import Self

    from hf_adapt.engine.adaptation import Objective
    from hf_adapt.engine.metrics import MetricAverager


@dataclass
class Part:
    """The rows that went through the model in one forward.

    Attributes:
        inputs: What the model was given, without the domain column.
        domain: (B,) long, 0 for source rows.
        hidden: The captured output of each tapped feature module, by the module's id.
        masks: The attention mask that belongs to such an output, where it has one of its own.
        outputs: The model's own outputs.
        columns: Columns that an adaptation asked for, one value per row.
        extra: Inputs that an adaptation asked for and the model does not take.
        is_fused: Whether the loss was computed without logits.
        cache: What an adaptation computed for these rows and needs again, by a key of its own.
    """

    inputs: Mapping[str, Any]
    domain: torch.Tensor
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    masks: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: Any = None
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    is_fused: bool = False
    cache: dict[Any, Any] = field(default_factory=dict, init=False)

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """(B, T) with 1 on real tokens, or None where the model has no mask."""
        mask = self.inputs.get("attention_mask")
        return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    def own_tokens(self, hidden: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """A value per token, without the virtual tokens of a learned prompt."""
        tokens = self.inputs.get("input_ids", self.attention_mask)
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2:
            return hidden
        return without_virtual_tokens(hidden, tokens.shape[1], model)

    @property
    def num_choices(self) -> int:
        """Sequences of a row: several in multiple choice, whose models take each as a row."""
        ids = self.inputs.get("input_ids")
        return ids.shape[1] if isinstance(ids, torch.Tensor) and ids.ndim == 3 else 1

    @property
    def token_counts(self) -> torch.Tensor:
        """(B,) the number of real tokens in each row, all its choices together."""
        mask, ids = self.inputs.get("attention_mask"), self.inputs.get("input_ids")
        if isinstance(mask, torch.Tensor) and mask.ndim in (2, 3):
            return mask.flatten(1).sum(1)
        if not isinstance(ids, torch.Tensor) or ids.ndim not in (2, 3):
            raise ValueError(
                "Counting tokens needs an attention_mask or input_ids in the batch; it has "
                f"{', '.join(self.inputs)}. Use another pooling than 'tokens'."
            )
        return torch.full((ids.shape[0],), ids[0].numel(), device=ids.device)

    @property
    def logits(self) -> torch.Tensor:
        """The model's logits."""
        outputs = self.outputs
        if self.is_fused:
            raise ValueError(
                "This batch's loss was computed without logits, and an objective that said "
                "uses_logits = False asked for them. Set uses_logits = True in its class."
            )
        if isinstance(outputs, Mapping):
            logits = outputs.get("logits", outputs.get("scores"))  # "scores": a cross-encoder's
        elif isinstance(outputs, (tuple, list)):
            logits = next((o for o in outputs if isinstance(o, torch.Tensor) and o.ndim >= 2), None)
        else:
            logits = getattr(outputs, "logits", None)
        if not isinstance(logits, torch.Tensor):
            found = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(
                f"The model's outputs hold no logits (found {found}), and this objective needs "
                "predictions. Use it on a classification head, or an objective on features."
            )
        return logits


@dataclass
class Layout:
    """What a run knows of its model's outputs; the first batch is looked at to learn it.

    Attributes:
        model: The unwrapped model.
        num_domains: Number of domains, the source included.
        module_of: The module behind each feature layer, or why there is none.
        token_features: Ids of the modules whose output has one vector per token.
        choice_features: Ids of the modules whose output has one entry per choice of a row.
        token_logits: Whether the model predicts per token rather than per row.
        may_be_frozen: Whether an adaptation freezes parts of the model for a while.
    """

    model: nn.Module
    num_domains: int = 1
    module_of: dict[str | None, nn.Module | ValueError] = field(default_factory=dict)
    token_features: set[int] = field(default_factory=set)
    choice_features: set[int] = field(default_factory=set)
    token_logits: bool = False
    may_be_frozen: bool = False

    def learn(self, parts: list[Part]) -> None:
        """Take the number of dimensions from a first forward."""
        for part in parts:
            rows, hidden = len(part.domain), part.hidden.items()
            self.token_features |= {key for key, h in hidden if h.ndim == 3}
            self.choice_features |= {key for key, h in hidden if len(h) > rows}
            try:
                self.token_logits = self.token_logits or part.logits.ndim == 3
            except ValueError:
                continue  # no logits; an objective that needs them says so


class Rows:
    """The rows of a micro-batch and their domains: what is known before the forward.

    Attributes:
        parts: One part, or two when source and target go through the model separately.
        model: The unwrapped model.
        num_domains: Number of domains of the run, the source included.
    """

    def __init__(self, parts: list[Part], layout: Layout) -> None:
        self.parts = parts
        self.model = layout.model
        self.num_domains = layout.num_domains
        self._layout = layout
        self._objective: Objective | None = None

    def for_objective(self, objective: Objective) -> Self:
        """The same rows, as seen with this objective's feature layer, pooling and name."""
        bound = copy.copy(self)
        bound._objective = objective
        return bound

    @property
    def domain(self) -> torch.Tensor:
        """(B,) long: 0 for source rows, 1 and up for the target domains."""
        return torch.cat([part.domain for part in self.parts])

    @property
    def pooling(self) -> Pooling:
        """How this objective pools, with `"auto"` resolved for the model."""
        return resolve_pooling(self._objective.pooling if self._objective else "auto", self.model)

    def num_features(self, target_only: bool = False) -> torch.Tensor:
        """How many items `features()` has, as a tensor: rows, or tokens with pooling tokens."""
        layer = self._objective.feature_layer if self._objective else None
        module = id(self._layout.module_of.get(layer))
        if self.pooling == "tokens" and module in self._layout.token_features:
            return self._count(True, target_only)
        return self._count(False, target_only, module in self._layout.choice_features)

    def num_predictions(self, target_only: bool = False) -> torch.Tensor:
        """How many items `logits()` has, as a tensor: rows, or tokens for token heads."""
        return self._count(self._layout.token_logits, target_only)

    def _count(self, tokens: bool, target_only: bool, choices: bool = False) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.long, device=self.parts[0].domain.device)
        for part in self.parts:
            ones = torch.full_like(part.domain, part.num_choices if choices else 1)
            per_row = part.token_counts if tokens else ones
            total = total + (per_row * (part.domain > 0) if target_only else per_row).sum()
        return total


class Batch(Rows):
    """One training micro-batch after the forward, as an objective sees it.

    Attributes:
        progress: `global_step / max_steps`.
    """

    def __init__(
        self,
        parts: list[Part],
        layout: Layout,
        progress: float,
        metrics: MetricAverager,
    ) -> None:
        super().__init__(parts, layout)
        self.progress = progress
        self._metrics = metrics

    def features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pooled features and the domain of each, source and target rows together.

        Shape:
            - features: (N, D) float32, N rows (or real tokens with pooling `"tokens"`);
              domain: (N,) long, 0 for the source. In multiple choice each choice is a row.

        Raises:
            ValueError: If the feature layer cannot be found, was not run by the forward, or gave
                a tensor that no gradient can flow through.
        """
        layer = self._objective.feature_layer if self._objective else None
        module = self._layout.module_of[layer]
        if isinstance(module, ValueError):
            raise module
        features, domains = [], []
        for part in self.parts:
            if id(module) not in part.hidden:
                raise ValueError(
                    f"The feature layer ({layer or 'the base model'}: {type(module).__name__}) "
                    f"captured nothing for the {len(part.domain)} rows of this batch: the loss "
                    "was computed without running it, or its output holds no tensor with one "
                    "entry per row. Pass feature_layer= with a module that the loss runs."
                )
            hidden = self._observed(part.hidden[id(module)])
            domain = part.domain
            if len(hidden) > len(domain):
                domain = domain.repeat_interleave(part.num_choices)
            mask = torch.ones_like(domain, dtype=torch.bool)
            if hidden.ndim == 3:
                given = part.attention_mask
                given = part.masks.get(id(module)) if given is None else given
                hidden = part.own_tokens(hidden, self.model)
                mask = token_mask(hidden, given, self.model)
            features.append(pool(hidden, mask, self.pooling))
            tokens = self.pooling == "tokens" and hidden.ndim == 3
            domains.append(domain.repeat_interleave(mask.sum(1)) if tokens else domain)
        return torch.cat(features), torch.cat(domains)

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions and the domain of each; for token heads one per real token.

        Shape:
            - logits: (N, C) float32; domain: (N,) long, 0 for the source.

        Raises:
            ValueError: If the model gives no logits, or is an encoder-decoder, whose unlabelled
                rows have no decoder tokens to predict.
        """
        logits, domains = [], []
        for part in self.parts:
            values, domain = part.logits.float(), part.domain
            if values.ndim == 3:
                if is_encoder_decoder(self.model):
                    raise ValueError(
                        "An objective on predictions needs target rows with predictions, and the "
                        "decoder of an encoder-decoder has none for unlabelled rows. Use an "
                        "objective on features (DANN, MMD)."
                    )
                values = part.own_tokens(values, self.model)
                mask = token_mask(values, part.attention_mask, self.model)
                values, domain = values[mask], domain.repeat_interleave(mask.sum(1))
            logits.append(values)
            domains.append(domain)
        return torch.cat(logits), torch.cat(domains)

    def log(
        self, name: str, value: torch.Tensor | float, count: torch.Tensor | float = 1.0
    ) -> None:
        """Log a diagnostic as `<objective>/<name>`, averaged until the next logging step.

        Args:
            name: Name of the diagnostic.
            value: A mean over `count` items of this micro-batch.
            count: Weight of the value in the average.
        """
        if torch.is_grad_enabled() and self._objective is not None:
            self._metrics.add(f"{self._objective.name}/{name}", value, count)

    def _observed(self, hidden: torch.Tensor) -> torch.Tensor:
        """An alias of the hidden state whose gradient is measured, for `gradient_ratio`."""
        if not torch.is_grad_enabled():
            return hidden
        if not hidden.requires_grad:
            frozen_for_now = self._layout.may_be_frozen
            if not frozen_for_now and any(p.requires_grad for p in self.model.parameters()):
                name = self._objective.name if self._objective else "objective"
                raise ValueError(
                    f"The feature layer of {name!r} gave a tensor without a gradient, so the term "
                    "could not train the model: every module below it is frozen, or it runs "
                    "inside a reentrant gradient checkpoint. Choose a feature_layer above a "
                    "trainable module, or use gradient_checkpointing_kwargs="
                    "{'use_reentrant': False}."
                )
            return hidden
        if self._objective is None:
            return hidden
        alias = hidden.view_as(hidden)
        _measure_share(alias, hidden, f"{self._objective.name}/gradient_ratio", self._metrics)
        return alias


def _measure_share(
    alias: torch.Tensor, hidden: torch.Tensor, name: str, metrics: MetricAverager
) -> None:
    """Log, in the backward, which share of a hidden state's gradient comes through the alias.

    The hooks must hold neither the tensors nor anything that holds them (a batch): Python's
    collector does not see a cycle through a tensor's hooks, so it would never be freed.
    """
    own_gradients: list[torch.Tensor] = []

    def measure(total: torch.Tensor) -> None:
        if own_gradients:
            own = own_gradients.pop().detach().float()
            own_norm, rest_norm = own.norm(), (total.detach().float() - own).norm()
            ratio = own_norm / (own_norm + rest_norm).clamp(min=torch.finfo(own.dtype).tiny)
            metrics.add(name, ratio)

    alias.register_hook(own_gradients.append)  # type: ignore[no-untyped-call]
    hidden.register_hook(measure)  # type: ignore[no-untyped-call]
