"""Knowledge injection into a training run: the adaptation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_adapt.engine.mixins import BatchTransform
from hf_adapt.engine.training import resumed_from, unwrapped_model
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.attachment import Attachment, attachment_of
from hf_adapt.knowledge.injection.batching import KnowledgeBatcher, make_batcher
from hf_adapt.knowledge.injection.checks import (
    check_has_text,
    check_text,
    check_text_columns,
    refuse_trainer,
)
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.inputs import NAMES, Knowledge
from hf_adapt.knowledge.injection.saving import (
    check_fingerprint,
    resumed_vectors,
    save_knowledge,
)
from hf_adapt.knowledge.injection.text_triples import VISIBILITY
from hf_adapt.knowledge.linking.linker import EntityLinker
from hf_adapt.knowledge.linking.tokens import TokenAligner
from hf_adapt.knowledge.vectors.table import EntityVectors
from hf_adapt.models.heads import is_causal_lm
from hf_adapt.models.structure import unwrapped_base

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_adapt.engine.batch import Batch
    from hf_adapt.engine.parts import Part
    from hf_adapt.knowledge.injection.explaining import Explanation

logger = logging.getLogger(__name__)

LINKED_COLUMNS = ("mentions", "token_mentions", "offset_mapping")
"""Columns of rows with mentions that were found beforehand, or what helps to place them."""

MANY_DESCRIPTIONS = 300_000
"""Entities of which encoding the descriptions takes hours on a CPU."""


FEW_STEPS = 10
"""Optimizer steps after which a place with a gradient has moved, warm-up or not."""


class KnowledgeInjection(BatchTransform):
    """What a knowledge graph says of the entities in a text enters the model's hidden states.

    Texts are linked to the graph while batches are made, in training, evaluation and prediction.
    The injector starts as an exact no-op and trains beside the model, in an optimizer of its own;
    the model's own checkpoint stays a plain Hugging Face model. The injector stays on the model
    after training; [`load_knowledge_model`] brings it back.

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
        ValueError: If the parts do not belong to one graph, or the model cannot be injected into.

    Example:
        ```python
        adapt(trainer, KnowledgeInjection(graph), DANN(), target_dataset=target).train()
        ```
    """

    name = "knowledge"

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
        if graph.num_entities == 0:
            raise ValueError("The graph is empty: it has no entity to link to.")
        if vectors is not None and len(vectors) != graph.num_entities:
            raise ValueError(
                f"The table has {len(vectors):,} entity vectors, and the graph "
                f"{graph.num_entities:,} entities: row i must be entity i. Read it with "
                "EntityVectors.from_file(path, graph), which finds entities by their keys."
            )
        self.graph, self.vectors = graph, vectors
        self._makes_vectors = vectors is None
        self.linker = EntityLinker(graph) if linker is None else linker
        self.injector = KnowledgeInjector() if injector is None else injector
        self.names_columns = text_column is not None
        named = "text" if text_column is None else text_column
        self.text_columns = (named,) if isinstance(named, str) else tuple(named)
        self.columns = (*self.text_columns, *LINKED_COLUMNS)
        self.max_mentions, self.save_graph = max_mentions, save_graph
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        if name is not None:
            self.name = name
        self.attachment: Attachment | None = None
        self._batcher: KnowledgeBatcher | None = None
        self._seen: torch.Tensor | None = None
        self._is_silent = False
        self._starts_anew = False
        self._looks_at_places = True
        self._mask_rate = 0.0
        self._trainer: Any = None

    @property
    def added_inputs(self) -> tuple[str, ...]:
        """The tensors of the mentions."""
        return (*NAMES, VISIBILITY)

    # ---- the run ----

    def setup(self, trainer: Trainer) -> None:
        """Put the injector on the model, and make the vectors where there are none."""
        model = unwrapped_model(trainer)
        _check_model(model)
        refuse_trainer(trainer)
        if self.names_columns:
            check_text_columns(trainer, self.text_columns)
        tokenizer = trainer.processing_class
        if not hasattr(tokenizer, "pad_token_id"):  # a feature extractor makes no tokens
            found = "none" if tokenizer is None else f"a {type(tokenizer).__name__}"
            raise ValueError(
                "Linking needs the tokenizer that made the rows: pass processing_class=tokenizer "
                f"to the Trainer (it has {found}). Images and sound have no names to link."
            )
        self._find_vectors(trainer, model, tokenizer)
        self._batcher = make_batcher(
            model,
            self.injector,
            self.graph,
            self.vectors,
            TokenAligner(self.linker, tokenizer, self.text_columns),
            self.max_mentions,
        )
        if self.attachment is None or self.attachment.model is not unwrapped_base(model):
            loaded = attachment_of(model)
            if loaded is not None and loaded.injector is self.injector:
                self.attachment = loaded
            else:
                # A search over hyperparameters trains one model after the other.
                self._starts_anew = self.attachment is not None
                self.attachment = Attachment(model, self.injector)
        self.attachment.connect(self._batcher)
        self.attachment.mask_rate = self._mask_rate
        self._seen, self._trainer = None, trainer

    # ---- what an objective withholds ----

    def withhold(self, rate: float) -> None:
        """Leave out a share of the mentions in training, for a loss that predicts them.

        Raises:
            ValueError: If another share is withheld already.
        """
        if self._mask_rate not in (0.0, rate):
            raise ValueError(
                f"A share of {self._mask_rate} of the mentions is withheld already, and {rate} is "
                "asked for. Give both objectives the same mask_rate, or each its own injection."
            )
        self._mask_rate = rate

    def withheld(self, knowledge: Knowledge, part: Part) -> torch.Tensor:
        """Which mentions of these rows are withheld in the step under way, (B, M) bool."""
        assert self.attachment is not None
        seed = 1_000_003 * self._trainer.args.seed + self._trainer.state.global_step
        self.attachment.mask_seed = torch.tensor(seed, dtype=torch.long)
        return self.attachment.withheld(knowledge, part.inputs["input_ids"], part.attention_mask)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """A context in which forwards of the model are told nothing, and link nothing."""
        assert self.attachment is not None
        link, self.attachment.link = self.attachment.link, None
        warned, self.attachment.has_warned = self.attachment.has_warned, True
        try:
            yield
        finally:
            self.attachment.link, self.attachment.has_warned = link, warned

    def _find_vectors(self, trainer: Trainer, model: nn.Module, tokenizer: Any) -> None:
        """Take the vectors of the checkpoint, where the run made them; make them where it starts.

        A resumed model has trained: what it makes of the descriptions is not what it made of them.
        """
        checkpoint, found = resumed_from(trainer), None
        if checkpoint is not None:
            given = None if self._makes_vectors else self.vectors
            found = resumed_vectors(checkpoint, self.graph, given)
        if found is not None:
            self.vectors = found
        elif self.vectors is None and self.injector.needs_vectors:
            self.vectors = self._described(model, tokenizer)

    def _described(self, model: nn.Module, tokenizer: Any) -> EntityVectors:
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
        assert self.attachment is not None
        if not self.injector.is_built or self._starts_anew:
            self._starts_anew = False
            sizes = self.attachment.hidden_sizes
            silent = [s.place for s, n in zip(self.attachment.sites, sizes, strict=True) if not n]
            if silent:
                raise ValueError(
                    f"The places {silent} were not run by the model's forward, so nothing can be "
                    "added there. Choose others in layers=."
                )
            causal = is_causal_lm(batch.model)
            self.injector.build(
                [size for size in sizes if size is not None],
                0 if self.vectors is None else self.vectors.dimension,
                self.graph.num_relations,
                causal,
            )
        elif self.injector.sizes is not None:
            self._check_sizes(self.injector.sizes)
        return self.injector

    def _check_sizes(self, sizes: Mapping[str, Any]) -> None:
        if self.vectors is not None and sizes["dimension"] != self.vectors.dimension:
            raise ValueError(
                f"The injector was built for entity vectors of size {sizes['dimension']}, and the "
                f"table has {self.vectors.dimension}. Pass the vectors it was trained with, or a "
                "new KnowledgeInjector."
            )

    # ---- batches ----

    def __getstate__(self) -> dict[str, Any]:
        # A worker process makes batches; the model stays where it is.
        kept = (
            "name",
            "graph",
            "vectors",
            "columns",
            "text_columns",
            "names_columns",
            "_batcher",
        )
        return {key: value for key, value in vars(self).items() if key in kept}

    def transform_batch(self, rows: Sequence[Any], batch: MutableMapping[str, Any]) -> None:
        """Add the mentions of the rows to their batch."""
        assert self._batcher is not None
        if self.names_columns:
            for row in rows:
                check_has_text(row, self.text_columns, "a row of the batch does not have")
                check_text(row, self.text_columns, "a row of the batch")
        self._batcher.add_to(rows, batch)

    def transforms_evaluation(self, trainer: Trainer) -> bool:
        """From the first `train()` on."""
        model = unwrapped_base(unwrapped_model(trainer))
        return self.attachment is not None and self.attachment.model is model

    def around_forward(self, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Count the mentions."""
        entities = inputs.get("knowledge_entities")
        if isinstance(entities, torch.Tensor) and torch.is_grad_enabled():
            mentions = (entities[..., 0] >= 0).sum(1)
            counts = (mentions.sum(), (mentions > 0).sum(), torch.tensor(len(mentions)))
            seen = torch.stack([c.to(mentions.device).float() for c in counts])
            self._seen = seen if self._seen is None else self._seen + seen
        return nullcontext()

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        """Add how much was linked since the last log, in this process."""
        if self._seen is None:
            return
        mentions, rows_with, rows = self._seen.tolist()
        self._seen = None
        if mentions > 0:
            self._check_places()
        if mentions == 0 and not self._is_silent:
            self._is_silent = True
            logger.warning(
                "No entity was found in the last %d training rows, so the injector does nothing "
                "for them. Look at linker.link(text) on a few texts, and at text_column=%r.",
                int(rows),
                self.text_columns,
            )
        logs[f"{self.name}/mentions_per_row"] = mentions / max(1.0, rows)
        logs[f"{self.name}/rows_with_mention"] = rows_with / max(1.0, rows)

    def _check_places(self) -> None:
        """Say once which places have no effect on the loss."""
        if not self._looks_at_places or self._trainer.state.global_step < FEW_STEPS:
            return
        self._looks_at_places = False
        forms: list[Any] = list(self.injector.forms)
        places = zip(self.injector.places, forms, strict=False)
        still = [place for place, form in places if not bool(form.output.weight.any())]
        if still:
            logger.warning(
                "After %d steps nothing has been learnt at %s: the loss does not depend on the "
                "mentions' hidden states there (a classifier that reads the first token, and the "
                "last layer?). Choose a place further down in layers=.",
                self._trainer.state.global_step,
                still,
            )

    # ---- checkpoints and afterwards ----

    def state_dict(self) -> dict[str, Any]:
        """The fingerprints: entities are known by their numbers."""
        vectors = {} if self.vectors is None else {"vectors": self.vectors.fingerprint}
        return {"graph": self.graph.fingerprint, **vectors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another graph."""
        check_fingerprint("graph", self.graph.fingerprint, state["graph"])
        if self.vectors is not None:
            check_fingerprint("vectors", self.vectors.fingerprint, state.get("vectors", "none"))

    def save(self, folder: str) -> None:
        """Write what `load_knowledge_model` needs beside the model."""
        if self.injector.is_built:
            is_checkpoint = Path(folder).name.startswith("checkpoint-")
            whole = self.save_graph and not is_checkpoint
            save_knowledge(
                folder,
                self.injector,
                self.graph,
                self.vectors,
                self.linker,
                name=self.name,
                text_columns=self.text_columns,
                max_mentions=self.max_mentions,
                with_graph=whole,
                with_vectors=whole or (is_checkpoint and self._makes_vectors),
            )

    def close(self) -> None:
        """Let go of the Trainer; the injector stays on the model."""
        self._trainer = self._seen = None

    def detach(self) -> None:
        """Take the injector off the model, which is then the plain one."""
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment = None

    def explain(self, text: str) -> Explanation:
        """What the trained injector makes of a text; see [`explain`]."""
        from hf_adapt.knowledge.injection.explaining import explain_with

        if self.attachment is None or self._batcher is None:
            raise ValueError("There is nothing to explain before train() has begun.")
        return explain_with(self.attachment, self._batcher, text)


def _check_model(model: nn.Module) -> None:
    configs = getattr(model, "peft_config", None) or {}
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(config).__name__} puts prompt vectors before the tokens, so the mentions' "
                "places would be wrong. Use LoRA or another method that leaves the input as it is."
            )
