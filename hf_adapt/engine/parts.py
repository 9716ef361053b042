"""The rows that go through the model in one forward, and what is known of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.selection import rows_of
from hf_adapt.engine.streams import TRAINING, StreamTable
from hf_adapt.models.hashing import row_keys
from hf_adapt.models.heads import has_head
from hf_adapt.models.pooling import without_virtual_tokens

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class Part:
    """The rows that went through the model in one forward.

    Attributes:
        inputs: What the model was given, without the domain column.
        domain: (B,) long, 0 for source rows.
        stream: The stream of all its rows, where they have a forward of their own; else
            `"train"`, for the training rows and those that joined them.
        hidden: The captured output of each captured module, by the module's id.
        masks: The attention mask that belongs to such an output, where it has one of its own.
        outputs: The model's own outputs.
        columns: Columns that an adaptation asked for, one value per row.
        extra: Inputs that an adaptation asked for and the model does not take.
        is_fused: Whether the loss was computed without logits.
        is_stand_in: Whether a micro-batch has no row of the stream, and this one stands in so that
            all processes run the same forwards.
        whole: The part that these rows are a selection of, if they are one.
        kept: (B,) bool, which of the whole's rows they are.
        added: (B, T) bool, the tokens that the tokenizer adds to a text ([CLS], [SEP]), where the
            head classifies tokens; they are no items.
        cache: Values that an adaptation computed for these rows and needs again, by its own keys.
    """

    inputs: Mapping[str, Any]
    domain: torch.Tensor
    stream: str = TRAINING
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    masks: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: Any = None
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    is_fused: bool = False
    is_stand_in: bool = False
    whole: Part | None = None
    kept: torch.Tensor | None = None
    added: torch.Tensor | None = None
    cache: dict[Any, Any] = field(default_factory=dict, init=False)

    def select(self, kept: torch.Tensor) -> Part:
        """Some of its rows, with what the forward gave for them."""
        size = len(self.domain)

        def chosen(value: torch.Tensor) -> torch.Tensor:
            return value[self._expanded(kept, len(value))]

        outputs = self.outputs
        if isinstance(outputs, Mapping):
            outputs = rows_of(outputs, kept)
        elif isinstance(outputs, (tuple, list)):
            named = rows_of({str(i): value for i, value in enumerate(outputs)}, kept)
            outputs = tuple(named.values())
        return replace(
            self,
            inputs=rows_of(self.inputs, kept),
            domain=self.domain[kept],
            hidden={key: chosen(value) for key, value in self.hidden.items()},
            masks={k: chosen(v) if len(v) % size == 0 else v for k, v in self.masks.items()},
            outputs=outputs,
            columns=rows_of(self.columns, kept),
            extra=rows_of(self.extra, kept),
            whole=self,
            kept=kept,
            added=None if self.added is None else self.added[kept],
        )

    @property
    def keys(self) -> torch.Tensor:
        """(B,) long, a key of each row by its content: see [`row_keys`]."""
        if "keys" not in self.cache:
            self.cache["keys"] = row_keys(self.inputs)
        keys: torch.Tensor = self.cache["keys"]
        return keys

    def without_padding(self) -> Part:
        """The same with fewer columns, where the last ones are padding in every row.

        Their number stays a multiple of 8, which some hardware wants.
        """
        mask = self.attention_mask
        if mask is None:
            return self
        real = mask.any(0).nonzero()
        width = -(-(int(real.max()) + 1) // 8) * 8 if len(real) else mask.shape[1]
        tensors = {k: v for k, v in self.inputs.items() if isinstance(v, torch.Tensor)}
        wide = {k for k, v in tensors.items() if v.ndim >= 2 and v.shape[:2] == mask.shape}
        others = [v for k, v in tensors.items() if k not in wide]
        if width >= mask.shape[1] or any(mask.shape[1] in v.shape[1:] for v in others):
            return self
        return replace(
            self,
            inputs={
                k: v[:, :width].contiguous() if k in wide else v for k, v in self.inputs.items()
            },
            added=None if self.added is None else self.added[:, :width],
        )

    def _expanded(self, kept: torch.Tensor, length: int) -> torch.Tensor:
        """The same for a tensor with several entries per row, as multiple choice has."""
        return kept if length == len(kept) else kept.repeat_interleave(length // len(kept))

    def observed(
        self, module: int, observe: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The captured output of a module, handed through a function that sees all rows."""
        if self.whole is None or self.kept is None:
            return observe(self.hidden[module])
        hidden = observe(self.whole.hidden[module])
        return hidden[self._expanded(self.kept, len(hidden))]

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """(B, T) with 1 on real tokens, or None where the model has no mask."""
        mask = self.inputs.get("attention_mask")
        return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    @property
    def item_mask(self) -> torch.Tensor | None:
        """(B, T) with 1 on the tokens that are items where tokens are; None if all are."""
        mask = self.attention_mask
        if self.added is None:
            return mask
        return ~self.added if mask is None else mask.bool() & ~self.added

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
        """(B,) the number of items in each row where tokens are, all its choices together."""
        if self.added is not None and self.item_mask is not None:
            return self.item_mask.sum(1)
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
        table: The streams of the run, by domain number.
        label_names: Inputs that are labels.
        module_of: The module behind each feature layer, or why there is none.
        token_features: Ids of the modules whose output has one vector per token.
        choice_features: Ids of the modules whose output has one entry per choice of a row.
        token_logits: Whether the model predicts per token rather than per row.
        num_classes: How many scores a prediction has; 0 where there are none.
        may_be_frozen: Whether an adaptation freezes parts of the model for a while.
        added_ids: Ids of the tokens that the tokenizer adds to a text, where the head classifies
            tokens.
    """

    model: nn.Module
    table: StreamTable = field(default_factory=StreamTable)
    label_names: tuple[str, ...] = ("labels",)
    module_of: dict[str | None, nn.Module | ValueError] = field(default_factory=dict)
    token_features: set[int] = field(default_factory=set)
    choice_features: set[int] = field(default_factory=set)
    token_logits: bool = False
    num_classes: int = 0
    may_be_frozen: bool = False
    added_ids: tuple[int, ...] = ()

    def added_tokens(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """(B, T) bool, which tokens the tokenizer added; None where all tokens may be items."""
        ids = inputs.get("input_ids")
        if not self.added_ids or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return None
        return torch.isin(ids, torch.tensor(self.added_ids, dtype=ids.dtype, device=ids.device))

    def learn(self, parts: list[Part]) -> None:
        """Take the number of dimensions from a first forward."""
        for part in parts:
            rows, hidden = len(part.domain), part.hidden.items()
            self.token_features |= {key for key, h in hidden if h.ndim == 3}
            self.choice_features |= {key for key, h in hidden if len(h) > rows}
            try:
                self.token_logits = self.token_logits or part.logits.ndim == 3
                self.num_classes = part.logits.shape[-1]
            except ValueError:
                continue  # no logits; an objective that needs them says so


def added_ids(trainer: Trainer) -> tuple[int, ...]:
    """Ids of the tokens that a tokenizer puts around a text, where the head classifies tokens.

    Unknown words and tokens of the user's own are part of the text.
    """
    if not has_head(trainer.accelerator.unwrap_model(trainer.model), "token_classification"):
        return ()
    tokenizer = trainer.processing_class
    if tokenizer is None:
        tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    kinds = ("cls", "sep", "bos", "eos", "pad")
    found = {getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds}
    unknown = getattr(tokenizer, "unk_token_id", None)
    return tuple(sorted(number for number in found if number not in (None, unknown)))
