"""Knowledge injection as a Trainer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.trainer import AdaptationTrainer
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.adaptation import KnowledgeInjection
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.vectors.table import EntityVectors

if TYPE_CHECKING:
    from hf_adapt.knowledge.injection.explaining import Explanation


class KnowledgeTrainer(AdaptationTrainer):
    """A `Trainer` whose model is told what a graph knows of the entities in its texts.

    Args:
        *args: Passed on to the Trainer.
        graph: See [`KnowledgeInjection`], as for the following.
        vectors: A vector for each entity.
        linker: Finds the entities in texts.
        injector: Where and how.
        text_column: The column(s) of the dataset with the text; by default `text`, if there is one.
        max_mentions: Mentions of a row at most.
        save_graph: Whether graph and vectors are put beside the final model.
        learning_rate: Peak learning rate of the injector; the model's is in `args`.
        weight_decay: Of the injector.
        objectives: More to add to training, such as `DANN()`.
        **kwargs: Passed on to the Trainer (and `target_dataset` and its options).

    Raises:
        ValueError: If there is no graph, or the parts do not belong to it.

    Example:
        ```python
        trainer = KnowledgeTrainer(
            model=model, args=args, train_dataset=train, processing_class=tokenizer, graph=graph,
        )
        trainer.train()
        print(trainer.explain("Aspirin thins the blood."))
        ```
    """

    def __init__(
        self,
        *args: Any,
        graph: KnowledgeGraph | None = None,
        vectors: EntityVectors | None = None,
        linker: Any = None,
        injector: KnowledgeInjector | None = None,
        text_column: str | Sequence[str] | None = None,
        max_mentions: int | None = None,
        save_graph: bool = True,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        objectives: Sequence[Adaptation] | None = None,
        **kwargs: Any,
    ) -> None:
        if graph is None:
            raise ValueError("KnowledgeTrainer needs graph=, a KnowledgeGraph.")
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
        super().__init__(*args, objectives=[self.injection, *(objectives or ())], **kwargs)

    def explain(self, text: str) -> Explanation:
        """What the trained injector makes of a text."""
        return self.injection.explain(text)
