"""The content of a graph in Arrow and numpy arrays, and the triples of each entity."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.storage.string_table import CHUNK, StringTable

Ids = npt.NDArray[np.int64]
Direction = Literal["out", "in", "both"]


class Neighbours(NamedTuple):
    """What an entity is linked to: `entities[i]` by `relations[i]`.

    The relation of an edge that comes in is its number plus the graph's `num_relations`.
    """

    relations: Ids
    entities: Ids


@dataclass(frozen=True)
class Content:
    """The arrays of a graph."""

    keys: StringTable
    relations: Any  # Arrow strings
    triples: npt.NDArray[np.int32]  # head, relation, tail; (T, 3), sorted, each once
    names: Any = None  # Arrow lists of strings, by entity
    priors: Any = None  # Arrow lists: how likely each name means its entity
    descriptions: Any = None  # Arrow strings, empty where there is none

    def arrays(self) -> dict[str, Any]:
        """Return the content as Arrow arrays by name; what the graph does not have is left out."""
        flat = pa.array(np.ascontiguousarray(self.triples).reshape(-1))
        triples = pa.FixedSizeListArray.from_arrays(flat, 3)
        arrays = {"keys": self.keys.array, "relations": self.relations, "triples": triples}
        rest = {"names": self.names, "priors": self.priors, "descriptions": self.descriptions}
        return arrays | {name: array for name, array in rest.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Content:
        """Restore the content from what `arrays` returned, without copying it."""
        triples = arrays["triples"].values.to_numpy().reshape(-1, 3)
        return cls(**{**arrays, "keys": StringTable(arrays["keys"]), "triples": triples})

    def names_of(self, entity: int) -> list[str]:
        """Return all names of an entity, else its key."""
        return (self.names is not None and self.names[entity].as_py()) or [self.keys[entity]]

    def surfaces(self) -> Iterator[tuple[str, int, float]]:
        """Iterate over (name, entity, prior), or (key, entity, 1) for entities without names."""
        for first in range(0, len(self.keys), CHUNK):
            keys = self.keys[first : first + CHUNK]
            if self.names is None:
                yield from ((key, entity, 1.0) for entity, key in enumerate(keys, first))
                continue
            # Flat, as Arrow makes Python lists of lists slowly.
            offsets = self.names.offsets[first : first + len(keys) + 1].to_pylist()
            start, end = offsets[0], offsets[-1]
            names = self.names.values[start:end].to_pylist()
            weights = [1.0] * len(names)
            if self.priors is not None:
                weights = self.priors.values[start:end].to_pylist()
            for entity, key in enumerate(keys, first):
                begin, stop = offsets[entity - first] - start, offsets[entity - first + 1] - start
                if begin == stop:
                    yield key, entity, 1.0
                for i in range(begin, stop):
                    yield names[i], entity, weights[i]

    def near(self, key: str) -> str:
        """Return a sentence on what an unknown key may mean."""
        if self.names is not None:
            rows = pc.indices_nonzero(pc.equal(self.names.flatten(), key))[:5]
            owners = pc.list_parent_indices(self.names).take(rows).to_pylist()
            if owners:
                return f"It is a name of {', '.join(repr(self.keys[entity]) for entity in owners)}."
        # All of a large graph would take minutes: there, those that begin alike.
        several = list(self.keys) if len(self.keys) <= 20_000 else self.keys.around(key, 2_000)
        near = difflib.get_close_matches(key, several, n=5, cutoff=0.5)
        return f"Near keys: {', '.join(map(repr, near)) or 'none'}."

    def part(self, keep: npt.NDArray[np.bool_]) -> Content:
        """Return some of the entities, renumbered in their order, and the triples among them."""
        entities = np.flatnonzero(keep)
        number = np.cumsum(keep, dtype=np.int32) - 1
        rows = self.triples[keep[self.triples[:, 0]] & keep[self.triples[:, 2]]]
        triples = np.stack([number[rows[:, 0]], rows[:, 1], number[rows[:, 2]]], axis=1)
        optional = (self.names, self.priors, self.descriptions)
        taken = (None if array is None else array.take(pa.array(entities)) for array in optional)
        return Content(self.keys.take(entities), self.relations, triples, *taken)


class Links:
    """Triples by their head and by their tail; the latter order is made when it is needed."""

    def __init__(self, content: Content) -> None:
        self.triples, self.num_relations = content.triples, len(content.relations)
        self.num_entities = len(content.keys)

    def _counts(self, column: int) -> Ids:
        return np.bincount(self.triples[:, column], minlength=self.num_entities)

    def _starts(self, column: int) -> Ids:
        return np.concatenate([[0], np.cumsum(self._counts(column))])

    @cached_property
    def _outgoing(self) -> Ids:
        """Where the triples of each head begin."""
        return self._starts(0)

    @cached_property
    def _incoming(self) -> tuple[Ids, npt.NDArray[np.int32]]:
        """Where the triples of each tail begin in an order by tail, and that order."""
        # Stable: those of one tail stay in the order of their heads.
        return self._starts(2), np.argsort(self.triples[:, 2], kind="stable").astype(np.int32)

    def of(
        self, entity: int, relation: int | None, direction: Direction, limit: int | None
    ) -> Neighbours:
        """Return what an entity is linked to, outgoing edges first."""
        parts = []
        if direction != "in":
            first, last = self._outgoing[entity : entity + 2]
            parts.append(self.triples[first:last, 1:].astype(np.int64))
        if direction != "out":
            starts, order = self._incoming
            first, last = starts[entity : entity + 2]
            rows = np.asarray(self.triples[order[first:last]], np.int64)
            parts.append(np.stack([rows[:, 1] + self.num_relations, rows[:, 0]], axis=1))
        found = np.concatenate(parts)
        if relation is not None:
            wanted = [relation, relation + self.num_relations][
                : 1 + (relation < self.num_relations)
            ]
            found = found[np.isin(found[:, 0], wanted)]
        found = found[:limit]
        return Neighbours(found[:, 0].copy(), found[:, 1].copy())

    def within(self, entities: list[int], hops: int) -> npt.NDArray[np.bool_]:
        """Return which entities are at most `hops` edges away, in either direction."""
        heads, tails = self.triples[:, 0], self.triples[:, 2]
        keep = np.zeros(self.num_entities, bool)
        keep[entities] = True
        for _ in range(hops):
            reached = keep.copy()
            reached[tails[keep[heads]]] = reached[heads[keep[tails]]] = True
            keep = reached
        return keep

    def degrees(self) -> Ids:
        """Return the number of triples of each entity."""
        return self._counts(0) + self._counts(2)
