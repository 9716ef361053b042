"""One vector for each entity, gathered by number from a table that stays on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hf_adapt.knowledge import storing
from hf_adapt.knowledge.vectors import files

if TYPE_CHECKING:
    from hf_adapt.knowledge.graphs.graph import KnowledgeGraph

FORMAT = 1
SHOWN = 5

Table = npt.NDArray[Any]


class EntityVectors:
    """One vector for each entity of a graph; the rows of a batch are gathered by their numbers.

    Made by one of the `from_` methods, [`train`] or [`load`]. A table that was read from a file
    stays memory-mapped: only the rows that are gathered are read, and a worker process opens the
    file again instead of getting a copy. So a table of a million belongs in a file: `save` it and
    `load` it.

    Args:
        table: (entities, dimension), floating; bfloat16 as uint16.
        metadata: How it was made.
        is_bfloat16: What the bits of a uint16 table mean.
        order: Which row each entity has; row i for entity i where it is None.

    Example:
        >>> vectors = EntityVectors.from_array(np.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> vectors.gather(np.array([[1, -1]])).tolist()
        [[[3.0, 4.0], [0.0, 0.0]]]
    """

    def __init__(
        self,
        table: Table,
        metadata: Mapping[str, Any] | None = None,
        *,
        is_bfloat16: bool = False,
        order: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._table, self._order, self._is_bfloat16 = table, order, is_bfloat16
        self.metadata: dict[str, Any] = dict(metadata or {})

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return int(self._table.shape[1])

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        how = self.metadata.get("made_by", "unknown")
        return f"EntityVectors({len(self):,} entities, dimension {self.dimension}, by {how})"

    def gather(self, entities: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The vectors of entities, zeros for -1.

        Args:
            entities: Numbers, of any shape.

        Shape:
            - entities: (...); output: (..., dimension) float32.

        Raises:
            IndexError: If a number is below -1 or not below the number of entities.
            TypeError: If they are not whole numbers.
        """
        entities = np.asarray(entities)
        if not np.issubdtype(entities.dtype, np.integer):
            if entities.size:
                raise TypeError(f"Entities must be whole numbers, got {entities.dtype}.")
            entities = entities.astype(np.int64)
        flat = entities.reshape(-1)
        if len(flat) and (int(flat.min()) < -1 or int(flat.max()) >= len(self)):
            raise IndexError(
                f"Entities must be -1 (none) or 0 to {len(self) - 1}; got {int(flat.min())} to "
                f"{int(flat.max())}. Were they linked with another graph?"
            )
        none = flat < 0
        rows = np.where(none, 0, flat)
        if len(self) == 0:
            return np.zeros((*entities.shape, self.dimension), np.float32)
        found = self._rows(rows)
        found[none] = 0.0
        return found.reshape(*entities.shape, self.dimension)

    def _rows(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """A copy of rows as float32."""
        if self._order is not None:
            rows = self._order[rows]
        values = self._table[rows]
        if self._is_bfloat16:  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(values, dtype=np.float32)

    # ---- where they come from ----

    @classmethod
    def from_array(
        cls, array: Any, graph: KnowledgeGraph | None = None, **metadata: Any
    ) -> EntityVectors:
        """From an array or tensor whose row i is entity i.

        Args:
            array: (entities, dimension); kept as it is if it is float16 or float32.
            graph: Whose entities they are: their number is checked.
            **metadata: How it was made, kept as `metadata`.

        Raises:
            ValueError: If the shape is another, or values are not finite.
        """
        is_bfloat16 = isinstance(array, torch.Tensor) and array.dtype == torch.bfloat16
        if isinstance(array, torch.Tensor):
            array = array.detach().cpu()
            array = array.view(torch.uint16).numpy() if is_bfloat16 else array.numpy()
        array = np.asanyarray(array)
        if not is_bfloat16 and array.dtype not in (np.float16, np.float32):
            array = array.astype(np.float32)
        return cls._checked(
            array, graph, {"made_by": "array", **metadata}, is_bfloat16, "The array of vectors"
        )

    @classmethod
    def _checked(
        cls,
        table: Table,
        graph: KnowledgeGraph | None,
        metadata: dict[str, Any],
        is_bfloat16: bool,
        source: str,
    ) -> EntityVectors:
        if table.ndim != 2 or table.shape[1] == 0:
            raise ValueError(
                f"{source} must have the shape (entities, dimension); got {tuple(table.shape)}."
            )
        check_size(len(table), graph, source)
        if graph is not None:
            metadata = {**metadata, "graph": graph.fingerprint}
        vectors = cls(table, metadata, is_bfloat16=is_bfloat16)
        bad: list[int] = []
        first = count = 0
        for block in vectors._blocks():
            rows = np.flatnonzero(~np.isfinite(block).all(axis=1))
            bad += (rows + first).tolist()[:SHOWN]
            first, count = first + len(block), count + len(rows)
        if count:
            shown = [f"{row} ({graph.key(row)})" if graph else str(row) for row in bad[:SHOWN]]
            raise ValueError(
                f"{source} has values that are not finite in {count:,} rows: {', '.join(shown)}"
                f"{' …' * (count > SHOWN)}. They would make every loss NaN: set them to 0 or make "
                "the vectors anew."
            )
        return vectors

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        graph: KnowledgeGraph,
        *,
        name: str | None = None,
        missing: Literal["zero", "error"] = "zero",
    ) -> EntityVectors:
        """From .npy, .safetensors, word2vec text, or a folder that was saved.

        Args:
            path: A `.npy` or `.safetensors` file, whose row i is entity i and which stays
                memory-mapped; text (`.txt`, `.vec`, also `.gz`) with a key and its vector on each
                line, a first line with their numbers or without it; or a folder.
            graph: Whose entities they are. Words of a text file are compared with the entities'
                keys, then with their labels (underscores may stand for spaces). Of a word that is
                there twice the first counts, and blank words are left out, with a warning.
            name: Of the tensor in a `.safetensors` file with several.
            missing: What becomes of entities that a text file does not have: zeros, with their
                number logged, or an error.

        Raises:
            ValueError: If the table has another number of rows than the graph has entities,
                values are not finite, or the file is malformed.
        """
        path = Path(path)
        if path.is_dir():
            return cls.load(path, graph)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file {path}: expected .npy, .safetensors, .txt or .vec, or a folder "
                "that EntityVectors.save(folder) wrote."
            )
        metadata: dict[str, Any] = {"made_by": "file", "file": path.name}
        if path.suffix == ".npy":
            table, is_bfloat16 = files.read_npy(path), False
        elif path.suffix == ".safetensors":
            table, is_bfloat16 = files.read_safetensors(path, name)
        else:
            table, found = files.read_text(path, graph, missing)
            is_bfloat16, metadata["found"] = False, found
        return cls._checked(table, graph, metadata, is_bfloat16, str(path))

    @classmethod
    def train(cls, graph: KnowledgeGraph, model: str = "TransE", **options: Any) -> EntityVectors:
        """Vectors that predict the graph's own triples, learned by PyKEEN.

        Args:
            graph: To learn.
            model: `"TransE"`, `"DistMult"`, `"ComplEx"` or `"RotatE"`; the last two have
                complex vectors, stored as their real and then their imaginary parts.
            **options: As [`train_vectors`] takes them: dimension, num_epochs, learning_rate,
                batch_size, seed, device, evaluation …; what it measures is in `metadata`.

        Raises:
            ImportError: If PyKEEN is not installed.
        """
        from hf_adapt.knowledge.vectors.training import train_vectors

        return train_vectors(graph, model, **options)

    @classmethod
    def from_descriptions(
        cls, graph: KnowledgeGraph, model: Any, tokenizer: Any, **options: Any
    ) -> EntityVectors:
        """What a model itself makes of each entity's "label: description".

        Args:
            graph: Whose entities they are.
            model: Any transformers model, with or without a head; it is left as it was.
            tokenizer: Its own.
            **options: As [`encode_descriptions`] takes them: batch_size, max_length, pooling,
                device.
        """
        from hf_adapt.knowledge.vectors.describing import encode_descriptions

        return encode_descriptions(graph, model, tokenizer, **options)

    # ---- what becomes of them ----

    def shuffled(self, seed: int = 0) -> EntityVectors:
        """The control: every entity has the vector of another one.

        What a model gains with these it did not gain from the graph's facts. The table is shared,
        not copied.

        Args:
            seed: Of the permutation, which leaves no row in its place.
        """
        permutation = np.random.default_rng(seed).permutation(len(self))
        order = np.empty(len(self), np.int64)
        order[permutation] = np.roll(permutation, 1)  # one cycle through all the rows
        if self._order is not None:
            order = self._order[order]
        metadata = {**self.metadata, "shuffled": seed}
        return EntityVectors(self._table, metadata, is_bfloat16=self._is_bfloat16, order=order)

    def _blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        """All the vectors, some at a time."""
        size = max(1, (1 << 22) // max(1, self.dimension * 4))
        for first in range(0, len(self), size):
            yield self._rows(np.arange(first, min(first + size, len(self))))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all the vectors in the order of their entities."""
        return storing.fingerprint(self._arrays())

    def _arrays(self) -> dict[str, Table]:
        if self._order is None:
            return {"table": self._table}
        return {"table": self._table, "order": self._order}

    def save(self, folder: str | Path) -> None:
        """Write them into a folder; earlier ones there are good until these are whole.

        Args:
            folder: Made if missing. Its other files are left alone.
        """
        about = {
            "fingerprint": self.fingerprint,
            "metadata": self.metadata,
            "is_bfloat16": self._is_bfloat16,
        }
        storing.write_folder(folder, "entity_vectors", FORMAT, self._arrays(), about)

    @classmethod
    def load(cls, folder: str | Path, graph: KnowledgeGraph | None = None) -> EntityVectors:
        """Vectors that were saved, memory-mapped.

        Args:
            folder: That was saved to.
            graph: Whose entities they are, to check that it is the one they were made for.

        Raises:
            FileNotFoundError: If the folder holds no vectors.
            ValueError: If it is damaged, of a newer format, or of another graph.
        """
        made_by = "EntityVectors.save(folder)"
        about, arrays = storing.read_folder(folder, "entity_vectors", FORMAT, made_by)
        if "table" not in arrays or not isinstance(about.get("metadata"), dict):
            raise ValueError(f"{folder} is damaged: its description is not whole. Save anew.")
        vectors = cls(
            arrays["table"],
            about["metadata"],
            is_bfloat16=bool(about.get("is_bfloat16")),
            order=arrays.get("order"),
        )
        vectors.__dict__["fingerprint"] = about["fingerprint"]
        check_size(len(vectors), graph, str(folder))
        made_for = vectors.metadata.get("graph")
        if graph is not None and made_for not in (None, graph.fingerprint):
            raise ValueError(
                f"{folder} holds vectors of another graph (fingerprint {made_for}) than this one "
                f"({graph.fingerprint}): entities would get each other's vectors. Make them anew, "
                "or load the graph they were made for."
            )
        return vectors

    def __getstate__(self) -> dict[str, Any]:
        """What is memory-mapped goes by its path."""
        return {
            "metadata": self.metadata,
            "bfloat16": self._is_bfloat16,
            "table": _by_path(self._table),
            "order": None if self._order is None else _by_path(self._order),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        table, order = (_from_path(state[name]) for name in ("table", "order"))
        EntityVectors.__init__(
            self, table, state["metadata"], is_bfloat16=state["bfloat16"], order=order
        )


def check_size(rows: int, graph: KnowledgeGraph | None, source: str) -> None:
    """Raise a ValueError if a table has not one row for each entity."""
    if graph is not None and rows != len(graph):
        raise ValueError(
            f"{source} has {rows:,} rows, and the graph {len(graph):,} entities: expected one row "
            "for each, in their order. Make the table for this graph, or load the graph it was "
            "made for; a word2vec text file is matched by names instead."
        )


class _Mapped(tuple[Any, ...]):
    """Path, dtype, offset, shape of a memory map, in its pickle."""


def _by_path(array: Table) -> Any:
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    whole = isinstance(base, np.memmap) and base.filename is not None
    if not whole or base.shape != array.shape or base.dtype != array.dtype:
        return array
    if base.base is not None and isinstance(base.base, np.memmap):
        return np.array(array)  # a part of a map: its offset is that of the whole
    return _Mapped((str(Path(base.filename).resolve()), base.dtype.str, base.offset, base.shape))


def _from_path(state: Any) -> Any:
    if not isinstance(state, _Mapped):
        return state
    path, dtype, offset, shape = state
    try:
        return np.memmap(path, dtype=np.dtype(dtype), mode="r", offset=offset, shape=shape)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The entity vectors' file {path} is not as it was: {error}. A process that gets the "
            "vectors opens the same file; keep it where it is while they are used."
        ) from error
