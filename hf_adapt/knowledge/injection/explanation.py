"""What the injector makes of a text: mentions, candidates, attention and gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_adapt.knowledge.injection.attachment import Attachment, known_attachment
from hf_adapt.knowledge.injection.batcher import MentionBatcher
from hf_adapt.knowledge.linking.mentions import TokenMention
from hf_adapt.models.state import preserved


@dataclass(frozen=True)
class ExplainedCandidate:
    """An entity that a mention may stand for.

    Attributes:
        prior: How likely before the context was read; a mention's priors add up to 1.
        attention: Its share of the attention at each injection point; the rest went to neighbours
            and to "no knowledge".
    """

    key: str
    label: str
    description: str | None
    prior: float
    attention: tuple[float, ...]


@dataclass(frozen=True)
class ExplainedMention:
    """A span of the text that was linked: `text[start:end] == surface`.

    Attributes:
        tokens: First token and one past the last.
        gate: How far open the gate was at each injection point (cross-attention: all that did not
            go to "no knowledge"); empty for an adapter, which has none.
    """

    start: int
    end: int
    surface: str
    tokens: tuple[int, int]
    candidates: tuple[ExplainedCandidate, ...]
    gate: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """What the injector made of a text: `print` shows it, `dataclasses.asdict` makes it plain."""

    text: str
    points: tuple[str, ...]
    mentions: tuple[ExplainedMention, ...] = ()

    def __str__(self) -> str:
        lines = [self.text, *(["  no entity was linked"] if not self.mentions else [])]
        for mention in self.mentions:
            gate = f"  gate {_numbers(mention.gate)}" if mention.gate else ""
            lines.append(f"  {mention.surface!r} [{mention.start}:{mention.end}]{gate}")
            lines += [
                f"    {candidate.label} ({candidate.key})  prior {candidate.prior:.2f}  "
                f"attention {_numbers(candidate.attention)}"
                for candidate in mention.candidates
            ]
        return "\n".join(lines)


def explain(model: nn.Module, text: str) -> Explanation:
    """What a model's injector makes of a text.

    Args:
        model: A model from [`load_knowledge_model`], or one trained with a [`KnowledgeCallback`].
        text: Any text; what the tokenizer truncates is not explained.

    Raises:
        ValueError: If the model has no injector, or knows no graph.

    Example:
        ```python
        print(explain(load_knowledge_model("out"), "Aspirin thins the blood."))
        ```
    """
    attachment = known_attachment(model)
    return explain_with(attachment, attachment.batcher, text)


@torch.no_grad()
def explain_with(attachment: Attachment, batcher: MentionBatcher, text: str) -> Explanation:
    """The same, with the parts at hand."""
    tokenizer: Any = batcher.tokenizer
    encoded = tokenizer(text, return_tensors="pt", truncation=True)
    row = {"input_ids": encoded["input_ids"][0].tolist(), batcher.text_columns[0]: text}
    found = batcher.aligner(row)[: batcher.max_mentions]
    batch: dict[str, Any] = dict(encoded)
    batcher.add_to([row], batch)
    device = next(attachment.model.parameters()).device
    records: list[Any] = []
    attachment.records = records
    try:
        with preserved(attachment.model):
            attachment.model.eval()
            attachment.reader(**{name: value.to(device) for name, value in batch.items()})
    finally:
        attachment.records = None
    points = tuple(str(point.location) for point in attachment.points)
    mentions = [
        _explained(mention, number, records, batcher.graph) for number, mention in enumerate(found)
    ]
    return Explanation(text, points, tuple(mentions))


def _explained(
    found: TokenMention, number: int, records: list[dict[str, torch.Tensor]], graph: Any
) -> ExplainedMention:
    mention = found.mention
    attention = [record["attention"][0, number].tolist() for record in records]
    candidates = tuple(
        ExplainedCandidate(
            graph.key(c.entity),
            graph.label(c.entity),
            graph.description(c.entity),
            c.prior,
            tuple(each[k] for each in attention),
        )
        for k, c in enumerate(mention.candidates)
    )
    gate = tuple(float(r["gate"][0, number]) for r in records if "gate" in r)
    tokens = (found.start, found.end)
    return ExplainedMention(mention.start, mention.end, mention.surface, tokens, candidates, gate)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
