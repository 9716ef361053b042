"""Knowledge injection in one line of an existing script."""

from __future__ import annotations

from typing import Any

from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.explanation import Explanation
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.knowledge_injection import KnowledgeInjection
from hf_adapt.knowledge.vectors.table import EntityVectors


class KnowledgeCallback(AdaptationCallback):
    """Knowledge injection in one line of an existing script.

    Args:
        graph: The facts.
        vectors: A vector for each entity; the model's own encoding of their names and
            descriptions by default.
        linker: Finds the entities in texts; `EntityLinker(graph)` by default.
        injector: Where and how; gated addition to the input embeddings by default.
        **options: Further options of [`KnowledgeInjection`]: `text_column`, `max_mentions`,
            `save_graph`, `learning_rate`, `weight_decay`.

    Raises:
        ValueError: If graph and vectors do not belong together.

    Example:
        ```python
        graph = KnowledgeGraph.from_triples("facts.tsv")
        trainer.add_callback(KnowledgeCallback(graph))
        trainer.train()
        ```
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        vectors: EntityVectors | None = None,
        linker: Any = None,
        injector: KnowledgeInjector | None = None,
        **options: Any,
    ) -> None:
        self.injection = KnowledgeInjection(graph, vectors, linker, injector, **options)
        super().__init__(self.injection)

    def explain(self, text: str) -> Explanation:
        """What the trained injector makes of a text."""
        return self.injection.explain(text)
