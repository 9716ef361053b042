"""Knowledge injection: what a graph says of the entities in a text enters the hidden states."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hf_adapt.engine.batch import Batch
from hf_adapt.engine.parts import Part
from hf_adapt.engine.training import resumed_from
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.adaptation import KnowledgeAdaptation
from hf_adapt.knowledge.injection.attachment import attachment_of
from hf_adapt.knowledge.injection.batcher import make_batcher
from hf_adapt.knowledge.injection.injector import InjectorSizes, KnowledgeInjector
from hf_adapt.knowledge.injection.injector_attachment import InjectorAttachment
from hf_adapt.knowledge.injection.inputs import NAMES, Knowledge
from hf_adapt.knowledge.injection.knowledge_folder import resumed_vectors
from hf_adapt.knowledge.linking.token_alignment import TokenAligner
from hf_adapt.knowledge.vectors.table import EntityVectors
from hf_adapt.models.heads import is_causal_lm

logger = logging.getLogger(__name__)

MANY_DESCRIPTIONS = 300_000
"""Entities of which encoding the descriptions takes hours on a CPU."""

FEW_STEPS = 10
"""Optimizer steps after which an injection layer with a gradient has moved, warm-up or not."""


class KnowledgeInjection(KnowledgeAdaptation):
    """What a knowledge graph says of the entities in a text enters the model's hidden states.

    Texts are linked to the graph while batches are made, in training, evaluation and prediction.
    The injector starts as an exact no-op and trains beside the model, in an optimizer of its own;
    the model's own checkpoint stays a plain Hugging Face model. The injector stays on the model
    after training; [`load_knowledge_model`] loads both.

    Args:
        graph: The facts.
        vectors: A vector for each entity. By default the model's own encoding of the entities'
            names and descriptions, made before training.
        linker: Finds the entities in texts; `EntityLinker(graph)` by default.
        injector: Where and how; `KnowledgeInjector()` by default: gated addition to the input
            embeddings.
        text_column: The column(s) of the dataset with the text, in the order in which they were
            tokenised. By default `text`, and where the dataset has no such column, the text is what
            the tokens decode to. Rows linked beforehand by `linker.map` (a column `mentions`) are
            not linked again.
        max_mentions: Mentions of a row at most, the first ones; None for all.
        save_graph: Whether the graph and the vectors are put beside the final model. Checkpoints
            only name them, but hold the vectors that the run made itself: it resumes with them.
        learning_rate: Peak learning rate of the injector; it follows the run's schedule.
        weight_decay: Of the injector.
        name: Prefix of what is logged and stored.

    Logs:
        `knowledge/mentions_per_row`, `knowledge/rows_with_mention` (share).

    Raises:
        ValueError: If graph and vectors do not belong together, or the model cannot be injected
            into.

    Example:
        ```python
        adapt(trainer, KnowledgeInjection(graph), DANN(), target_dataset=target).train()
        ```
    """

    name = "knowledge"
    added_inputs = NAMES
    attachment: InjectorAttachment | None = None

    def __init__(
        self,
        graph: KnowledgeGraph,
        vectors: EntityVectors | None = None,
        linker: Any = None,
        injector: KnowledgeInjector | None = None,
        text_column: str | Sequence[str] | None = None,
        max_mentions: int | None = None,
        save_graph: bool = True,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(graph, linker, text_column, max_mentions, save_graph, name)
        if vectors is not None and len(vectors) != graph.num_entities:
            raise ValueError(
                f"The table has {len(vectors):,} entity vectors, and the graph "
                f"{graph.num_entities:,} entities: row i must be entity i. Read it with "
                "EntityVectors.from_file(path, graph), which finds entities by their keys."
            )
        self.vectors, self._makes_vectors = vectors, vectors is None
        self.injector = KnowledgeInjector() if injector is None else injector
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._counts: torch.Tensor | None = None
        self._has_warned = self._starts_again = self._has_checked_layers = False
        self._mask_rate = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """What is saved beside the model, as plain values."""
        return {**super().settings, "injector": self.injector.settings}

    # ---- the run ----

    def _connect(self, trainer: Trainer, model: nn.Module, aligner: TokenAligner) -> None:
        self.vectors = vectors = self._find_vectors(trainer, model, aligner.tokenizer)
        self._batcher = batcher = make_batcher(
            model, self.injector, self.graph, vectors, aligner, self.max_mentions
        )
        if not self._is_attached(model):
            loaded = attachment_of(model)
            if isinstance(loaded, InjectorAttachment) and loaded.injector is self.injector:
                self.attachment = loaded
            else:
                # A search over hyperparameters trains one model after the other.
                self._starts_again = self.attachment is not None
                self.attachment = InjectorAttachment(model, self.injector)
        assert self.attachment is not None
        self.attachment.connect(batcher)
        self.attachment.mask_rate, self._counts = self._mask_rate, None

    def _find_vectors(self, trainer: Trainer, model: nn.Module, tokenizer: Any) -> EntityVectors:
        """The vectors of the checkpoint, where the run made them; new ones where it starts.

        A resumed model has trained: it would encode the descriptions in another way.
        """
        checkpoint = resumed_from(trainer)
        if checkpoint is not None:
            given = None if self._makes_vectors else self.vectors
            if (found := resumed_vectors(checkpoint, self.graph, given)) is not None:
                return found
        if self.vectors is not None:
            return self.vectors
        if self.graph.num_entities > MANY_DESCRIPTIONS:
            logger.warning(
                "No vectors= were given, so the model encodes the descriptions of %s entities, "
                "which may take hours. EntityVectors.train or .from_file are quicker, and "
                ".save keeps what was made.",
                f"{self.graph.num_entities:,}",
            )
        return EntityVectors.from_descriptions(self.graph, model, tokenizer)

    def build_modules(self, batch: Batch) -> nn.Module | None:
        """The injector, with weights for the sizes that the first forward has shown."""
        assert self.attachment is not None and self.vectors is not None
        entity_size, built = self.vectors.dimension, self.injector.sizes
        if built is None or self._starts_again:
            self._starts_again = False
            sizes = [size for size in self.attachment.hidden_sizes if size is not None]
            if len(sizes) < len(self.attachment.points):
                pairs = zip(self.attachment.points, self.attachment.hidden_sizes, strict=True)
                raise ValueError(
                    f"The injection points {[p.location for p, n in pairs if not n]} were not run "
                    "by the model's forward, so nothing can be added there. Choose others in "
                    "layers=."
                )
            causal = is_causal_lm(batch.model)
            self.injector.build(InjectorSizes(sizes, entity_size, self.graph.num_relations, causal))
        elif built.entity_size != entity_size:
            raise ValueError(
                f"The injector was built for entity vectors of size {built.entity_size}, and the "
                f"table has {entity_size}. Pass the vectors it was trained with, or a new "
                "KnowledgeInjector."
            )
        return self.injector

    # ---- what an objective masks ----

    def mask_mentions(self, rate: float) -> None:
        """Mask a share of the mentions in training, for a loss that predicts them.

        Raises:
            ValueError: If another share is masked already.
        """
        if self._mask_rate not in (0.0, rate):
            raise ValueError(
                f"A share of {self._mask_rate} of the mentions is masked already, and {rate} is "
                "asked for. Give both objectives the same mask_rate, or each its own injection."
            )
        self._mask_rate = rate

    def masked_mentions(self, knowledge: Knowledge, part: Part) -> torch.Tensor:
        """Which mentions of these rows are masked in the step under way, (B, M) bool."""
        assert self.attachment is not None
        seed = 1_000_003 * self._trainer.args.seed + self._trainer.state.global_step
        self.attachment.mask_seed = torch.tensor(seed, dtype=torch.long)
        ids, mask = part.inputs["input_ids"], part.attention_mask
        return self.attachment.masked_mentions(knowledge, ids, mask)

    @contextmanager
    def without_knowledge(self) -> Iterator[None]:
        """A context in which forwards of the model get no mentions, and link nothing."""
        assert self.attachment is not None
        link, self.attachment.link = self.attachment.link, None
        warned, self.attachment.has_warned = self.attachment.has_warned, True
        try:
            yield
        finally:
            self.attachment.link, self.attachment.has_warned = link, warned

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision, for further forwards."""
        context: AbstractContextManager[Any] = self._trainer.accelerator.autocast()
        return context

    # ---- logging ----

    def around_forward(self, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Count the mentions."""
        entities = inputs.get("knowledge_entities")
        if isinstance(entities, torch.Tensor) and torch.is_grad_enabled():
            mentions = (entities[..., 0] >= 0).sum(1)
            counts = (mentions, mentions > 0, torch.ones_like(mentions))
            seen = torch.stack([count.sum().float() for count in counts])
            self._counts = seen if self._counts is None else self._counts + seen
        return nullcontext()

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Add how much was linked since the last log, in this process."""
        if self._counts is None:
            return
        mentions, rows_with, rows = self._counts.tolist()
        self._counts = None
        if mentions > 0:
            self._check_layers()
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                "No entity was found in the last %d training rows, so the injector does nothing "
                "for them. Look at linker.link(text) on a few texts, and at text_column=%r.",
                int(rows),
                self.text_columns,
            )
        logs[f"{self.name}/mentions_per_row"] = mentions / max(1.0, rows)
        logs[f"{self.name}/rows_with_mention"] = rows_with / max(1.0, rows)

    def _check_layers(self) -> None:
        """Warn once of injection points that have no effect on the loss."""
        if self._has_checked_layers or self._trainer.state.global_step < FEW_STEPS:
            return
        self._has_checked_layers = True
        made: list[Any] = list(self.injector.injection_layers)
        pairs = zip(self.injector.layers, made, strict=True)
        unmoved = [location for location, layer in pairs if not bool(layer.output.weight.any())]
        if unmoved:
            logger.warning(
                "After %d steps nothing has been learnt at %s: the loss does not depend on the "
                "mentions' hidden states there (a classifier that reads the first token, and the "
                "last layer?). Choose a point further down in layers=.",
                self._trainer.state.global_step,
                unmoved,
            )

    # ---- afterwards ----

    def save(self, folder: str) -> None:
        """Write what `load_knowledge_model` needs beside the model."""
        if self.injector.is_built:
            self._save(folder, self._makes_vectors)

    def close(self) -> None:
        """Release the Trainer; the injector stays on the model."""
        super().close()
        self._counts = None
