"""From the mentions of rows to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from hf_adapt.engine.labels import IGNORED
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.inputs import Knowledge
from hf_adapt.knowledge.injection.prompts import add_prompt_tokens
from hf_adapt.knowledge.injection.text_triples import TripleWriter, check_visibility, first_position
from hf_adapt.knowledge.linking.mentions import TokenMention
from hf_adapt.knowledge.linking.token_alignment import TokenAligner
from hf_adapt.models.heads import has_head, is_causal_lm

CACHED_NEIGHBOURS = 100_000
"""Entities whose neighbours are kept in memory."""


TOKENS_ALONE = (
    "the model was given tokens alone",
    "Make the inputs with knowledge_inputs(model, texts), which links the texts themselves.",
)
"""Why a model's own inputs are linked by what they decode to, and what does better."""


class Vectors(Protocol):
    """A table of entity vectors, as [`EntityVectors`] is."""

    @property
    def dimension(self) -> int:
        """Size of a vector."""

    def gather(self, entities: np.ndarray) -> np.ndarray:
        """The vectors of entities, zeros for -1."""


class KnowledgeBatcher:
    """Finds the mentions of rows and gathers what the graph says of their candidates.

    Only the rows of the table that a batch needs are read, in the DataLoader's workers.

    Args:
        graph: The graph.
        vectors: A vector for each of its entities; None with a writer.
        aligner: Finds the mentions of a tokenised row.
        num_neighbours: Neighbours that are gathered for each candidate.
        max_mentions: Mentions of a row at most, the first ones; None for all.
        after: Whether each stands at the token after it (see [`KnowledgeInjector`]).
        without_predicted: Whether mentions with a token that is to be predicted are left out, so
            that they do not give it away.
        num_prompt_tokens: Tokens that are put before each row for its mentions; 0 for none.
        writer: Writes facts into the rows, in place of vectors.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        graph: Any,
        vectors: Vectors | None,
        aligner: TokenAligner,
        num_neighbours: int = 0,
        max_mentions: int | None = None,
        after: bool = False,
        without_predicted: bool = False,
        num_prompt_tokens: int = 0,
        writer: TripleWriter | None = None,
    ) -> None:
        if max_mentions is not None and max_mentions < 1:
            raise ValueError(f"max_mentions={max_mentions} must be at least 1, or None for all.")
        self.graph, self.vectors, self.aligner = graph, vectors, aligner
        self.num_neighbours, self.max_mentions, self.after = num_neighbours, max_mentions, after
        self.without_predicted = without_predicted
        self.num_prompt_tokens, self.writer = num_prompt_tokens, writer
        self._neighbours: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> KnowledgeBatcher:
        return self  # a copy of a model shares the graph

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the rows."""
        return self.aligner.tokenizer

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are linked."""
        return self.aligner.text_columns

    # ---- batches of a collator ----

    def add_to(self, rows: Sequence[Any], batch: MutableMapping[str, Any]) -> None:
        """Add the inputs that the mentions of these rows make to their batch.

        Raises:
            ValueError: If the batch is not one padded sequence of tokens for each row.
        """
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
        mentions = []
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping) or "input_ids" not in row:
                found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
                raise ValueError(
                    f"Knowledge needs tokenised rows with input_ids, got {found}. Tokenise the "
                    "dataset before training."
                )
            shift = _shift(row, ids[number], _at(batch.get("attention_mask"), number))
            mentions.append([(m, m.start + shift, m.end + shift) for m in self.aligner(row)])
        if self.without_predicted and isinstance(labels := batch.get("labels"), torch.Tensor):
            mentions = [
                [found for found in row if bool((own[found[1] : found[2]] == IGNORED).all())]
                for row, own in zip(mentions, labels, strict=True)
            ]
        mentions = [row[: self.max_mentions] for row in mentions]
        if self.writer is not None:
            self.writer.add_to(batch, mentions)
            return
        knowledge = self._gathered(mentions)
        if self.num_prompt_tokens:
            token = next(
                t
                for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
                if t is not None
            )
            spans = add_prompt_tokens(batch, knowledge.spans, self.num_prompt_tokens, token)
            knowledge = replace(knowledge, spans=spans)
        batch.update(knowledge.inputs())

    def encode(self, texts: Sequence[str], **options: Any) -> dict[str, torch.Tensor]:
        """Texts as inputs of the model, with what the graph says of them.

        Args:
            texts: The texts.
            **options: For the tokenizer; by default padding, and truncation to what it allows.
        """
        options = {"padding": True, "truncation": True, **options}
        encoded = self.tokenizer(list(texts), **options, return_tensors="pt")
        rows = [
            {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), self.text_columns[0]: text}
            for ids, mask, text in zip(
                encoded["input_ids"], encoded["attention_mask"], texts, strict=True
            )
        ]
        batch = dict(encoded)
        self.add_to(rows, batch)
        return batch

    # ---- batches of tokens alone ----

    def of_tokens(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Knowledge:
        """The mentions of a batch of which only the tokens are left.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 on real tokens; None if all are.
        """
        mentions = []
        for number, ids in enumerate(input_ids.tolist()):
            row = {"input_ids": ids}
            mask = _at(attention_mask, number)
            if mask is not None and mask.ndim == 1 and len(mask) == len(ids):
                row["attention_mask"] = mask.tolist()
            found = self.aligner(row, TOKENS_ALONE)[: self.max_mentions]
            mentions.append([(m, m.start, m.end) for m in found])
        knowledge = self._gathered(mentions)
        moved = {name: value.to(input_ids.device) for name, value in knowledge.inputs().items()}
        return Knowledge(**{name.removeprefix("knowledge_"): v for name, v in moved.items()})

    # ---- gathering ----

    def _gathered(self, rows: Sequence[Sequence[tuple[TokenMention, int, int]]]) -> Knowledge:
        assert self.vectors is not None
        kept = rows
        most = max(1, *(len(row) for row in kept)) if kept else 1
        choices = max([1, *(len(m.mention.candidates) for row in kept for m, _, _ in row)])
        shape = (len(kept), most, choices)
        spans = np.zeros((*shape[:2], 2), dtype=np.int64)
        entities = np.full(shape, -1, dtype=np.int64)
        priors = np.zeros(shape, dtype=np.float32)
        for i, row in enumerate(kept):
            for j, (found, start, end) in enumerate(row):
                spans[i, j] = (end, end + 1) if self.after else (start, end)
                for k, candidate in enumerate(found.mention.candidates):
                    entities[i, j, k], priors[i, j, k] = candidate.entity, candidate.prior
        parts = [spans, entities, priors, self.vectors.gather(entities)]
        if self.num_neighbours:
            others, relations = self._neighbours_of(entities)
            parts += [self.vectors.gather(others), relations]
        return Knowledge(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))

    def _neighbours_of(self, entities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours and relations, (..., num_neighbours), -1 where there are fewer."""
        shape = (*entities.shape, self.num_neighbours)
        others, relations = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
        for place in np.argwhere(entities >= 0):
            entity = int(entities[tuple(place)])
            if entity not in self._neighbours:
                if len(self._neighbours) >= CACHED_NEIGHBOURS:
                    self._neighbours.clear()
                self._neighbours[entity] = self.graph.neighbours(entity, limit=self.num_neighbours)
            found_relations, found_entities = self._neighbours[entity]
            others[(*place, slice(len(found_entities)))] = found_entities
            relations[(*place, slice(len(found_relations)))] = found_relations
        return others, relations


def make_batcher(
    model: nn.Module,
    injector: KnowledgeInjector,
    graph: Any,
    vectors: Vectors | None,
    aligner: TokenAligner,
    max_mentions: int | None = None,
) -> KnowledgeBatcher:
    """What makes batches for an injector on a model.

    Raises:
        ValueError: If the model cannot read facts as text.
    """
    writer = None
    if injector.text is not None:
        check_visibility(model)
        writer = TripleWriter(graph, aligner.tokenizer, injector.text, first_position(model))
    prompts = injector.num_prompt_tokens
    after = injector.tokens == "after" or (injector.tokens == "auto" and is_causal_lm(model))
    return KnowledgeBatcher(
        graph,
        vectors,
        aligner,
        injector.num_neighbours,
        max_mentions if not prompts else min(max_mentions or prompts, prompts),
        after and not prompts,
        has_head(model, "masked_lm"),
        prompts,
        writer,
    )


def _at(values: Any, number: int) -> torch.Tensor | None:
    return values[number] if isinstance(values, torch.Tensor) and values.ndim >= 2 else None


def _shift(row: Mapping[str, Any], ids: torch.Tensor, mask: torch.Tensor | None) -> int:
    """How many tokens of padding the collator put before a row.

    Raises:
        ValueError: If the row cannot be found in the batch.
    """
    own = torch.as_tensor(row["input_ids"])
    more = len(ids) - len(own)
    if more == 0:
        return 0
    if more < 0:
        return 0  # cut off by the collator, on the right
    if torch.equal(ids[: len(own)], own):
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
        "collator made of it, and there is no attention_mask: the mentions' places are unknown. "
        "Let the collator return the attention_mask."
    )
