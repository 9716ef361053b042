"""Facts as text in the input, seen by their mention alone: K-BERT's trees without surgery."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hf_adapt.engine.labels import IGNORED
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.adaptation import KnowledgeAdaptation
from hf_adapt.knowledge.injection.attachment import Attachment
from hf_adapt.knowledge.injection.batcher import MentionBatcher, predicts_tokens
from hf_adapt.knowledge.linking.mentions import TokenMention
from hf_adapt.knowledge.linking.token_alignment import TokenAligner
from hf_adapt.models.state import preserved
from hf_adapt.models.structure import is_encoder_decoder, unwrapped_base

VISIBILITY = "knowledge_visibility"
"""(B, T, T) bool: which tokens a token sees. Not a mask of the model's own until its forward."""


class TextTriples(KnowledgeAdaptation):
    """Facts about each mention, written out and appended to the row.

    A fact's tokens have positions as if they followed their mention (soft positions), see the
    mention and each other, and are seen by the mention's tokens alone; to the rest of the text they
    are not there. Meant for encoders that take a mask of shape (B, 1, T, T) and position_ids (BERT,
    RoBERTa and many others; whether a model does is tried before training). It has no weights, and
    the model's output differs from the first step on, in training, evaluation and prediction. Where
    facts are better learned as vectors, or the model is a decoder, see [`KnowledgeInjection`].

    Reference:
        Liu et al. 2020, "K-BERT: Enabling Language Representation with Knowledge Graph",
        arXiv:1909.07606, sections 3.3 and 3.4. Deviation: facts stand at the end of the row, which
        positions and mask make equal to its tree; the facts are the graph's first ones for the most
        likely candidate rather than a set's first two, which depend on the hash seed.

    Args:
        graph: The facts.
        linker: As for [`KnowledgeInjection`], and so are the other options.
        num_triples: Facts for each mention at most.
        max_tokens: Tokens of a fact at most.
        max_length: Tokens of a row with its facts at most; facts that do not fit are left out.
        text_column: The column(s) of the dataset with the text.
        max_mentions: Mentions of a row at most.
        save_graph: Whether the graph is put beside the final model.
        name: Prefix of what is stored.

    Raises:
        ValueError: If a number is not positive, or the model cannot hide tokens from each other.

    Example:
        ```python
        trainer.add_callback(AdaptationCallback(TextTriples(graph)))
        trainer.train()
        ```
    """

    name = "text_triples"
    added_inputs = (VISIBILITY,)

    def __init__(
        self,
        graph: KnowledgeGraph,
        linker: Any = None,
        num_triples: int = 2,
        max_tokens: int = 12,
        max_length: int = 512,
        text_column: str | Sequence[str] | None = None,
        max_mentions: int | None = None,
        save_graph: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(graph, linker, text_column, max_mentions, save_graph, name)
        if min(num_triples, max_tokens, max_length) < 1:
            raise ValueError(
                f"num_triples={num_triples}, max_tokens={max_tokens} and max_length={max_length} "
                "must be positive."
            )
        self.options = dict(num_triples=num_triples, max_tokens=max_tokens, max_length=max_length)

    @property
    def settings(self) -> dict[str, Any]:
        """What is saved beside the model, as plain values."""
        return {**super().settings, "text_triples": self.options}

    def _connect(self, trainer: Trainer, model: nn.Module, aligner: TokenAligner) -> None:
        self._batcher = batcher = make_triple_batcher(
            model, self.graph, aligner, self.max_mentions, self.options
        )
        if not self._is_attached(model):
            self.attachment = VisibilityAttachment(model, batcher)
        assert self.attachment is not None
        self.attachment.batcher = batcher

    def save(self, folder: str) -> None:
        """Write what `load_knowledge_model` needs beside the model."""
        self._save(folder, makes_vectors=False)


class VisibilityAttachment(Attachment):
    """Lets a model take which tokens a token sees."""

    input_names = (VISIBILITY,)

    def __init__(self, model: nn.Module, batcher: TripleBatcher) -> None:
        super().__init__(model)
        self.batcher = batcher
        self._install()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a mask of the visibility."""
        visible = kwargs.pop(VISIBILITY, None)
        if visible is None:
            self.warn(
                f"{type(self.model).__name__} was trained with TextTriples and got inputs without "
                f"facts ({VISIBILITY}). Make them with knowledge_inputs(model, texts)."
            )
            return
        dtype = next(self.model.parameters()).dtype
        kwargs["attention_mask"] = additive_mask(visible, dtype)


@dataclass(eq=False)
class TripleBatcher(MentionBatcher):
    """Writes the facts of a batch's mentions into it."""

    first_position: int = 0  # of a row's first token: more in RoBERTa's family
    num_triples: int = 2
    max_tokens: int = 12
    max_length: int = 512
    _facts: dict[int, list[list[int]]] = field(default_factory=dict, init=False)

    def facts(self, entity: int) -> list[list[int]]:
        """The tokens of an entity's facts: relation and neighbour, one list each."""
        if entity not in self._facts:
            relations, entities = self.graph.neighbours(
                entity, direction="out", limit=self.num_triples
            )
            texts = [
                f"{self.graph.relations[r]} {self.graph.label(e)}".replace("_", " ")
                for r, e in zip(relations.tolist(), entities.tolist(), strict=True)
            ]
            encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
            self._facts[entity] = [ids[: self.max_tokens] for ids in encoded if ids]
        return self._facts[entity]

    def add_mentions(
        self, batch: MutableMapping[str, Any], mentions: Sequence[Sequence[TokenMention]]
    ) -> None:
        """Append the facts to the rows of a batch, with positions and visibility."""
        ids: torch.Tensor = batch["input_ids"]
        rows, length = ids.shape
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        branches = [self._branches(row, length) for row in mentions]
        more = max(sum(len(tokens) for _, _, tokens in row) for row in branches)
        total = length + more
        grown = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": IGNORED}
        batch["attention_mask"] = mask
        for name, value in list(batch.items()):
            if isinstance(value, torch.Tensor) and value.shape == (rows, length):
                fill = value.new_full((rows, more), grown.get(name, 0))
                batch[name] = torch.cat([value, fill], dim=1)
        positions = _positions(mask, total, self.first_position)
        visible = torch.zeros(rows, total, total, dtype=torch.bool)
        real = mask.bool()
        visible[:, :length, :length] = real.unsqueeze(1) & real.unsqueeze(2)
        for number, row in enumerate(branches):
            at = length
            for start, end, tokens in row:
                stop = at + len(tokens)
                batch["input_ids"][number, at:stop] = torch.tensor(tokens)
                batch["attention_mask"][number, at:stop] = 1
                if (kinds := batch.get("token_type_ids")) is not None:
                    kinds[number, at:stop] = kinds[number, start]
                first = positions[number, end - 1] + 1
                positions[number, at:stop] = first + torch.arange(len(tokens))
                visible[number, at:stop, at:stop] = True
                visible[number, at:stop, start:end] = True
                visible[number, start:end, at:stop] = True
                at = stop
        batch["position_ids"] = positions
        batch[VISIBILITY] = visible

    def _branches(
        self, row: Sequence[TokenMention], length: int
    ) -> list[tuple[int, int, list[int]]]:
        found, left = [], self.max_length - length
        for own in row:
            for tokens in self.facts(own.mention.candidates[0].entity):
                if len(tokens) <= left:
                    found.append((own.start, own.end, tokens))
                    left -= len(tokens)
        return found


def make_triple_batcher(
    model: nn.Module,
    graph: KnowledgeGraph,
    aligner: TokenAligner,
    max_mentions: int | None,
    options: Mapping[str, int],
) -> TripleBatcher:
    """What makes batches with facts for a model."""
    check_visibility(model)
    return TripleBatcher(
        graph, aligner, max_mentions, predicts_tokens(model), first_position(model), **options
    )


def _positions(mask: torch.Tensor, total: int, first: int) -> torch.Tensor:
    """The positions that a model gives its tokens by itself, padding on the right."""
    if first == 0:
        return torch.arange(total).repeat(len(mask), 1)
    real = mask.bool()
    counted = real.long().cumsum(1) - 1 + first
    own = torch.where(real, counted, torch.full_like(counted, first - 1))
    rest = torch.full((len(mask), total - mask.shape[1]), first - 1)
    return torch.cat([own, rest], dim=1)


def first_position(model: nn.Module) -> int:
    """The position of the first token: one after the padding's in RoBERTa's family."""
    for module in unwrapped_base(model).modules():
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "padding_idx"):
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T): 0 where a token sees another, else the dtype's smallest value.

    A mask of bools is silently misread by eager attention.
    """
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min).unsqueeze(1)


@torch.no_grad()
def check_visibility(model: nn.Module) -> None:
    """Refuse a model that does not honour a mask for each pair of tokens."""
    base: Any = unwrapped_base(model)
    body = getattr(base, "base_model", base)
    name = type(base).__name__
    way_out = "Use KnowledgeInjection instead."
    if is_encoder_decoder(base) or (
        "position_ids" not in inspect.signature(type(body).forward).parameters
    ):
        raise ValueError(f"TextTriples needs an encoder with position_ids; {name} is none. "
                         f"{way_out}")  # fmt: skip
    parameter = next(base.parameters())
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]], device=parameter.device)
    positions = first_position(base) + torch.arange(3, device=parameter.device).repeat(2, 1)
    visible = torch.ones(2, 3, 3, dtype=torch.bool, device=parameter.device)

    def difference(hidden: bool | None) -> float:
        """By the last token, of the first one's state; None: as the model has it by itself."""
        visible[:, :2, 2] = not hidden
        mask = None if hidden is None else additive_mask(visible, parameter.dtype)
        output: Mapping[str, Any] = body(
            input_ids=ids, attention_mask=mask, position_ids=positions, return_dict=True
        )
        states = output["last_hidden_state"].float()
        return float((states[0, 0] - states[1, 0]).abs().max())

    try:
        with preserved(base):
            base.eval()
            unseen, seen, plain = difference(True), difference(False), difference(None)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{name} does not take a mask of shape (B, 1, T, T), which TextTriples needs: "
            f"{error}. {way_out}"
        ) from error
    if plain == 0:
        raise ValueError(
            f"TextTriples needs an encoder; {name} reads from left to right, and facts at "
            f"the end of a row would come too late. {way_out}"
        )
    if unseen > 1e-4 * max(seen, 1e-6) or seen == 0:
        raise ValueError(
            f"{name} does not honour a mask of shape (B, 1, T, T): a hidden token changed another "
            f"one's state by {unseen:.2g} (a visible one by {seen:.2g}). {way_out}"
        )
