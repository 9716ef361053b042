"""The kind of a model's head: which predictions are distilled, and how they are selected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_adapt.distillation.divergences import ABSENT
from hf_adapt.engine.labels import IGNORED
from hf_adapt.models.heads import HeadName, has_head
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

HeadKind = Literal["rows", "labels", "values", "tokens", "spans", "causal_lm"]

_KINDS: dict[HeadKind, tuple[HeadName, ...]] = {
    "tokens": ("token_classification", "masked_lm"),
    "spans": ("question_answering",),
    "causal_lm": ("causal_lm", "conditional_generation"),
}


def output_logits(outputs: Any, name: str = "logits") -> torch.Tensor:
    """The logits in a model's outputs: a tensor, a dict, a tuple or a model output.

    Raises:
        ValueError: If there are none.
    """
    value: Any = None
    if isinstance(outputs, torch.Tensor):
        value = outputs
    elif isinstance(outputs, Mapping):
        value = outputs.get(name, outputs.get("prediction_logits") if name == "logits" else None)
    elif isinstance(outputs, (tuple, list)):
        value = next((o for o in outputs if isinstance(o, torch.Tensor) and o.ndim >= 2), None)
    else:
        value = getattr(outputs, name, None)
    if not isinstance(value, torch.Tensor):
        found = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            f"Expected {name!r} in the outputs of student and teacher, found {found}. Override "
            "select_logits to select the predictions."
        )
    return value


@dataclass(frozen=True)
class Head:
    """The kind of a model's predictions, and which of them are distilled.

    An item is what has one predicted distribution: a row of a classifier, a token of a tagger or
    a language model, the start and the end of an answer.

    Attributes:
        kind: `"rows"`: one prediction per row; `"labels"`: one yes or no per row and label;
            `"values"`: the numbers of a regression, not a distribution; `"tokens"`: one per
            token; `"spans"`: start and end; `"causal_lm"`: one per token, of the token after it.
        is_encoder_decoder: Whether the tokens are the decoder's.
        is_decided: Whether the configuration has a `problem_type`, so that labels do not decide
            it.
    """

    kind: HeadKind
    is_encoder_decoder: bool = False
    is_decided: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a model."""
        base = unwrapped_base(model)
        config = getattr(base, "config", None)
        encoder_decoder = is_encoder_decoder(model)
        found: HeadKind = "rows"
        for kind, heads in _KINDS.items():
            if has_head(model, *heads):
                found = kind
        if encoder_decoder and found == "causal_lm":
            found = "tokens"  # the decoder's inputs are shifted already
        problem = getattr(config, "problem_type", None)
        if found == "rows" and not has_head(model, "multiple_choice"):
            if problem == "multi_label_classification":
                found = "labels"
            elif problem == "regression" or getattr(config, "num_labels", None) == 1:
                found = "values"
        return cls(found, encoder_decoder, is_decided=problem is not None)

    def item_mask(
        self, inputs: Mapping[str, Any], domain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The items of a batch that are distilled; known before the forward.

        Tokens are distilled where there is a label (not -100). Without labels, as on target rows,
        whose labels are hidden, every real token is.

        Args:
            inputs: The student's inputs.
            domain: (B,) long, 0 for source rows; None if all are.

        Shape:
            - output: (B,) bool for rows; (B, T) for tokens, at the position of the label.
        """
        if self.kind in ("rows", "labels", "values", "spans"):
            size = next(v.shape[0] for v in inputs.values() if isinstance(v, torch.Tensor))
            device = next(v.device for v in inputs.values() if isinstance(v, torch.Tensor))
            return torch.ones(size, dtype=torch.bool, device=device)
        real = self._real_tokens(inputs)
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor):
            mask = real
        else:
            mask = labels.ne(IGNORED)
            if domain is not None and real is not None and real.shape == mask.shape:
                mask = torch.where((domain > 0)[:, None].to(mask.device), mask | real, mask)
        if mask is None:
            raise ValueError(
                f"Distilling tokens needs labels, an attention_mask or input_ids in the batch; it "
                f"has {', '.join(inputs)}. Override item_mask."
            )
        if self.kind == "causal_lm":
            mask = mask.clone()
            mask[:, 0] = False  # nothing predicts the first token
        return mask

    def _real_tokens(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        prefix = "decoder_" if self.is_encoder_decoder else ""
        mask, ids = inputs.get(f"{prefix}attention_mask"), inputs.get(f"{prefix}input_ids")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return mask.bool()
        if isinstance(ids, torch.Tensor) and ids.ndim == 2:
            return torch.ones_like(ids, dtype=torch.bool)
        return None

    def select(self, outputs: Any, inputs: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """The logits of the items, row by row.

        Args:
            outputs: The outputs of student or teacher.
            inputs: The student's inputs.
            mask: The output of `item_mask`.

        Shape:
            - output: (N, C); for spans N is twice the number of rows, C the longest row's tokens.
        """
        if self.kind == "spans":
            return self._spans(outputs, inputs, mask)
        logits = output_logits(outputs)
        mask = mask.to(logits.device)
        if self.kind == "labels":
            pairs = logits[mask].unsqueeze(-1)
            return torch.cat([pairs, torch.zeros_like(pairs)], dim=-1).flatten(0, 1)
        if self.kind in ("rows", "values"):
            if logits.ndim != 2:
                raise ValueError(
                    f"The logits have shape {tuple(logits.shape)}; expected (rows, classes). "
                    "Override select_logits and item_mask for this head."
                )
            return logits[mask]
        if logits.ndim != 3:
            raise ValueError(
                f"The logits have shape {tuple(logits.shape)}; expected (rows, tokens, classes). "
                "Override select_logits and item_mask for this head."
            )
        logits = logits[:, -mask.shape[1] :]  # virtual tokens of a learned prompt come first
        if self.kind == "causal_lm":
            return logits[:, :-1][mask[:, 1:]]
        return logits[mask]

    def _spans(self, outputs: Any, inputs: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """Start and end of each row over its real tokens, which are moved to the left."""
        starts, ends = output_logits(outputs, "start_logits"), output_logits(outputs, "end_logits")
        both = torch.stack([starts, ends], dim=1)[mask.to(starts.device)]
        real = inputs.get("attention_mask")
        if isinstance(real, torch.Tensor):
            real = real.bool().to(both.device)[mask.to(both.device)]
            order = torch.argsort(~real, dim=1, stable=True)
            both = both.gather(2, order.unsqueeze(1).expand_as(both))
            beyond = ~real.gather(1, order).unsqueeze(1)
            both = both.float().masked_fill(beyond, ABSENT)  # too low for float16
        return both.flatten(0, 1)

    def num_items(self, mask: torch.Tensor, num_labels: int = 1) -> torch.Tensor:
        """The number of distributions that `select` returns for this mask."""
        return mask.sum() * self._per_item(num_labels)

    def row_counts(self, mask: torch.Tensor, num_labels: int = 1) -> list[int]:
        """The number of distributions that `select` returns for each row."""
        per_row = mask.reshape(len(mask), -1).sum(1) * self._per_item(num_labels)
        counts: list[int] = per_row.tolist()
        return counts

    def _per_item(self, num_labels: int) -> int:
        return {"spans": 2, "labels": num_labels}.get(self.kind, 1)

    def item_labels(self, inputs: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor | None:
        """The label of each item, or None where an item has no single class."""
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            return None
        if self.kind == "rows" and labels.ndim == 1:
            return labels[mask]
        if self.kind in ("tokens", "causal_lm") and labels.shape == mask.shape:
            return labels[mask]
        return None

    @property
    def feeds_decoder(self) -> bool:
        """Whether the decoder predicts the labels and reads them shifted."""
        return self.is_encoder_decoder and self.kind == "tokens"

    def with_labels(self, labels: Any) -> Head:
        """The head once labels are known: yes or no for each class, if they are vectors.

        Models decide it by the labels too, where the configuration has no `problem_type`.
        """
        if self.kind != "rows" or self.is_decided or not isinstance(labels, torch.Tensor):
            return self
        if labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] > 1:
            return Head("labels", self.is_encoder_decoder)
        return self


def decoder_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The decoder's inputs, shifted from the labels as the model itself shifts them.

    Raises:
        ValueError: If there are no labels, or the model cannot shift them.
    """
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if not callable(prepare) or "labels" not in inputs:
        raise ValueError(
            f"{type(model).__name__} needs decoder_input_ids, and they cannot be derived: there "
            "are no labels, or the model has no prepare_decoder_input_ids_from_labels. Put them "
            "into the batch (DataCollatorForSeq2Seq(model=model) does)."
        )
    shifted: torch.Tensor = prepare(labels=inputs["labels"])
    return shifted
