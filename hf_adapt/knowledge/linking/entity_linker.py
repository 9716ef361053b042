"""Entity linking by dictionary: where a text has a name of an entity, the entity is meant."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.linking.inflection import english_forms
from hf_adapt.knowledge.linking.linker import FUNCTION, MATCHERS, Linker, check_text, name_of
from hf_adapt.knowledge.linking.matcher import AhoCorasickMatcher, Matcher, WordMatcher
from hf_adapt.knowledge.linking.mentions import Mention
from hf_adapt.knowledge.linking.normalization import fold, fold_punctuation
from hf_adapt.knowledge.linking.surfaces import SurfaceTable

Inflections = str | Callable[[str], Iterable[str]] | None
OPTIONS = ("ignore_case", "whole_words", "overlapping", "max_candidates", "min_length", "matcher")


class EntityLinker(Linker):
    """Links by dictionary: where a text has a name of an entity, the name's entities are meant.

    Of names that overlap, the leftmost and of those the longest is linked. Whitespace between the
    words of a name may be any in the text, and so may be the sort of an apostrophe or a hyphen;
    other characters must be the name's, accents included.
    Scripts without spaces between words (Chinese, Japanese, Thai, ...) have no word boundaries.

    Args:
        graph: Has the names: `graph.surfaces()`.
        ignore_case: Whether 'Aspirin' is 'aspirin'.
        whole_words: Whether 'caf' must not be found in 'café'. Without it the matcher of words
            works character by character: a large graph then needs much memory, or the extra.
        inflections: Also find other forms of a name's last word: "english" for the regular forms of
            English words, or a function from a word to its forms. A form that is itself a name
            stays that name.
        overlapping: Whether all names are linked, also inside of others.
        max_candidates: Entities that are kept for a mention.
        min_length: Characters that a name needs.
        stop_surfaces: Names that are never linked, such as
            [`hf_adapt.knowledge.ENGLISH_FUNCTION_WORDS`].
        matcher: "words" (pure Python), "ahocorasick" (the extra `knowledge`) or "auto": the extra,
            if it is installed, for names in scripts without spaces and for parts of words, where it
            is much faster; else words. They find the same. A function or a pipeline of your own
            is a linker of its own: [`CallableLinker`].

    Raises:
        ValueError: If no name is left to link, or an option is not one of these.
        ImportError: If the extra is asked for and not installed.

    Example:
        >>> linker = EntityLinker(graph)  # doctest: +SKIP
        >>> linker.link("Aspirin thins blood.")  # doctest: +SKIP
        [Mention(start=0, end=7, surface='Aspirin', candidates=(Candidate(entity=3, prior=1.0),))]
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        *,
        ignore_case: bool = True,
        whole_words: bool = True,
        inflections: Inflections = None,
        overlapping: bool = False,
        max_candidates: int = 3,
        min_length: int = 2,
        stop_surfaces: Collection[str] = (),
        matcher: str = "auto",
    ) -> None:
        super().__init__(graph)
        if max_candidates < 1:
            raise ValueError(f"max_candidates={max_candidates} must be at least 1.")
        if isinstance(stop_surfaces, str):
            raise ValueError(f"stop_surfaces must be several names, got the one {stop_surfaces!r}.")
        if matcher not in MATCHERS:
            raise ValueError(
                f"matcher={matcher!r} is not one of {', '.join(map(repr, MATCHERS))}. A linker of "
                "your own is CallableLinker(graph, function)."
            )
        self.ignore_case, self.whole_words, self.overlapping = ignore_case, whole_words, overlapping
        self.inflections, self.max_candidates = inflections, max_candidates
        self.min_length, self.stop_surfaces = min_length, tuple(sorted(set(stop_surfaces)))
        self.matcher = matcher
        self._table = self._surface_table(graph)
        self._matcher = self._make_matcher(matcher)

    def _surface_table(self, graph: KnowledgeGraph) -> SurfaceTable:
        limits = (self.min_length, self.stop_surfaces, self.max_candidates)
        table = SurfaceTable(graph.surfaces(), self.ignore_case, *limits)
        if not table.numbers:
            raise ValueError(
                f"The graph ({graph.num_entities} entities) has no name to link: none has "
                f"min_length={self.min_length} characters and is not in stop_surfaces. Give its "
                "entities names, or a lower min_length."
            )
        if self.inflections is not None:
            table.add_forms(_forms(self.inflections), self.ignore_case)
        return table

    def _make_matcher(self, choice: str) -> Matcher:
        slow = self._table.has_unspaced or not self.whole_words
        if choice == "ahocorasick" or (choice == "auto" and slow and find_spec("ahocorasick_rs")):
            return AhoCorasickMatcher(self._table.numbers, self.whole_words)
        return WordMatcher(self._table.numbers, self.whole_words)

    def link(self, text: str) -> list[Mention]:
        """Find the mentions of a text, by start."""
        folded = fold(fold_punctuation(check_text(text)), self.ignore_case)
        found = self._matcher.find(folded, self.overlapping)
        if folded.starts is not None:
            found = [(folded.origin(start), folded.origin(end), n) for start, end, n in found]
        candidates = self._table.candidates
        return [Mention(start, end, text[start:end], candidates[n]) for start, end, n in found]

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the linker, without the graph: values that JSON can hold."""
        options = {name: getattr(self, name) for name in OPTIONS}
        own = {"inflections": name_of(self.inflections), "stop_surfaces": [*self.stop_surfaces]}
        return {**options, **own}

    @classmethod
    def from_settings(
        cls, graph: KnowledgeGraph, settings: Mapping[str, Any], **changes: Any
    ) -> EntityLinker:
        """The linker with these [`settings`], but for the changes.

        Functions, which settings only name, must be given as changes.
        """
        given = {**settings, **changes}
        known = sorted({*OPTIONS, "inflections", "stop_surfaces"})
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(
                f"Unknown linker settings {', '.join(unknown)}; known are {', '.join(known)}. They "
                "may be of a newer version of hf_adapt."
            )
        inflections = given.get("inflections")
        if isinstance(inflections, str) and inflections.startswith(FUNCTION):
            raise ValueError(
                f"The linker was made with inflections={inflections.removeprefix(FUNCTION)}, a "
                "function that is not saved with it. Pass it: from_settings(graph, settings, "
                "inflections=…)."
            )
        return cls(graph, **given)

    def _functions(self) -> list[Callable[..., Any]]:
        return [self.inflections] if callable(self.inflections) else []

    def _without_graph(self) -> EntityLinker:
        worker = super()._without_graph()
        # What the matcher holds is enough: the names need not travel twice.
        worker.inflections, worker._table = None, self._table.without_names()
        return worker


def _forms(inflections: str | Callable[[str], Iterable[str]]) -> Callable[[str], Iterable[str]]:
    if callable(inflections):
        return inflections
    if inflections != "english":
        raise ValueError(
            f"inflections={inflections!r} is not None, 'english' or a function word -> forms."
        )
    return english_forms
