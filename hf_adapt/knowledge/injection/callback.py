"""Knowledge injection in one line of an existing script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.adaptation import KnowledgeInjection
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.vectors.table import EntityVectors

if TYPE_CHECKING:
    from hf_adapt.knowledge.injection.explaining import Explanation


class KnowledgeCallback(AdaptationCallback):
    """Knowledge injection in one line of an existing script.

    Args:
        graph: The facts.
        vectors: A vector for each entity; the model's own encoding of their names and
            descriptions by default.
        linker: Finds the entities in texts; `EntityLinker(graph)` by default.
        injector: Where and how; gated addition to the input embeddings by default.
        text_column: The column(s) of the dataset with the text; by default `text`, if there is one.
        max_mentions: Mentions of a row at most.
        save_graph: Whether graph and vectors are put beside the final model.
        learning_rate: Peak learning rate of the injector.
        weight_decay: Of the injector.

    Raises:
        ValueError: If the parts do not belong to one graph.

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
        text_column: str | Sequence[str] | None = None,
        max_mentions: int | None = None,
        save_graph: bool = True,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        self.injection = KnowledgeInjection(
            graph,
            vectors,
            linker,
            injector,
            text_column,
            max_mentions,
            save_graph,
            learning_rate,
            weight_decay,
        )
        super().__init__(self.injection)

    def explain(self, text: str) -> Explanation:
        """What the trained injector makes of a text."""
        return self.injection.explain(text)
