"""Injection layers: gated addition, cross-attention and an adapter.

Each starts as an exact no-op, because its last projection starts at zero, and adds exactly nothing
where there is no mention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from hf_adapt.knowledge.injection.inputs import Knowledge

Record = dict[str, torch.Tensor]
"""What an injection layer did with each mention, for `explain`."""


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of an injection layer, known once the model has run.

    Args:
        hidden_size: Of the hidden states.
        entity_size: Of the entity vectors.
        inner_size: Between them.
        num_relations: Number of relations, inverses included; 0 if no neighbours are read.
        is_causal: Whether a token may depend on those before it only.
    """

    hidden_size: int
    entity_size: int
    inner_size: int
    num_relations: int = 0
    is_causal: bool = False


class RelationalAggregation(nn.Module):
    """An entity's vector with its neighbours' added, relation by relation: message passing.

    `e + W mean over neighbours (r * e')`, with a learned vector r for each relation and for its
    inverse. W starts at zero: at first an entity is itself.

    Reference:
        Vashishth et al. 2020, "Composition-based Multi-Relational Graph Convolutional Networks",
        arXiv:1911.03082, the composition by product of its section 4.1. Deviation: one layer, one
        W for all relations.
    """

    def __init__(self, dimension: int, num_relations: int, averages: bool = True) -> None:
        super().__init__()
        self.relation = nn.Embedding(num_relations, dimension)
        nn.init.ones_(self.relation.weight)
        self.output: nn.Linear | None = None
        if averages:
            self.output = nn.Linear(dimension, dimension, bias=False)
            nn.init.zeros_(self.output.weight)

    def messages(self, knowledge: Knowledge) -> tuple[torch.Tensor, torch.Tensor]:
        """What each neighbour says, (B, M, K, N, D), and which there are, (B, M, K, N) bool."""
        assert knowledge.neighbours is not None and knowledge.relations is not None
        present = knowledge.relations >= 0
        relation = self.relation(knowledge.relations.clamp(min=0))
        return knowledge.neighbours.float() * relation * present.unsqueeze(-1), present

    def forward(self, knowledge: Knowledge) -> torch.Tensor:
        """The vectors of the candidates, (B, M, K, D)."""
        assert self.output is not None
        messages, present = self.messages(knowledge)
        mean = messages.sum(-2) / present.sum(-1, keepdim=True).clamp(min=1)
        result: torch.Tensor = knowledge.vectors.float() + self.output(mean)
        return result


def size_of(hidden: torch.Tensor) -> torch.Tensor:
    """The root mean square of each hidden state.

    Word embeddings of MiniLM-L6 are of size 0.06, its layers' outputs of 0.5. In units of it one
    learning rate does everywhere; else a few dozen steps drown the embeddings.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return norm / math.sqrt(hidden.shape[-1])


class InjectionLayer(nn.Module):
    """What an injector adds to the hidden states at one injection point.

    A subclass takes the sizes and its own options, and defines `mention_values`; the base takes
    the mean hidden state of each mention's tokens, and adds the output projection of the values to
    the same tokens. The injector divides hidden states by their size before, and multiplies what
    is added by it.

    Args:
        sizes: Sizes of the hidden states and the entity vectors.
    """

    averages_neighbours = True
    changes_input = False
    """Whether it changes the tokens of a batch, and not hidden states alone."""
    is_relative = True
    """Whether what it reads and adds is in units of the hidden states' own size."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        # Tables differ in scale by orders of magnitude (TransE against word vectors).
        self.norm = nn.LayerNorm(sizes.entity_size)
        self.aggregation: RelationalAggregation | None = None
        if sizes.num_relations:
            self.aggregation = RelationalAggregation(
                sizes.entity_size, sizes.num_relations, self.averages_neighbours
            )
        self.output = nn.Linear(sizes.inner_size, sizes.hidden_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def candidates(self, knowledge: Knowledge) -> torch.Tensor:
        """The normalised vectors of the candidates, (B, M, K, D)."""
        if self.aggregation is not None and knowledge.neighbours is not None:
            vectors = self.aggregation(knowledge)
        else:
            vectors = knowledge.vectors.float()
        normed: torch.Tensor = self.norm(vectors)
        return normed

    def entity(self, knowledge: Knowledge) -> torch.Tensor:
        """The candidates' mean vector by their priors, (B, M, D)."""
        priors = knowledge.priors.float().unsqueeze(-1)
        return (priors * self.candidates(knowledge)).sum(2)

    def mention_values(
        self, query: torch.Tensor, knowledge: Knowledge, record: Record | None
    ) -> torch.Tensor:
        """What the graph has to say at each mention; `record` is what `explain` shows.

        Shape:
            - query: (B, M, H), the mean hidden states of the mentions' tokens; output: (B, M,
              inner_size).
        """
        raise NotImplementedError

    def forward(
        self, hidden: torch.Tensor, knowledge: Knowledge, record: Record | None = None
    ) -> torch.Tensor:
        """What to add to the hidden states; both are float32, in units of the states' size.

        Shape:
            - hidden: (B, T, H); output: (B, T, H).
        """
        tokens = knowledge.token_mask(hidden.shape[1]).to(hidden.dtype)
        query = tokens @ hidden / tokens.sum(-1, keepdim=True).clamp(min=1)
        values = self.mention_values(query, knowledge, record)
        added: torch.Tensor = tokens.transpose(1, 2) @ self.output(values)
        return added

    def row_values(
        self, query: torch.Tensor, knowledge: Knowledge, record: Record | None = None
    ) -> torch.Tensor:
        """What to add to one vector per row, (B, H), in units of its size: the mentions' mean."""
        there = knowledge.candidate_mask.any(-1).to(query.dtype).unsqueeze(-1)
        each = query.unsqueeze(1).expand(-1, there.shape[1], -1)
        values = self.output(self.mention_values(each, knowledge, record)) * there
        mean: torch.Tensor = values.sum(1) / there.sum(1).clamp(min=1)
        return mean


class GatedAddition(InjectionLayer):
    """The candidates' mean vector by their priors, let in by a gate that reads the context.

    `h + W_o (σ(W_g [h; v]) * v)`, v = W_v e, at the tokens of a mention. The simplest
    injection layer, and the one to begin with.

    Reference:
        Zhang et al. 2019, "ERNIE: Enhanced Language Representation with Informative Entities",
        arXiv:1905.07129, Eq. 4. Deviation: a gate, no token-to-token fusion, and no encoder of
        entities beside the text's.
    """

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__(sizes)
        self.value = nn.Linear(sizes.entity_size, sizes.inner_size)
        self.gate = nn.Linear(sizes.hidden_size + sizes.inner_size, sizes.inner_size)

    def mention_values(
        self, query: torch.Tensor, knowledge: Knowledge, record: Record | None
    ) -> torch.Tensor:
        """The gated mean of the candidates; see the base."""
        value = self.value(self.entity(knowledge))
        gate = torch.sigmoid(self.gate(torch.cat([query, value], dim=-1)))
        if record is not None:
            record["attention"] = knowledge.priors.float()
            record["gate"] = gate.mean(-1)
        gated: torch.Tensor = gate * value
        return gated


class CrossAttention(InjectionLayer):
    """The mention attends to its candidates, their neighbours and a "no knowledge" sentinel.

    Where the context fits no candidate the sentinel takes the attention, and nothing is added.

    Reference:
        Peters et al. 2019, "Knowledge Enhanced Contextual Word Representations" (KnowBert),
        arXiv:1909.04164, section 3.3: priors and sentinel. Deviation: attention by scaled dot
        product, with the logarithm of the prior added to the score; no span self-attention; the
        attended knowledge goes to the mention's own tokens only.

    Args:
        sizes: Sizes; `inner_size` is that of keys and values, all heads together.
        num_heads: Attention heads; they must divide `inner_size`.

    Raises:
        ValueError: If they do not.
    """

    averages_neighbours = False

    def __init__(self, sizes: LayerSizes, num_heads: int = 4) -> None:
        super().__init__(sizes)
        if sizes.inner_size % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide inner_size={sizes.inner_size}: the heads "
                "share it. Give a divisor."
            )
        self.num_heads = num_heads
        self.query = nn.Linear(sizes.hidden_size, sizes.inner_size)
        self.key = nn.Linear(sizes.entity_size, sizes.inner_size)
        self.value = nn.Linear(sizes.entity_size, sizes.inner_size)
        self.sentinel = nn.Parameter(torch.zeros(sizes.inner_size))

    def _slots(self, knowledge: Knowledge) -> tuple[torch.Tensor, torch.Tensor]:
        """What can be attended to, (B, M, S, D), and its log-prior, (B, M, S)."""
        vectors = self.norm(knowledge.vectors.float())
        priors = knowledge.priors.float()
        if self.aggregation is not None and knowledge.neighbours is not None:
            messages, present = self.aggregation.messages(knowledge)
            share = priors.unsqueeze(-1) * present / present.sum(-1, keepdim=True).clamp(min=1)
            vectors = torch.cat([vectors, self.norm(messages).flatten(2, 3)], dim=2)
            priors = torch.cat([priors, share.flatten(2)], dim=2)
        return vectors, torch.where(priors > 0, priors, 1).log().masked_fill(priors <= 0, -math.inf)

    def mention_values(
        self, query: torch.Tensor, knowledge: Knowledge, record: Record | None
    ) -> torch.Tensor:
        """The attended candidates and neighbours; see the base."""
        vectors, log_priors = self._slots(knowledge)
        heads = (self.num_heads, self.sizes.inner_size // self.num_heads)
        asked = self.query(query).unflatten(-1, heads)
        keys = self.key(vectors).unflatten(-1, heads)
        values = self.value(vectors).unflatten(-1, heads)
        scores = torch.einsum("bmhd,bmshd->bmhs", asked, keys) / math.sqrt(heads[1])
        scores = scores + log_priors.unsqueeze(2)
        nothing = (asked * self.sentinel.view(heads)).sum(-1, keepdim=True) / math.sqrt(heads[1])
        # The sentinel is there for every mention, so that no softmax is over nothing.
        attention = torch.cat([scores, nothing], dim=-1).softmax(-1)[..., :-1]
        if record is not None:
            mean = attention.mean(2)
            record["attention"] = mean[..., : knowledge.vectors.shape[2]]
            record["gate"] = mean.sum(-1)
            if mean.shape[-1] > knowledge.vectors.shape[2]:
                more = mean[..., knowledge.vectors.shape[2] :]
                shape = (*more.shape[:-1], knowledge.vectors.shape[2], -1)
                record["neighbour_attention"] = more.reshape(shape)
        attended = torch.einsum("bmhs,bmshd->bmhd", attention, values).flatten(2)
        return attended


class KnowledgeAdapter(InjectionLayer):
    """A small transformer beside the layer, which reads the row's text and its entities.

    The hidden states are projected down, each mention's entity is added to its tokens, layers of
    self-attention run over the row, and the result is projected up and added to every token of
    the row. A row without a mention is left as it is. In a causal language model each token sees
    itself alone and the mentions' tokens are added to: what lies in a cache cannot be read again.

    Reference:
        Wang et al. 2020, "K-Adapter: Infusing Knowledge into Pre-Trained Models with Adapters",
        arXiv:2002.01808, section 3.1: projection, transformer layers, projection. Deviation: it
        reads entities of a graph rather than being trained on their relations beforehand, and the
        result is added to the layer's output instead of joining the last one.

    Args:
        sizes: Sizes; `inner_size` is that of the adapter's own transformer.
        num_layers: Of the adapter's own transformer.
        num_heads: Attention heads; they must divide `inner_size`.
    """

    def __init__(self, sizes: LayerSizes, num_layers: int = 1, num_heads: int = 4) -> None:
        super().__init__(sizes)
        inner = sizes.inner_size
        self.down = nn.Linear(sizes.hidden_size, inner)
        self.value = nn.Linear(sizes.entity_size, inner)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                inner, num_heads, 4 * inner, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )

    def _unseen(self, hidden: torch.Tensor, knowledge: Knowledge) -> torch.Tensor | None:
        """What a token does not see, (T, T) or (B * heads, T, T) bool, True where it does not."""
        length = hidden.shape[1]
        if self.sizes.is_causal:
            return ~torch.eye(length, dtype=torch.bool, device=hidden.device)
        if knowledge.mask is None or knowledge.mask.shape != hidden.shape[:2]:
            return None
        # Padding sees all and is seen by none: a row of padding alone must not become NaN.
        heads = self.layers[0].self_attn.num_heads  # type: ignore[union-attr]
        real = knowledge.mask.bool()
        unseen = ~real.unsqueeze(1) & real.unsqueeze(2)
        return unseen.repeat_interleave(heads, 0)  # type: ignore[arg-type]

    def forward(
        self, hidden: torch.Tensor, knowledge: Knowledge, record: Record | None = None
    ) -> torch.Tensor:
        """What to add to the hidden states of rows with a mention; see the base."""
        tokens = knowledge.token_mask(hidden.shape[1]).to(hidden.dtype)
        entity = self.entity(knowledge)
        inner = self.down(hidden) + tokens.transpose(1, 2) @ self.value(entity)
        unseen = self._unseen(hidden, knowledge)
        for layer in self.layers:
            inner = layer(inner, src_mask=unseen)
        if record is not None:
            record["attention"] = knowledge.priors.float()
        mentioned = tokens.amax(1).unsqueeze(-1) if self.sizes.is_causal else tokens.amax((1, 2))
        added: torch.Tensor = self.output(inner) * mentioned.view(len(hidden), -1, 1)
        return added

    def row_values(
        self, query: torch.Tensor, knowledge: Knowledge, record: Record | None = None
    ) -> torch.Tensor:
        """What to add to one vector per row, which the adapter reads as a row of one token."""
        there = knowledge.candidate_mask.any(-1).to(query.dtype).unsqueeze(-1)
        entity = self.entity(knowledge)
        mean = (self.value(entity) * there).sum(1) / there.sum(1).clamp(min=1)
        inner = (self.down(query) + mean).unsqueeze(1)
        for layer in self.layers:
            inner = layer(inner)
        if record is not None:
            record["attention"] = knowledge.priors.float()
        added: torch.Tensor = self.output(inner.squeeze(1)) * there.amax(1)
        return added
