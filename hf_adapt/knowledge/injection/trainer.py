"""Knowledge injection in one line of an existing script, or as a Trainer of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from hf_adapt.engine.adaptation import Adaptation
from hf_adapt.engine.callback import AdaptationCallback
from hf_adapt.engine.trainer import AdaptationTrainer
from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.injection.explanation import Explanation
from hf_adapt.knowledge.injection.injector import KnowledgeInjector
from hf_adapt.knowledge.injection.knowledge_injection import KnowledgeInjection
from hf_adapt.knowledge.vectors.table import EntityVectors


class KnowledgeCallback(AdaptationCallback):
    """[`KnowledgeInjection`] in one line of an existing script.

    Args:
        graph: As for [`KnowledgeInjection`], and so are the others.
        vectors: A vector for each entity.
        linker: Finds the entities in texts.
        injector: Where and how.
        **options: Further options of [`KnowledgeInjection`].

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


class KnowledgeTrainer(AdaptationTrainer):
    """A `Trainer` whose model gets what a graph knows of the entities in its texts.

    Args:
        *args: Passed on to the Trainer.
        graph: The facts.
        objectives: More to add to training, such as `DANN()`.
        **kwargs: The options of [`KnowledgeInjection`] (`learning_rate` and `weight_decay` are the
            injector's); all others are passed on to the Trainer.

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
