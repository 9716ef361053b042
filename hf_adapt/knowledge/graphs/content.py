"""What a graph holds: strings in tables, the rest in arrays."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from hf_adapt.knowledge.strings import CHUNK, StringTable

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Content:
    """The arrays of a graph.

    Args:
        keys: Of the entities, each once.
        relations: The names of the relations, each once.
        triples: Head, relation, tail, sorted, each once; int32, (T, 3).
        names: Of all entities, those of one entity together; None if there are none.
        name_offsets: Where the names of each entity begin, and where the last end.
        priors: How likely each name means its entity, float32; None if that is not known.
        descriptions: One for each entity, empty where there is none; None if there are none.
    """

    keys: StringTable
    relations: StringTable
    triples: npt.NDArray[np.int32]
    names: StringTable | None = None
    name_offsets: Ids | None = None
    priors: npt.NDArray[np.float32] | None = None
    descriptions: StringTable | None = None

    def label_of(self, entity: int) -> str:
        """The first name, else the key."""
        if self.names is not None and self.name_offsets is not None:
            first, last = self.name_offsets[entity : entity + 2]
            if last > first:
                return self.names[int(first)]
        return self.keys[entity]

    def names_of(self, entity: int) -> list[str]:
        """All the names, else the key."""
        if self.names is not None and self.name_offsets is not None:
            first, last = self.name_offsets[entity : entity + 2]
            if last > first:
                return self.names[int(first) : int(last)]
        return [self.keys[entity]]

    def surfaces(self) -> Iterator[tuple[str, int, float]]:
        """Every (name, entity, prior), or (key, entity, 1) of an entity without names."""
        for first in range(0, len(self.keys), CHUNK):
            last = min(first + CHUNK, len(self.keys))
            keys = self.keys[first:last]
            if self.names is None or self.name_offsets is None:
                for entity, key in enumerate(keys, first):
                    yield key, entity, 1.0
                continue
            offsets = self.name_offsets[first : last + 1].tolist()
            start, end = offsets[0], offsets[-1]
            names = self.names[start:end]
            priors = self.priors[start:end].tolist() if self.priors is not None else None
            for entity, key, begin, stop in zip(
                range(first, last), keys, offsets[:-1], offsets[1:], strict=True
            ):
                if begin == stop:
                    yield key, entity, 1.0
                for i in range(begin - start, stop - start):
                    yield names[i], entity, 1.0 if priors is None else priors[i]

    def near(self, key: str) -> str:
        """What could be meant by a key that is not here, as a sentence."""
        if with_name := self._with_name(key):
            return f"It is a name of {', '.join(map(repr, with_name))}."
        # All of a large graph would take minutes: there, those that begin alike.
        several = list(self.keys) if len(self.keys) <= 20_000 else self.keys.around(key, 2_000)
        near = difflib.get_close_matches(key, several, n=5, cutoff=0.5)
        return f"Near keys: {', '.join(map(repr, near)) or 'none'}."

    def _with_name(self, name: str) -> list[str]:
        """Keys of the first entities that have this name."""
        if self.names is None or self.name_offsets is None:
            return []
        places = pc.indices_nonzero(pc.equal(self.names.arrow(), name)).to_numpy()[:5]
        found = np.searchsorted(self.name_offsets, places, side="right") - 1
        return [self.keys[int(entity)] for entity in found]

    def part(self, keep: npt.NDArray[np.bool_]) -> Content:
        """Some of the entities, numbered anew in their old order, and the triples among them."""
        entities = np.flatnonzero(keep)
        number = np.cumsum(keep, dtype=np.int32) - 1
        triples = self.triples
        triples = triples[keep[triples[:, 0]] & keep[triples[:, 2]]]
        triples = np.stack([number[triples[:, 0]], triples[:, 1], number[triples[:, 2]]], axis=1)
        names, offsets, priors = self.names, self.name_offsets, self.priors
        if names is not None and offsets is not None:
            counts = np.diff(offsets)
            rows = np.flatnonzero(np.repeat(keep, counts))
            names = names.take(rows)
            priors = None if priors is None else priors[rows]
            offsets = np.concatenate([[0], np.cumsum(counts[entities])])
        descriptions = self.descriptions
        descriptions = None if descriptions is None else descriptions.take(entities)
        keys = self.keys.take(entities)
        return Content(keys, self.relations, triples, names, offsets, priors, descriptions)
