"""The triples of each entity, found without a search."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hf_adapt.knowledge.graphs.content import Ids

Direction = Literal["out", "in", "both"]


class Neighbours(NamedTuple):
    """What an entity is linked to: `entities[i]` by `relations[i]`.

    The relation of an edge that comes in is its number plus the graph's `num_relations`.
    """

    relations: Ids
    entities: Ids


class Links:
    """Triples by their head and by their tail; the order by tail is made when it is first needed.

    Args:
        triples: Sorted by head, (T, 3).
        num_entities: Number of entities.
        num_relations: What is added to the relation of an edge that comes in.
    """

    def __init__(
        self, triples: npt.NDArray[np.int32], num_entities: int, num_relations: int
    ) -> None:
        self.triples, self.num_relations = triples, num_relations
        self.num_entities = num_entities

    @cached_property
    def _outgoing(self) -> Ids:
        """Where the triples of each head begin."""
        return self._starts(0)

    @cached_property
    def _incoming(self) -> tuple[Ids, npt.NDArray[np.int32]]:
        """Where the triples of each tail begin in an order by tail, and that order."""
        # Stable: those of one tail stay in the order of their heads.
        return self._starts(2), np.argsort(self.triples[:, 2], kind="stable").astype(np.int32)

    def _starts(self, column: int) -> Ids:
        starts = np.zeros(self.num_entities + 1, np.int64)
        np.cumsum(self._counts(column), out=starts[1:])
        return starts

    def _counts(self, column: int) -> Ids:
        return np.bincount(self.triples[:, column], minlength=self.num_entities)

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
            wanted = found[:, 0] == relation
            if relation < self.num_relations:
                wanted |= found[:, 0] == relation + self.num_relations
            found = found[wanted]
        found = found[:limit]
        return Neighbours(found[:, 0].copy(), found[:, 1].copy())

    def within(self, entities: list[int], hops: int) -> npt.NDArray[np.bool_]:
        """Return which entities are at most `hops` edges away, in either direction."""
        heads, tails = self.triples[:, 0], self.triples[:, 2]
        keep = np.zeros(self.num_entities, bool)
        keep[entities] = True
        for _ in range(hops):
            reached = keep.copy()
            reached[tails[keep[heads]]] = True
            reached[heads[keep[tails]]] = True
            keep = reached
        return keep

    def degrees(self) -> Ids:
        """Return the number of triples of each entity."""
        return self._counts(0) + self._counts(2)
