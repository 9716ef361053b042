"""Entities as soft prompt tokens: one token before the text for each mention."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from hf_adapt.engine.labels import IGNORED
from hf_adapt.knowledge.injection.injection_layers import GatedAddition, LayerSizes, Record
from hf_adapt.knowledge.injection.inputs import Knowledge

NUM_PROMPT_TOKENS = 8


class SoftPrompt(GatedAddition):
    """Tokens before the text, one for each mention, whose embeddings are made of its entity.

    Meant for decoders, whose own tokens stay as they are. The batches get `num_tokens` more tokens
    in each row, with the label -100; those without a mention are masked. The projection does not
    start at zero, so that the model is another one from the first step on: unlike the other
    injection layers this is no no-op at the beginning.

    Reference:
        Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
        arXiv:2104.08691, for tokens made of vectors alone. Deviation: the vectors are projections
        of the entities in the text.

    Args:
        sizes: Sizes; `hidden_size` is that of the embeddings.
        num_tokens: Tokens before each row: mentions at most.
    """

    changes_input = True
    is_relative = False  # what a prompt token was before is no measure

    def __init__(self, sizes: LayerSizes, num_tokens: int = NUM_PROMPT_TOKENS) -> None:
        super().__init__(sizes)
        self.num_tokens = num_tokens
        # As large as embeddings usually are: a token of another size would drown the others.
        torch.nn.init.normal_(self.output.weight, std=0.02)

    def forward(
        self, hidden: torch.Tensor, knowledge: Knowledge, record: Record | None = None
    ) -> torch.Tensor:
        """What to add so that the prompt tokens are the entities'; see the base.

        The gate reads nothing: the tokens that are replaced mean nothing.
        """
        tokens = knowledge.token_mask(hidden.shape[1]).to(hidden.dtype)
        nothing = hidden.new_zeros(*knowledge.spans.shape[:2], self.sizes.hidden_size)
        values = self.output(self.mention_values(nothing, knowledge, record))
        spread = tokens.transpose(1, 2)
        added: torch.Tensor = spread @ values - spread.sum(-1, keepdim=True) * hidden
        return added


def add_prompt_tokens(
    batch: MutableMapping[str, Any], spans: torch.Tensor, number: int, token: int
) -> torch.Tensor:
    """Put prompt tokens before the first real token of each row of a batch."""
    ids: torch.Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    first = mask.bool().int().argmax(1)  # 0 where padding is on the right
    rows, length = ids.shape
    at = torch.arange(length + number).unsqueeze(0)
    start = first.unsqueeze(1)
    is_prompt = (at >= start) & (at < start + number)
    # Where each new position was before; a prompt's own is never read.
    before = torch.where(at < start, at, (at - number).clamp(min=0)).expand(rows, -1)
    there = spans[..., 1] > spans[..., 0]
    count = there.sum(1).clamp(max=number)
    used = is_prompt & (at >= start + number - count.unsqueeze(1))
    batch["attention_mask"] = mask
    fills = {"input_ids": token, "labels": IGNORED, "attention_mask": 0, "token_type_ids": 0}
    for name, value in list(batch.items()):
        if isinstance(value, torch.Tensor) and value.shape == (rows, length):
            moved = value.gather(1, before.to(value.device))
            batch[name] = moved.masked_fill(is_prompt, fills.get(name, 0))
    batch["attention_mask"] = batch["attention_mask"].masked_fill(used, 1)
    order = there.cumsum(1) - 1  # which of the row's mentions
    position = first.unsqueeze(1) + number - count.unsqueeze(1) + order
    kept = there & (order < number)
    return torch.stack([position, position + 1], dim=-1).masked_fill(~kept.unsqueeze(-1), 0)
