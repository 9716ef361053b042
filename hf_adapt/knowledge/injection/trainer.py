"""Knowledge injection as a Trainer of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.trainer import AdaptationTrainer
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.explanation import Explanation
from hf_adapt.knowledge.injection.knowledge_injection import KnowledgeInjection


class KnowledgeTrainer(AdaptationTrainer):
    """A `Trainer` whose model gets what a graph knows of the entities in its texts.

    Args:
        *args: Passed on to the Trainer.
        graph: The facts.
        objectives: More to add to training, such as `DANN()`.
        **kwargs: The options of [`KnowledgeInjection`] (`vectors`, `linker`, `injector`,
            `text_column`, `max_mentions`, `save_graph`, `learning_rate` and `weight_decay` of the
            injector); all others are passed on to the Trainer.

    Raises:
        ValueError: If there is no graph, or the vectors do not belong to it.

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
        objectives: Sequence[Adaptation] | None = None,
        **kwargs: Any,
    ) -> None:
        if graph is None:
            raise ValueError("KnowledgeTrainer needs graph=, a KnowledgeGraph.")
        names = inspect.signature(KnowledgeInjection).parameters
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        self.injection = KnowledgeInjection(graph, **options)
        super().__init__(*args, objectives=[self.injection, *(objectives or ())], **kwargs)

    def explain(self, text: str) -> Explanation:
        """What the trained injector makes of a text."""
        return self.injection.explain(text)
