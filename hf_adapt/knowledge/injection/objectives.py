"""Auxiliary losses on the graph: entity prediction, link prediction, description alignment.

Each reads the mentions that a [`KnowledgeInjection`] puts into the batches, so it stands after one
in the same run. Negatives and masked mentions are pure functions of seed, step and row: how rows
are batched, over how many processes, and resuming change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from hf_adapt.engine.adaptation import Objective
from hf_adapt.engine.batch import Batch, Rows
from hf_adapt.engine.mixins import BatchTransform
from hf_adapt.engine.parts import Part
from hf_adapt.engine.progress import Schedule
from hf_adapt.knowledge.injection.inputs import Knowledge, knowledge_of
from hf_adapt.knowledge.injection.knowledge_injection import KnowledgeInjection
from hf_adapt.knowledge.vectors.table import EntityVectors
from hf_adapt.models.capture import Extract
from hf_adapt.models.hashing import row_hash
from hf_adapt.models.pooling import pool

NEGATIVES = "knowledge_negatives"
DESCRIPTIONS = ("knowledge_description_ids", "knowledge_description_mask")
Scored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def entity_scores_loss(
    predicted: torch.Tensor, positive: torch.Tensor, negatives: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the right entity among wrong ones, by scaled dot products.

    Reference:
        Zhang et al. 2019, "ERNIE", arXiv:1905.07129, Eq. 5. Deviation: sampled negatives in place
        of the entities of the batch, and a factor 1/√D.

    Shape:
        - predicted: (N, D), positive: (N, D), negatives: (N, K, D); output: (N,) nats.
    """
    own = (predicted * positive).sum(-1, keepdim=True)
    other = torch.einsum("nd,nkd->nk", predicted, negatives)
    scores = torch.cat([own, other], dim=1) / predicted.shape[-1] ** 0.5
    return cross_entropy(scores, torch.zeros_like(scores[:, 0], dtype=torch.long), reduction="none")


class _GraphObjective(BatchTransform, Objective):
    """What the losses have in common: the injection, negatives, one item for each mention."""

    uses_logits = False

    def __init__(
        self,
        injection: KnowledgeInjection,
        weight: float | Schedule = 0.1,
        num_negatives: int = 16,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name=name)
        if num_negatives < 1:
            raise ValueError(f"num_negatives={num_negatives} must be at least 1.")
        self._check(injection)
        self.injection, self.num_negatives = injection, num_negatives
        self._seed = 0

    def _check(self, injection: KnowledgeInjection) -> None:
        if not isinstance(injection, KnowledgeInjection):
            raise ValueError(
                f"{type(self).__name__} compares entity vectors and expects a KnowledgeInjection, "
                f"got {type(injection).__name__}, which has none."
            )

    def setup(self, trainer: Trainer) -> None:
        """Take the run's seed."""
        self._seed = trainer.args.seed
        if self.injection.attachment is None:
            raise ValueError(
                f"{self.name} needs its KnowledgeInjection in the same run, before it: "
                "adapt(trainer, injection, objective)."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A worker process makes batches; what belongs to the model stays where it is.
        return {key: value for key, value in vars(self).items() if key != "module"}

    @property
    def _inputs(self) -> tuple[str, ...]:
        return (f"{NEGATIVES}_{self.name}",)

    def extra_inputs(self, trainer: Trainer) -> tuple[str, ...]:
        """The negatives; the model does not see them."""
        return self._inputs

    def transform_batch(self, rows: Sequence[Any], batch: MutableMapping[str, Any]) -> None:
        """Add vectors of other entities for each mention."""
        entities: torch.Tensor = batch["knowledge_entities"][..., 0]
        hashes = row_hash(batch["input_ids"], batch.get("attention_mask"))
        graph = self.injection.graph
        drawn = np.empty((*entities.shape, self.num_negatives), dtype=np.int64)
        for row, number in np.ndindex(*entities.shape):
            seed = [self._seed, int(hashes[row]) & 0xFFFFFFFF, number]
            generator = np.random.default_rng(seed)
            drawn[row, number] = generator.integers(0, graph.num_entities, self.num_negatives)
        # The right one is no wrong one: its neighbour in the numbering stands in.
        same = drawn == entities.numpy()[..., None]
        drawn = np.where(same, (drawn + 1) % graph.num_entities, drawn)
        batch[self._inputs[0]] = torch.from_numpy(self._vectors.gather(drawn))

    @property
    def _vectors(self) -> EntityVectors:
        assert self.injection.vectors is not None
        return self.injection.vectors

    def _made(self, given: torch.Tensor) -> torch.Tensor:
        """What the module makes of something."""
        assert self.module is not None
        made: torch.Tensor = self.module(given)
        return made

    def _to_vectors(self, hidden: torch.Tensor) -> nn.Module:
        """From hidden states to entity vectors."""
        return nn.Linear(hidden.shape[-1], self._vectors.dimension)

    def _negatives(self, part: Part) -> torch.Tensor:
        negatives: torch.Tensor = part.extra[self._inputs[0]]
        return negatives.float()

    def _chosen(self, part: Part, knowledge: Knowledge) -> torch.Tensor:
        """Which mentions are items, (B, M) bool."""
        return knowledge.entities[..., 0] >= 0

    def num_items(self, rows: Rows) -> torch.Tensor:
        """The mentions that are items."""
        return torch.stack([self._chosen(p, _known(p)).sum() for p in rows.parts]).sum()

    def _scored(self, part: Part, knowledge: Knowledge, chosen: torch.Tensor) -> Scored:
        """What is predicted for each item, the right vector and wrong ones."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over items, and their number."""
        total = torch.zeros((), device=batch.parts[0].domain.device)
        for part in batch.parts:
            knowledge = _known(part)
            chosen = self._chosen(part, knowledge)
            if bool(chosen.any()):
                total = total + entity_scores_loss(*self._scored(part, knowledge, chosen)).sum()
            elif self.module is not None:  # every process must reach every parameter
                total = total + sum(p.sum() * 0.0 for p in self.module.parameters())
        return total, self.num_items(batch)

    def _reader(self) -> nn.Module:
        """The part of the model that reads the text and gives hidden states."""
        assert self.injection.attachment is not None
        reader = self.injection.attachment.reader
        body = getattr(reader, "base_model", reader)
        return body if isinstance(body, nn.Module) else reader


def _known(part: Part) -> Knowledge:
    knowledge = knowledge_of(part.inputs)
    if knowledge is None:
        raise ValueError(
            "The batch has no mentions: list the KnowledgeInjection before its objectives."
        )
    return knowledge


class EntityPrediction(_GraphObjective):
    """The model must say which entity a mention is, where the graph does not tell it.

    The vectors of some mentions are masked, and predicted from the last hidden states of their
    tokens. Keeps the model from leaning on the graph alone, and teaches it the entities.

    Reference:
        Zhang et al. 2019, "ERNIE: Enhanced Language Representation with Informative Entities",
        arXiv:1905.07129, section 3.4 (denoising entity auto-encoder, Eq. 5). Deviation: mentions
        are masked, not replaced, and negatives are sampled from the graph.

    Args:
        injection: The injection whose mentions are read.
        weight: Factor of the term, or a schedule.
        mask_rate: Share of mentions that are masked; 0.15 in the paper.
        num_negatives: Other entities that each is compared with.
        name: Prefix of what is logged and stored.

    Logs:
        `loss/entity_prediction`.

    Raises:
        ValueError: If a number is out of range, or another share is masked already.

    Example:
        ```python
        injection = KnowledgeInjection(graph)
        adapt(trainer, injection, EntityPrediction(injection))
        ```
    """

    name = "entity_prediction"

    def __init__(
        self,
        injection: KnowledgeInjection,
        weight: float | Schedule = 0.1,
        mask_rate: float = 0.15,
        num_negatives: int = 16,
        name: str | None = None,
    ) -> None:
        super().__init__(injection, weight, num_negatives, name)
        if not 0 < mask_rate <= 1:
            raise ValueError(f"mask_rate={mask_rate} must be above 0 and at most 1.")
        if self.is_active:
            injection.mask_mentions(mask_rate)

    def captures(self, model: nn.Module) -> Mapping[nn.Module, Extract | None]:
        """What reads the text: its last hidden state."""
        return {self._reader(): None}

    def build_modules(self, batch: Batch) -> nn.Module:
        """From hidden states to entity vectors."""
        return self._to_vectors(self._hidden(batch.parts[0]))

    def _hidden(self, part: Part) -> torch.Tensor:
        return part.hidden[id(self._reader())].float()

    def _chosen(self, part: Part, knowledge: Knowledge) -> torch.Tensor:
        return self.injection.masked_mentions(knowledge, part)

    def _scored(self, part: Part, knowledge: Knowledge, chosen: torch.Tensor) -> Scored:
        hidden = self._hidden(part)
        tokens = knowledge.token_mask(hidden.shape[1]).float()
        mean = tokens @ hidden / tokens.sum(-1, keepdim=True).clamp(min=1)
        positive = knowledge.vectors[..., 0, :].float()[chosen]
        return self._made(mean[chosen]), positive, self._negatives(part)[chosen]


class LinkPrediction(_GraphObjective):
    """The injector's own view of the entities must tell true facts from false ones.

    For each mention one of its facts (head, relation, tail), of the neighbours that the injector
    reads, is scored by DistMult on the projected vectors, against tails drawn at random.

    Reference:
        Yang et al. 2015, "Embedding Entities and Relations for Learning and Inference in Knowledge
        Bases" (DistMult), arXiv:1412.6575, Eq. 2. Deviation: softmax over sampled tails.

    Args:
        injection: The injection; its injector must read neighbours (`num_neighbours`).
        weight: As for [`EntityPrediction`].
        num_negatives: Tails drawn for each fact.
        name: As for [`EntityPrediction`].

    Logs:
        `loss/link_prediction`.

    Raises:
        ValueError: If the injector reads no neighbours.
    """

    name = "link_prediction"

    def _check(self, injection: KnowledgeInjection) -> None:
        super()._check(injection)
        if injection.injector.num_neighbours < 1:
            raise ValueError(
                "LinkPrediction needs facts: give the injector num_neighbours=1 or more."
            )

    def build_modules(self, batch: Batch) -> nn.Module:
        """A vector for each relation and its inverse."""
        layer: Any = self.injection.injector.injection_layers[0]
        relations = nn.Embedding(2 * self.injection.graph.num_relations, layer.value.out_features)
        nn.init.ones_(relations.weight)
        return relations

    def _chosen(self, part: Part, knowledge: Knowledge) -> torch.Tensor:
        assert knowledge.relations is not None
        return knowledge.relations[..., 0, 0] >= 0

    def _scored(self, part: Part, knowledge: Knowledge, chosen: torch.Tensor) -> Scored:
        assert knowledge.neighbours is not None and knowledge.relations is not None
        layer: Any = self.injection.injector.injection_layers[0]

        def seen(vectors: torch.Tensor) -> torch.Tensor:
            projected: torch.Tensor = layer.value(layer.norm(vectors.float()))
            return projected

        head = seen(knowledge.vectors[..., 0, :][chosen])
        tail = seen(knowledge.neighbours[..., 0, 0, :][chosen])
        relation = self._made(knowledge.relations[..., 0, 0][chosen])
        return head * relation, tail, seen(self._negatives(part)[chosen])


class DescriptionAlignment(_GraphObjective):
    """The model's encoding of an entity's description must point to the entity's vector.

    The description of each row's first entity goes through the model, which is thereby taught to
    read the graph's texts; entity and text then live in one space.

    Reference:
        Wang et al. 2021, "KEPLER: A Unified Model for Knowledge Embedding and Pre-trained Language
        Representation", arXiv:1911.06136, section 3.2, where encoded descriptions are the entities'
        embeddings. Deviation: they are aligned with given vectors by cross-entropy over sampled
        entities, in place of TransE on pairs of descriptions, which needs three more forwards.

    Args:
        injection: The injection whose mentions are read.
        weight: Factor of the term, or a schedule.
        num_negatives: Other entities that each is compared with.
        max_length: Tokens of a description that are read.
        name: Prefix of what is logged and stored.

    Logs:
        `loss/description_alignment`.

    Raises:
        ValueError: If no entity of the graph has a description.
    """

    name = "description_alignment"

    def __init__(
        self,
        injection: KnowledgeInjection,
        weight: float | Schedule = 0.1,
        num_negatives: int = 16,
        max_length: int = 32,
        name: str | None = None,
    ) -> None:
        super().__init__(injection, weight, num_negatives, name)
        self.max_length = max_length
        graph = injection.graph
        if not any(graph.description(e) for e in range(min(graph.num_entities, 10_000))):
            raise ValueError(
                "No entity of the graph has a description: pass descriptions= to "
                "KnowledgeGraph.from_triples."
            )

    @property
    def _inputs(self) -> tuple[str, ...]:
        return (*super()._inputs, *DESCRIPTIONS)

    def transform_batch(self, rows: Sequence[Any], batch: MutableMapping[str, Any]) -> None:
        """Add the tokens of each row's first described entity."""
        super().transform_batch(rows, batch)
        entities = batch["knowledge_entities"][:, 0, 0].tolist()
        describe = self.injection.graph.description
        texts = [(describe(entity) if entity >= 0 else None) or "" for entity in entities]
        assert self.injection._batcher is not None
        options = dict(padding="max_length", truncation=True, max_length=self.max_length)
        encoded = self.injection._batcher.tokenizer(texts, **options, return_tensors="pt")
        there = torch.tensor([bool(text) for text in texts])
        batch[DESCRIPTIONS[0]] = encoded["input_ids"]
        batch[DESCRIPTIONS[1]] = encoded["attention_mask"] * there.unsqueeze(1)

    def _chosen(self, part: Part, knowledge: Knowledge) -> torch.Tensor:
        chosen = torch.zeros_like(knowledge.entities[..., 0], dtype=torch.bool)
        chosen[:, 0] = part.extra[DESCRIPTIONS[1]].any(1)
        return chosen

    def build_modules(self, batch: Batch) -> nn.Module:
        """From encoded descriptions to entity vectors."""
        return self._to_vectors(self._encoded(batch.parts[0], slice(0, 1)))

    def _encoded(self, part: Part, rows: Any) -> torch.Tensor:
        ids, mask = (part.extra[name][rows] for name in DESCRIPTIONS)
        mask = mask.clone()
        mask[:, 0] = 1  # a row of padding alone is NaN in some models
        with self.injection.autocast(), self.injection.without_knowledge():
            output = self._reader()(input_ids=ids, attention_mask=mask, return_dict=True)
        return pool(output["last_hidden_state"], mask.bool(), "mean")

    def _scored(self, part: Part, knowledge: Knowledge, chosen: torch.Tensor) -> Scored:
        rows = chosen[:, 0]
        positive = knowledge.vectors[:, 0, 0].float()[rows]
        return self._made(self._encoded(part, rows)), positive, self._negatives(part)[:, 0][rows]
