"""An entity linker of the user's own."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.linking.linker import Linker, check_text, name_of
from hf_adapt.knowledge.linking.matcher import leftmost_longest
from hf_adapt.knowledge.linking.mentions import Candidate, Mention
from hf_adapt.knowledge.linking.normalization import fold_names
from hf_adapt.knowledge.linking.surfaces import SurfaceTable, ranked


class CallableLinker(Linker):
    """A linker of your own: any function of a text, or a spaCy pipeline.

    Args:
        graph: The graph whose entities are found.
        function: From a text to (start, end, entity) or (start, end, entities) or (start, end,
            entities, priors), by characters; an entity is its number or its key in the graph. Or to
            an object with `ents`, as spaCy's `Doc`: each has `start_char`, `end_char` and perhaps
            `kb_id_`, a key; without one, its text is looked up among the graph's names. Keys that
            the graph lacks are left out, once with a warning.
        overlapping: Whether mentions that overlap are kept, not only the leftmost-longest.
        max_candidates: Entities that are kept for a mention.
        ignore_case: Whether 'Aspirin' is 'aspirin' where a text is looked up among the names.

    Example:
        >>> linker = CallableLinker(graph, spacy.load("my_linker"))  # doctest: +SKIP
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        function: Callable[[str], Any],
        *,
        overlapping: bool = False,
        max_candidates: int = 3,
        ignore_case: bool = True,
    ) -> None:
        super().__init__(graph)
        if not callable(function):
            raise TypeError(
                f"CallableLinker expects a function text -> spans, got {type(function).__name__}."
            )
        self.function, self.overlapping = function, overlapping
        self.max_candidates = max_candidates
        self._table: SurfaceTable | None = None
        self.ignore_case, self._has_warned = ignore_case, False

    def link(self, text: str) -> list[Mention]:
        """Find the mentions of a text, by start."""
        spans = self.function(check_text(text))
        if (entities := getattr(spans, "ents", None)) is not None:
            spans = [
                (each.start_char, each.end_char, getattr(each, "kb_id_", "") or None)
                for each in entities
            ]
        found: list[tuple[int, int, tuple[Candidate, ...]]] = []
        for span in spans:
            start, end, meant, priors = self._parts(span, text)
            candidates = self._candidates(meant, priors, text[start:end])
            if candidates:
                found.append((start, end, candidates))
        if self.overlapping:
            kept = sorted((start, end, index) for index, (start, end, _) in enumerate(found))
        else:
            kept = leftmost_longest([(s, -e, index) for index, (s, e, _) in enumerate(found)])
        return [Mention(start, end, text[start:end], found[n][2]) for start, end, n in kept]

    def _parts(self, span: Any, text: str) -> tuple[int, int, Any, Any]:
        try:
            first, last, meant, priors = (*span, None)[:4]
            start, end = operator.index(first), operator.index(last)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "The linker's function must return (start, end, entities) or (start, end, "
                f"entities, priors) for each mention, got {span!r}."
            ) from error
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"The linker's function returned the span ({start}, {end}) for a text of "
                f"{len(text)} characters; expected 0 <= start < end <= {len(text)}, by characters "
                "(not bytes or tokens)."
            )
        return start, end, meant, priors

    def _candidates(self, meant: Any, priors: Any, surface: str) -> tuple[Candidate, ...]:
        if meant is None:
            return self._named(surface)
        several = [meant] if isinstance(meant, str) or not isinstance(meant, Iterable) else [*meant]
        weights = [1.0] * len(several) if priors is None else [float(prior) for prior in priors]
        if len(weights) != len(several):
            raise ValueError(
                f"The linker's function returned {len(several)} entities and {len(weights)} priors "
                f"for {surface!r}; expected one each."
            )
        numbers = [self._number(entity) for entity in several]
        known = {n: w for n, w in zip(numbers, weights, strict=True) if n >= 0}
        return ranked(known, self.max_candidates) if known else ()

    def _number(self, entity: Any) -> int:
        if isinstance(entity, str):
            number = int(self.graph.entities([entity])[0])
            if number < 0 and not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"The linker found {entity!r}, which is no key of the graph; such mentions are "
                    f"left out. Its keys look like {self.graph.key(0)!r}.",
                    stacklevel=2,
                )
            return number
        number = operator.index(entity)
        if not 0 <= number < self.graph.num_entities:
            raise ValueError(
                f"The linker's function returned the entity {number}; the graph has entities 0 to "
                f"{self.graph.num_entities - 1}. Return a number of this graph, or a key."
            )
        return number

    def _named(self, surface: str) -> tuple[Candidate, ...]:
        if self._table is None:
            self._table = SurfaceTable(
                self.graph.surfaces(), self.ignore_case, most=self.max_candidates
            )
        number = self._table.numbers.get(fold_names([surface], self.ignore_case)[0])
        return () if number is None else self._table.candidates[number]

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the linker, without the graph: values that JSON can hold."""
        options = ("overlapping", "max_candidates", "ignore_case")
        return {
            "function": name_of(self.function),
            **{name: getattr(self, name) for name in options},
        }

    def _functions(self) -> list[Callable[..., Any]]:
        return [self.function]

    def _without_graph(self) -> CallableLinker:
        return self  # keys are looked up in it
