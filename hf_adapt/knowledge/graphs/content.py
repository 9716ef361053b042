"""The content of a graph: strings in tables, the rest in arrays."""

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
Keep = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Names:
    """The names of all entities.

    Args:
        texts: The names, those of one entity next to each other.
        offsets: Where the names of each entity begin, and where the last ones end.
        priors: How likely each name means its entity; None if that is not known.
    """

    texts: StringTable
    offsets: Ids
    priors: npt.NDArray[np.float32] | None = None

    def of(self, entity: int) -> list[str]:
        """Return the names of an entity."""
        first, last = self.offsets[entity : entity + 2].tolist()
        return self.texts[first:last]

    def owners(self, text: str, limit: int) -> list[int]:
        """Return the first entities with this name."""
        rows = pc.indices_nonzero(pc.equal(self.texts.array, text)).to_numpy()[:limit]
        found: list[int] = (np.searchsorted(self.offsets, rows, side="right") - 1).tolist()
        return found

    def part(self, keep: Keep) -> Names:
        """Return the names of some of the entities."""
        counts = np.diff(self.offsets)
        rows = np.flatnonzero(np.repeat(keep, counts))
        offsets = np.concatenate([[0], np.cumsum(counts[keep])])
        priors = None if self.priors is None else self.priors[rows]
        return Names(self.texts.take(rows), offsets, priors)


@dataclass(frozen=True)
class Content:
    """The arrays of a graph.

    Args:
        keys: The keys of the entities, each once.
        relations: The names of the relations, each once.
        triples: Head, relation and tail, sorted, each triple once; int32, (T, 3).
        names: The names of the entities; None if there are none.
        descriptions: One for each entity, empty where there is none; None if there are none.
    """

    keys: StringTable
    relations: StringTable
    triples: npt.NDArray[np.int32]
    names: Names | None = None
    descriptions: StringTable | None = None

    def arrays(self) -> dict[str, Any]:
        """Return the content as Arrow arrays by name; what the graph does not have is left out."""
        flat = pa.array(np.ascontiguousarray(self.triples).reshape(-1))
        arrays = {
            "keys": self.keys.array,
            "relations": self.relations.array,
            "triples": pa.FixedSizeListArray.from_arrays(flat, 3),
        }
        if self.names is not None:
            offsets = pa.array(self.names.offsets)
            arrays["names"] = pa.LargeListArray.from_arrays(offsets, self.names.texts.array)
            if self.names.priors is not None:
                arrays["priors"] = pa.array(self.names.priors)
        if self.descriptions is not None:
            arrays["descriptions"] = self.descriptions.array
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Content:
        """Restore the content from what `arrays` returned, without copying it.

        Raises:
            KeyError: If an array is missing.
        """
        names = None
        if (listed := arrays.get("names")) is not None:
            priors = arrays["priors"].to_numpy() if "priors" in arrays else None
            names = Names(StringTable(listed.values), listed.offsets.to_numpy(), priors)
        return cls(
            StringTable(arrays["keys"]),
            StringTable(arrays["relations"]),
            arrays["triples"].values.to_numpy().reshape(-1, 3),
            names,
            StringTable(arrays["descriptions"]) if "descriptions" in arrays else None,
        )

    def names_of(self, entity: int) -> list[str]:
        """Return all names of an entity, else its key."""
        return (self.names.of(entity) if self.names else []) or [self.keys[entity]]

    def surfaces(self) -> Iterator[tuple[str, int, float]]:
        """Iterate over (name, entity, prior), or (key, entity, 1) for entities without names."""
        for first in range(0, len(self.keys), CHUNK):
            keys = self.keys[first : first + CHUNK]
            if self.names is None:
                yield from ((key, entity, 1.0) for entity, key in enumerate(keys, first))
                continue
            offsets = self.names.offsets[first : first + len(keys) + 1].tolist()
            start, end = offsets[0], offsets[-1]
            names = self.names.texts[start:end]
            priors = self.names.priors
            weights = [1.0] * len(names) if priors is None else priors[start:end].tolist()
            for i, key in enumerate(keys):
                if offsets[i] == offsets[i + 1]:
                    yield key, first + i, 1.0
                for row in range(offsets[i] - start, offsets[i + 1] - start):
                    yield names[row], first + i, weights[row]

    def near(self, key: str) -> str:
        """Return a sentence on what an unknown key may mean."""
        if self.names is not None and (owners := self.names.owners(key, 5)):
            return f"It is a name of {', '.join(repr(self.keys[entity]) for entity in owners)}."
        # All of a large graph would take minutes: there, those that begin alike.
        several = list(self.keys) if len(self.keys) <= 20_000 else self.keys.around(key, 2_000)
        near = difflib.get_close_matches(key, several, n=5, cutoff=0.5)
        return f"Near keys: {', '.join(map(repr, near)) or 'none'}."

    def part(self, keep: Keep) -> Content:
        """Return some of the entities, renumbered in their order, and the triples among them."""
        entities = np.flatnonzero(keep)
        number = np.cumsum(keep, dtype=np.int32) - 1
        rows = self.triples[keep[self.triples[:, 0]] & keep[self.triples[:, 2]]]
        return Content(
            self.keys.take(entities),
            self.relations,
            np.stack([number[rows[:, 0]], rows[:, 1], number[rows[:, 2]]], axis=1),
            None if self.names is None else self.names.part(keep),
            None if self.descriptions is None else self.descriptions.take(entities),
        )
