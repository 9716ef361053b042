"""From the mentions of rows to the inputs of a batch."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from hf_adapt.engine.labels import IGNORED
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.inputs import Knowledge
from hf_adapt.knowledge.injection.soft_prompt import add_prompt_tokens
from hf_adapt.knowledge.linking.mentions import TokenMention
from hf_adapt.knowledge.linking.token_alignment import TokenAligner
from hf_adapt.knowledge.vectors.table import EntityVectors
from hf_adapt.models.heads import has_head, is_causal_lm

CACHED_NEIGHBOURS = 100_000
"""Entities whose neighbours are kept in memory."""

TOKENS_ALONE = (
    "the model was given tokens alone",
    "Make the inputs with knowledge_inputs(model, texts), which links the texts themselves.",
)
"""Why a model's own inputs are linked by what they decode to, and what is better."""


@dataclass(eq=False)
class MentionBatcher:
    """Finds the mentions of the rows of a batch; a subclass makes inputs of them."""

    graph: KnowledgeGraph
    aligner: TokenAligner
    max_mentions: int | None = None
    without_predicted: bool = False  # mentions that would give away what is to be predicted

    def __post_init__(self) -> None:
        most = self.max_mentions
        if most is not None and most < 1:
            raise ValueError(f"max_mentions={most} must be at least 1, or None for all.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of a model shares the graph

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the rows."""
        return self.aligner.tokenizer

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are linked."""
        return self.aligner.text_columns

    def add_mentions(
        self, batch: MutableMapping[str, Any], mentions: Sequence[Sequence[TokenMention]]
    ) -> None:
        """Add inputs to a batch."""
        raise NotImplementedError

    def add_to(self, rows: Sequence[Any], batch: MutableMapping[str, Any]) -> None:
        """Add the inputs that the mentions of these rows make to their batch."""
        ids = batch.get("input_ids")
        if ids is None:
            raise ValueError(
                "Knowledge needs batches with input_ids, and the data collator made none (it made "
                f"{', '.join(batch)}). It works with Trainers whose rows are one sequence of "
                "tokens each; a Trainer that batches several columns by itself is not supported."
            )
        shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != len(rows):
            raise ValueError(
                f"Knowledge needs batches with input_ids of shape ({len(rows)}, tokens), one "
                f"sequence for each of the rows; the data collator made {shape}. Turn packing and "
                "padding_free off; multiple choice is not supported."
            )
        labels = batch.get("labels") if self.without_predicted else None
        mentions = []
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping) or "input_ids" not in row:
                found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
                raise ValueError(
                    f"Knowledge needs tokenised rows with input_ids, got {found}. Tokenise the "
                    "dataset before training."
                )
            shift = _shift(row, ids[number], _at(batch.get("attention_mask"), number))
            own = [replace(m, start=m.start + shift, end=m.end + shift) for m in self.aligner(row)]
            if isinstance(labels, torch.Tensor):
                own = [m for m in own if bool((labels[number, m.start : m.end] == IGNORED).all())]
            mentions.append(own[: self.max_mentions])
        self.add_mentions(batch, mentions)

    def encode(self, texts: Sequence[str], **options: Any) -> dict[str, torch.Tensor]:
        """Texts as inputs of the model, with what the graph says of them."""
        options = {"padding": True, "truncation": True, **options}
        batch = dict(self.tokenizer(list(texts), **options, return_tensors="pt"))
        ids, masks = batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        rows = [
            {"input_ids": own, "attention_mask": mask, self.text_columns[0]: text}
            for own, mask, text in zip(ids, masks, texts, strict=True)
        ]
        self.add_to(rows, batch)
        return batch


@dataclass(eq=False, kw_only=True)
class KnowledgeBatcher(MentionBatcher):
    """Gathers what the graph says of the candidates of each mention.

    Only the rows of the table that a batch needs are read, in the DataLoader's workers.
    """

    vectors: EntityVectors
    num_neighbours: int = 0
    after: bool = False  # whether each stands at the token after it
    num_prompt_tokens: int = 0
    _neighbours: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False)

    def add_mentions(
        self, batch: MutableMapping[str, Any], mentions: Sequence[Sequence[TokenMention]]
    ) -> None:
        """Add the tensors of the mentions, after prompt tokens where there are some."""
        knowledge = self._gathered(mentions)
        if self.num_prompt_tokens:
            tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            token = next(t for t in tokens if t is not None)
            spans = add_prompt_tokens(batch, knowledge.spans, self.num_prompt_tokens, token)
            knowledge = replace(knowledge, spans=spans)
        batch.update(knowledge.inputs())

    def of_tokens(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Knowledge:
        """The mentions of a batch of which only the tokens are left."""
        mentions = []
        for number, ids in enumerate(input_ids.tolist()):
            row = {"input_ids": ids}
            mask = _at(attention_mask, number)
            if mask is not None and mask.ndim == 1 and len(mask) == len(ids):
                row["attention_mask"] = mask.tolist()
            mentions.append(self.aligner(row, TOKENS_ALONE)[: self.max_mentions])
        return self._gathered(mentions).to(input_ids.device)

    def _gathered(self, rows: Sequence[Sequence[TokenMention]]) -> Knowledge:
        most = max([1, *(len(row) for row in rows)])
        choices = max([1, *(len(found.mention.candidates) for row in rows for found in row)])
        shape = (len(rows), most, choices)
        spans = np.zeros((*shape[:2], 2), dtype=np.int64)
        entities = np.full(shape, -1, dtype=np.int64)
        priors = np.zeros(shape, dtype=np.float32)
        for i, row in enumerate(rows):
            for j, found in enumerate(row):
                end = found.end
                spans[i, j] = (end, end + 1) if self.after else (found.start, end)
                for k, candidate in enumerate(found.mention.candidates):
                    entities[i, j, k], priors[i, j, k] = candidate.entity, candidate.prior
        arrays = [spans, entities, priors, self.vectors.gather(entities)]
        if self.num_neighbours:
            others, relations = self._neighbours_of(entities)
            arrays += [self.vectors.gather(others), relations]
        return Knowledge(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def _neighbours_of(self, entities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours and relations, (..., num_neighbours), -1 where there are fewer."""
        shape = (*entities.shape, self.num_neighbours)
        others, relations = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
        for index in np.argwhere(entities >= 0):
            entity = int(entities[tuple(index)])
            if entity not in self._neighbours:
                if len(self._neighbours) >= CACHED_NEIGHBOURS:
                    self._neighbours.clear()
                self._neighbours[entity] = self.graph.neighbours(entity, limit=self.num_neighbours)
            found_relations, found_entities = self._neighbours[entity]
            others[(*index, slice(len(found_entities)))] = found_entities
            relations[(*index, slice(len(found_relations)))] = found_relations
        return others, relations


def make_batcher(
    model: nn.Module,
    injector: KnowledgeInjector,
    graph: KnowledgeGraph,
    vectors: EntityVectors,
    aligner: TokenAligner,
    max_mentions: int | None = None,
) -> KnowledgeBatcher:
    """What makes batches for an injector on a model."""
    prompts = injector.num_prompt_tokens
    after = injector.tokens == "after" or (injector.tokens == "auto" and is_causal_lm(model))
    return KnowledgeBatcher(
        graph,
        aligner,
        max_mentions if not prompts else min(max_mentions or prompts, prompts),
        predicts_tokens(model),
        vectors=vectors,
        num_neighbours=injector.num_neighbours,
        after=after and not prompts,
        num_prompt_tokens=prompts,
    )


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model predicts masked tokens, which mentions must not give away."""
    return has_head(model, "masked_lm")


def _at(values: Any, number: int) -> torch.Tensor | None:
    return values[number] if isinstance(values, torch.Tensor) and values.ndim >= 2 else None


def _shift(row: Mapping[str, Any], ids: torch.Tensor, mask: torch.Tensor | None) -> int:
    """How many tokens of padding the collator put before a row."""
    own = torch.as_tensor(row["input_ids"])
    more = len(ids) - len(own)
    # A longer row was cut off by the collator, on the right.
    if more <= 0 or torch.equal(ids[: len(own)], own):
        return 0
    if torch.equal(ids[more:], own):
        return more
    # The collator masks or changes tokens: the padding's side is what is left to look at.
    if mask is not None and mask.ndim == 1 and bool(mask.bool().any()):
        first = int(mask.int().argmax())
        before = row.get("attention_mask")
        return first - (int(torch.as_tensor(before).int().argmax()) if before is not None else 0)
    raise ValueError(
        f"A row of {len(own)} tokens cannot be found in the {len(ids)} tokens that the data "
        "collator made of it, and there is no attention_mask: the positions of the mentions are "
        "unknown. Let the collator return the attention_mask."
    )
