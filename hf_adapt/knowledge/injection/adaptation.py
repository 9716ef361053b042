"""What every adaptation does that reads a graph: link the rows, save the graph, explain a text."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from hf_adapt.engine import texts
from hf_adapt.engine.columns import dataset_columns
from hf_adapt.engine.mixins import BatchTransform
from hf_adapt.engine.trainer_kinds import refuse_answers, refuse_sentence_trainer
from hf_adapt.engine.training import unwrapped_model
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.attachment import Attachment
from hf_adapt.knowledge.injection.batcher import MentionBatcher
from hf_adapt.knowledge.injection.explanation import Explanation, explain_with
from hf_adapt.knowledge.injection.knowledge_folder import check_fingerprint, save_knowledge
from hf_adapt.knowledge.linking.entity_linker import EntityLinker
from hf_adapt.knowledge.linking.mentions import MENTIONS, TOKEN_MENTIONS
from hf_adapt.knowledge.linking.token_alignment import OFFSETS, TokenAligner
from hf_adapt.knowledge.vectors.table import EntityVectors
from hf_adapt.models.structure import unwrapped_base


class KnowledgeAdaptation(BatchTransform):
    """An adaptation that links the rows of a run to a graph.

    A subclass connects the model in `_connect`, and says in `settings` what is saved.
    """

    vectors: EntityVectors | None = None
    attachment: Attachment | None = None
    _batcher: MentionBatcher | None = None
    _trainer: Any = None

    def __init__(
        self,
        graph: KnowledgeGraph,
        linker: Any = None,
        text_column: str | Sequence[str] | None = None,
        max_mentions: int | None = None,
        save_graph: bool = True,
        name: str | None = None,
    ) -> None:
        if graph.num_entities == 0:
            raise ValueError("The graph is empty: it has no entity to link to.")
        self.graph = graph
        self.linker = EntityLinker(graph) if linker is None else linker
        self.names_columns = text_column is not None
        named = "text" if text_column is None else text_column
        self.text_columns = (named,) if isinstance(named, str) else tuple(named)
        # Besides the text: mentions that were found beforehand, or what helps to align them.
        self.columns = (*self.text_columns, MENTIONS, TOKEN_MENTIONS, OFFSETS)
        self.max_mentions, self.save_graph = max_mentions, save_graph
        if name is not None:
            self.name = name

    def _connect(self, trainer: Trainer, model: nn.Module, aligner: TokenAligner) -> None:
        """Set `_batcher` and `attachment`."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What is saved beside the model, as plain values."""
        # A linker of the user's own has to be given again.
        linker = self.linker.settings if isinstance(self.linker, EntityLinker) else None
        columns = list(self.text_columns)
        about = {"linker": linker, "text_columns": columns, "max_mentions": self.max_mentions}
        return {"name": self.name, **about, "injector": None}

    # ---- the run ----

    def setup(self, trainer: Trainer) -> None:
        """Check the Trainer, and connect its model."""
        model = unwrapped_model(trainer)
        _refuse_prompt_vectors(model)
        refuse_answers(
            trainer,
            "knowledge injection needs rows of one sequence",
            "Use it in a training on single sequences: SFTTrainer on the prompts and chosen "
            "answers before the preferences are trained, or a Trainer with a "
            "...ForSequenceClassification model on labelled rows in place of a reward trainer.",
        )
        refuse_sentence_trainer(
            trainer,
            "Knowledge injection",
            "Train the transformers model inside with a Trainer of transformers, on rows with "
            "input_ids.",
        )
        for name, dataset in texts.named_datasets(trainer.train_dataset, (), trainer.eval_dataset):
            # What only reading the rows would tell is checked as they come.
            if self.names_columns and TOKEN_MENTIONS not in (dataset_columns(dataset) or ()):
                options = {"one_suffices": True, "read_stream": False}
                texts.check_dataset(dataset, self.text_columns, name, **options)
        tokenizer = trainer.processing_class
        if not hasattr(tokenizer, "pad_token_id"):  # a feature extractor makes no tokens
            found = "none" if tokenizer is None else f"a {type(tokenizer).__name__}"
            raise ValueError(
                "Linking needs the tokenizer that made the rows: pass processing_class=tokenizer "
                f"to the Trainer (it has {found}). Images and sound have no names to link."
            )
        self._connect(trainer, model, TokenAligner(self.linker, tokenizer, self.text_columns))
        self._trainer = trainer

    def _is_attached(self, model: nn.Module) -> bool:
        return self.attachment is not None and self.attachment.model is unwrapped_base(model)

    def close(self) -> None:
        """Release the Trainer; the model keeps its knowledge."""
        self._trainer = None

    def detach(self) -> None:
        """Take the knowledge off the model, which is then the plain one."""
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment = None

    # ---- batches ----

    def __getstate__(self) -> dict[str, Any]:
        # A worker process makes batches; the model stays where it is.
        kept = {"name", "graph", "vectors", "columns", "text_columns", "names_columns", "_batcher"}
        return {key: value for key, value in vars(self).items() if key in kept}

    def transform_batch(self, rows: Sequence[Any], batch: MutableMapping[str, Any]) -> None:
        """Add the mentions of the rows to their batch."""
        assert self._batcher is not None
        for row in rows if self.names_columns else ():
            if row.get(TOKEN_MENTIONS) is None:  # else the mentions are known
                texts.check_columns(row, self.text_columns, "a row of the batch", texts.KEEP_COLUMN)
                texts.check_row(row, self.text_columns, "a row of the batch", one_suffices=True)
        self._batcher.add_to(rows, batch)

    def transforms_evaluation(self, trainer: Trainer) -> bool:
        """From the first `train()` on."""
        return self._is_attached(unwrapped_model(trainer))

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

    def _save(self, folder: str, makes_vectors: bool) -> None:
        is_checkpoint = Path(folder).name.startswith("checkpoint-")
        whole = self.save_graph and not is_checkpoint
        with_vectors = whole or (is_checkpoint and makes_vectors)
        save_knowledge(folder, self.settings, self.graph, self.vectors, whole, with_vectors)

    def explain(self, text: str) -> Explanation:
        """What the trained model makes of the entities in a text; see [`explain`]."""
        if self.attachment is None or self._batcher is None:
            raise ValueError("There is nothing to explain before train() has begun.")
        return explain_with(self.attachment, self._batcher, text)


def _refuse_prompt_vectors(model: nn.Module) -> None:
    configs = getattr(model, "peft_config", None) or {}
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(config).__name__} puts prompt vectors before the tokens, so the mentions' "
                "positions would be wrong. Use LoRA or another method that leaves the input as it "
                "is."
            )
