"""The content of a graph, in Arrow and numpy arrays."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hf_adapt.storage.string_table import CHUNK, StringTable

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Content:
    """The arrays of a graph.

    Args:
        keys: The keys of the entities, each once.
        relations: Arrow strings: the names of the relations, each once.
        triples: Head, relation and tail, sorted, each triple once; int32, (T, 3).
        names: Arrow lists of strings: the names of each entity; None if there are none.
        priors: Arrow lists: how likely each name means its entity; None if that is not known.
        descriptions: Arrow strings, empty where there is none; None if there are none.
    """

    keys: StringTable
    relations: Any
    triples: npt.NDArray[np.int32]
    names: Any = None
    priors: Any = None
    descriptions: Any = None

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
