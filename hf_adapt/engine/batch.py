"""What an objective sees of a micro-batch: features, predictions, labels, and their domains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hf_adapt.engine.labels import IGNORED
from hf_adapt.engine.parts import Layout, Part
from hf_adapt.engine.streams import TARGET, TRAINING
from hf_adapt.models.hashing import item_keys
from hf_adapt.models.heads import is_causal_lm
from hf_adapt.models.pooling import (
    Pooling,
    pool,
    resolve_pooling,
    token_mask,
)
from hf_adapt.models.structure import is_encoder_decoder

if TYPE_CHECKING:
    from typing import Self

    from hf_adapt.engine.metrics import MetricAverager


class Reader(Protocol):
    """What an objective reads of a batch: its own streams, layer and pooling."""

    name: str
    streams: Collection[str]
    feature_layer: str | None
    pooling: Pooling


class Rows:
    """The rows of a micro-batch and their domains: what is known before the forward.

    Attributes:
        parts: One part, and one for each stream that goes through the model separately.
        model: The unwrapped model.
        num_domains: Number of domains, the source included.
        num_classes: How many scores a prediction has; 0 where the model gives none.
        domain_streams: The stream of each domain number.
    """

    def __init__(self, parts: list[Part], layout: Layout) -> None:
        self.parts = []
        for part in parts:
            if not part.is_stand_in:
                self.parts.append(part)
            elif part.stream == TRAINING:  # all rows are of other tasks than the model's own
                self.parts.append(part.select(torch.zeros_like(part.domain, dtype=torch.bool)))
        self._stand_ins = [part for part in parts if part.is_stand_in]
        self.model = layout.model
        self.domain_streams = layout.table.names
        self._layout = layout
        self._objective: Reader | None = None

    @property
    def num_domains(self) -> int:
        """Number of domains, the source included."""
        return len(self.domain_streams)

    @property
    def num_classes(self) -> int:
        """How many scores a prediction has; 0 where the model gives none."""
        return self._layout.num_classes

    def ratio(self, stream: str = TARGET) -> float:
        """How many rows of a stream each training row brings along; 0 where there is none."""
        return self._layout.table.ratios.get(stream, 0.0)

    def for_objective(self, objective: Reader) -> Self:
        """The rows of this objective's streams, as seen with its feature layer and pooling."""
        bound = copy.copy(self)
        bound._objective = objective
        kept = self._layout.table.domains(objective.streams)
        if len(kept) < self.num_domains:
            bound.domain_streams = tuple(self.domain_streams[number] for number in kept)
            seen, stand_ins = (
                [self._seen(part, kept) for part in parts]
                for parts in (self.parts, self._stand_ins)
            )
            bound.parts = [part for part in seen if part is not None]
            bound._stand_ins = [part for part in stand_ins if part is not None]
        return bound

    def _seen(self, part: Part, kept: list[int]) -> Part | None:
        """The rows of some domains, which are numbered without the others."""
        table = self._layout.table
        if part.stream not in (TRAINING, *(table.names[number] for number in kept)):
            return None
        numbers = torch.full((len(table.names),), -1, dtype=torch.long)
        numbers[kept] = torch.arange(len(kept))
        domain = numbers.to(part.domain.device)[part.domain]
        joined = [n for n, name in enumerate(table.names) if name not in table.separate]
        if part.stream == TRAINING and not set(joined) <= set(kept):
            part, domain = part.select(domain >= 0), domain[domain >= 0]
        return replace(part, domain=domain)

    def is_in(self, domain: torch.Tensor, stream: str = TARGET) -> torch.Tensor:
        """Which items belong to a stream, (N,) bool.

        Args:
            domain: (N,) long, the domain of each item, as `features()` and `logits()` return it.
            stream: The stream's name; `"train"` for the training rows.
        """
        return self._is_in_any(domain, (stream,))

    def _is_in_any(self, domain: torch.Tensor, streams: Collection[str]) -> torch.Tensor:
        numbers = [n for n, name in enumerate(self.domain_streams) if name in streams]
        return torch.isin(domain, torch.tensor(numbers, dtype=domain.dtype, device=domain.device))

    def keys(self) -> torch.Tensor:
        """(N,) long, a key of each item of `logits()` by its row's content."""
        found = []
        for part in self.parts:
            keys = part.keys
            tokens = self._layout.token_logits
            found.append(item_keys(keys, part.token_counts) if tokens else keys)
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)

    def row_keys(self) -> torch.Tensor:
        """(N,) long, the key of the row of each item of `logits()`."""
        if not self._layout.token_logits:
            return self.keys()
        return torch.cat([p.keys.repeat_interleave(p.token_counts) for p in self.parts])

    def item_domain(self) -> torch.Tensor:
        """(N,) long, the domain of each item of `logits()`, before the forward too."""
        if not self._layout.token_logits:
            return self.domain
        return torch.cat([p.domain.repeat_interleave(p.token_counts) for p in self.parts])

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

    def labels(self, of: str = "logits") -> torch.Tensor:
        """The labels of the items, -100 where they are hidden or there are none.

        Args:
            of: `"logits"`: one for each item of `logits()`; a causal language model's are those of
                the token after it. `"features"`: one for each item of `features()`.

        Shape:
            - output: (N,), or (N, C) where a row has a vector of labels.

        Raises:
            ValueError: If the items have no labels of their own: a pooled row of a tagger, say.
        """
        found = []
        for part in self.parts:
            name = next((n for n in self._layout.label_names if n in part.inputs), None)
            value = None if name is None else part.inputs[name]
            if not isinstance(value, torch.Tensor) or len(value) != len(part.domain):
                raise ValueError(
                    f"Expected labels with one entry per row in the batch, found "
                    f"{', '.join(part.inputs)}. Name them in TrainingArguments(label_names=[...])."
                )
            by_token = self._layout.token_logits if of == "logits" else self.pooling == "tokens"
            choices = of == "features" and part.num_choices > 1
            tokens = part.inputs.get("input_ids", part.attention_mask)
            shape = tokens.shape if isinstance(tokens, torch.Tensor) else None
            fits = not by_token or value.shape == shape
            if by_token != self._layout.token_logits or choices or not fits:
                raise ValueError(
                    f"The labels have shape {tuple(value.shape)}, and the items of {of}() are "
                    f"{'choices' if choices else 'tokens' if by_token else 'rows'}: they have no "
                    "labels of their own."
                )
            if by_token:
                mask = part.item_mask
                if of == "logits" and is_causal_lm(self.model):
                    value = torch.cat([value[:, 1:], torch.full_like(value[:, :1], IGNORED)], 1)
                value = value.flatten() if mask is None else value[mask.bool()]
            found.append(value)
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)

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
        run: Callable[[Part, bool], Part],
    ) -> None:
        super().__init__(parts, layout)
        self.progress = progress
        self._metrics = metrics
        self._run = run
        self._is_further = False

    def forward(
        self,
        change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        streams: Collection[str] | None = None,
    ) -> Self:
        """A further forward of these rows, captured like the first.

        For noised, masked or augmented inputs, or other weights. It counts in neither the task's
        loss nor the metrics of the Trainer's own `compute_loss`, and the model gets no labels. With
        several processes all must call it, whether they have such rows or not.

        Args:
            change: Makes the inputs of the further forward from those of the first; each tensor
                keeps one entry per row, and a changed attention mask changes which tokens are
                items. None for the same inputs (with other dropout).
            streams: The streams whose rows are run, `"train"` for the training rows; None for all
                that the objective sees.

        Returns:
            A batch whose features and predictions are those of the further forward.

        Example:
            ```python
            def loss(self, batch):
                noised = batch.forward(lambda inputs: {**inputs, "input_ids": mask(inputs)})
                return (batch.features()[0] - noised.features()[0]).square().mean()
            ```
        """
        further = copy.copy(self)
        further.parts, further._is_further = [], True
        for part in [*self.parts, *self._stand_ins]:
            if not len(part.domain):
                continue  # its stand-in is run
            kept = torch.ones_like(part.domain, dtype=torch.bool)
            if streams is not None:
                kept = self._is_in_any(part.domain, streams)
                joins = part.stream == TRAINING and set(streams) - self._layout.table.separate
                if part.stream not in streams and not joins:
                    continue  # in no process
            # All processes must run the same forwards: one row is run where there is none.
            empty = not bool(kept.any())
            if empty:
                kept[0] = True
            part_rows = part if bool(kept.all()) else part.select(kept)
            inputs = dict(part_rows.inputs) if change is None else change(dict(part_rows.inputs))
            added, ids = part_rows.added, inputs.get("input_ids")
            if added is not None and isinstance(ids, torch.Tensor) and ids.shape != added.shape:
                added = self._layout.added_tokens(inputs)  # else as they were: a view may mask them
            plain = replace(
                part_rows,
                inputs=inputs,
                added=added,
                hidden={},
                masks={},
                outputs=None,
                is_fused=False,
                whole=None,
                kept=None,
            )
            made = self._run(plain, change is not None)
            if empty or part.is_stand_in:
                made = made.select(torch.zeros_like(made.domain, dtype=torch.bool))
            further.parts.append(made)
        return further

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
        module = self._layout.module_of.get(layer)
        if module is None:
            raise ValueError(
                "Features are captured for the layers that objectives name (feature_layer), and no "
                "objective of this run names the one asked for. Ask in an Objective's loss or "
                "build_modules."
            )
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
            hidden = part.observed(id(module), self._observed)
            domain = part.domain
            if len(hidden) > len(domain):
                domain = domain.repeat_interleave(part.num_choices)
            mask = torch.ones_like(domain, dtype=torch.bool)
            if hidden.ndim == 3:
                given = part.item_mask if self.pooling == "tokens" else part.attention_mask
                given = part.masks.get(id(module)) if given is None else given
                hidden = part.own_tokens(hidden, self.model)
                mask = token_mask(hidden, given, self.model)
            features.append(pool(hidden, mask, self.pooling))
            tokens = self.pooling == "tokens" and hidden.ndim == 3
            domains.append(domain.repeat_interleave(mask.sum(1)) if tokens else domain)
        return self._joined(features, domains)

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions and the domain of each; for token heads one per real token.

        A head that classifies tokens has no item for the tokens that the Trainer's tokenizer adds
        to a text ([CLS], [SEP]). Without a tokenizer they cannot be told from the others.

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
                mask = token_mask(values, part.item_mask, self.model)
                values, domain = values[mask], domain.repeat_interleave(mask.sum(1))
            logits.append(values)
            domains.append(domain)
        return self._joined(logits, domains)

    def _joined(
        self, values: list[torch.Tensor], domains: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not values:  # no row of the streams asked for
            device = next(self.model.parameters()).device
            return torch.zeros(0, 0, device=device), torch.zeros(0, dtype=torch.long, device=device)
        return torch.cat(values), torch.cat(domains)

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
        if self._objective is None or self._is_further:  # no other term reads those rows
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
