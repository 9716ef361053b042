"""The names of a graph, and the entities that each may mean."""

from __future__ import annotations

import copy
import itertools
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from hf_adapt.knowledge.linking.mentions import Candidate
from hf_adapt.knowledge.linking.normalization import find_unspaced, fold_names

CHUNK = 512
"""Names that are folded at once: few enough that the collector of cycles need not look at them."""


def ranked(weights: dict[int, float], most: int) -> tuple[Candidate, ...]:
    """Candidates by prior, then by entity; priors sum to 1."""
    best = sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:most]
    total = sum(weight for _, weight in best)
    if not total > 0:
        return tuple(Candidate(entity, 1 / len(best)) for entity, _ in best)
    return tuple(Candidate(entity, weight / total) for entity, weight in best)


class _Candidates(dict[int, tuple[Candidate, ...]]):
    """The candidates of each name's number, made when first asked for."""

    def __init__(self, table: SurfaceTable) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, number: int) -> tuple[Candidate, ...]:
        made = self[number] = self._table.meant(number)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._table,)


class SurfaceTable:
    """The folded names of a graph with their entities: 16 bytes a name and the name itself."""

    def __init__(
        self,
        surfaces: Iterable[tuple[str, int, float]],
        ignore_case: bool = True,
        min_length: int = 1,
        stop_surfaces: Collection[str] = (),
        most: int = 3,
    ) -> None:
        self.most = most
        self.numbers: dict[str, int] = {}
        self.has_unspaced = False
        self.candidates = _Candidates(self)
        # By number; there is no name 0, so that a matcher may give numbers a sign.
        self._entities, self._priors = array("q", [0]), array("d", [0.0])
        self._others: dict[int, list[int]] = {}
        stopped = set(fold_names(list(stop_surfaces), ignore_case))
        rows = iter(surfaces)
        while chunk := list(itertools.islice(rows, CHUNK)):
            names, entities, priors = zip(*chunk, strict=True)
            self._add(fold_names(names, ignore_case), entities, priors, min_length, stopped)

    def _add(
        self,
        names: list[str],
        entities: Sequence[int],
        priors: Sequence[float],
        min_length: int,
        stopped: set[str],
    ) -> None:
        shortest = max(1, min_length)
        if min(map(len, names)) < shortest or not stopped.isdisjoint(names):
            kept = [len(name) >= shortest and name not in stopped for name in names]
            names = list(itertools.compress(names, kept))
            entities = list(itertools.compress(entities, kept))
            priors = list(itertools.compress(priors, kept))
        if not (self.has_unspaced or (text := "".join(names)).isascii()):
            self.has_unspaced = find_unspaced(text) is not None
        own = range(len(self._entities), len(self._entities) + len(names))
        known = list(map(self.numbers.setdefault, names, own))
        for number, first in zip(own, known, strict=True):
            if number != first:
                self._others.setdefault(first, []).append(number)
        self._entities.extend(entities)
        self._priors.extend(priors)

    def meant(self, number: int) -> tuple[Candidate, ...]:
        """The entities of a name."""
        others = self._others.get(number)
        if others is None:
            return (Candidate(self._entities[number], 1.0),)
        weights: dict[int, float] = {}
        for index in (number, *others):
            entity = self._entities[index]
            # An entity may have the same name twice (label and alias): that is one meaning.
            weights[entity] = max(weights.get(entity, 0.0), self._priors[index])
        return ranked(weights, self.most)

    def without_names(self) -> SurfaceTable:
        """A copy that only tells candidates."""
        made = copy.copy(self)
        made.numbers, made.candidates = {}, _Candidates(made)
        return made

    def add_forms(self, forms: Callable[[str], Iterable[str]], ignore_case: bool) -> None:
        """Add other forms of each name's last word, where no name is spelt like that."""
        made: dict[str, list[int]] = {}
        for name, number in self.numbers.items():
            before, space, word = name.rpartition(" ")
            for form in forms(word):
                inflected = before + space + fold_names([form], ignore_case)[0]
                if inflected and inflected not in self.numbers:
                    made.setdefault(inflected, []).append(number)
        for name, origins in made.items():
            indices = [
                index for origin in origins for index in (origin, *self._others.get(origin, ()))
            ]
            number = len(self._entities)
            for index in indices:
                self._entities.append(self._entities[index])
                self._priors.append(self._priors[index])
            self.numbers[name] = number
            if len(indices) > 1:
                self._others[number] = list(range(number + 1, number + len(indices)))
