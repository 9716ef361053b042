"""One vector for each entity, gathered by number from a table that stays on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from hf_adapt.knowledge.graphs.graph import KnowledgeGraph
from hf_adapt.knowledge.graphs.text_files import SHOWN
from hf_adapt.knowledge.vectors.descriptions import encode_descriptions
from hf_adapt.knowledge.vectors.files import read_npy, read_safetensors, read_text
from hf_adapt.knowledge.vectors.training import train_vectors
from hf_adapt.storage.fingerprint import fingerprint
from hf_adapt.storage.folder import read_folder, write_folder

KIND, FORMAT, MADE_BY = "entity_vectors", 2, "EntityVectors.save(folder)"

Table = npt.NDArray[Any]


class EntityVectors:
    """One vector for each entity of a graph; a batch gathers the rows of its entities.

    Created by one of the `from_` methods, [`train`] or [`load`]. A table that was read from a file
    stays memory-mapped: only the rows that are gathered are read, and a worker process opens the
    file again instead of getting a copy. So save a table of a million vectors and load it.

    Args:
        table: (entities, dimension), floating; bfloat16 as uint16.
        metadata: How the vectors were made.
        is_bfloat16: Whether a uint16 table has the bits of bfloat16.
        order: The row of each entity; row i for entity i if it is None.

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
        self._reopen: Callable[[], Table] | None = None
        """Maps the table into memory again in another process; without it the table is copied."""
        self.metadata: dict[str, Any] = dict(metadata or {})

    @property
    def dimension(self) -> int:
        """The number of dimensions of a vector."""
        return int(self._table.shape[1])

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        how = self.metadata.get("made_by", "unknown")
        return f"EntityVectors({len(self):,} entities, dimension {self.dimension}, by {how})"

    def gather(self, entities: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the vectors of entities, given by number, and zeros for -1.

        Shape:
            - entities: (...); output: (..., dimension) float32.
        """
        entities = np.asarray(entities)
        if entities.size and not np.issubdtype(entities.dtype, np.integer):
            raise TypeError(f"Entities must be whole numbers, got {entities.dtype}.")
        flat = entities.reshape(-1).astype(np.int64, copy=False)
        if len(flat) and (int(flat.min()) < -1 or int(flat.max()) >= len(self)):
            raise IndexError(
                f"Entities must be -1 (none) or 0 to {len(self) - 1}; got {int(flat.min())} to "
                f"{int(flat.max())}. Were they linked with another graph?"
            )
        if len(self) == 0:
            return np.zeros((*entities.shape, self.dimension), np.float32)
        found = self._rows(np.maximum(flat, 0))
        found[flat < 0] = 0.0
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
        """Create them from an array or tensor, (entities, dimension), whose row i is entity i.

        float16, float32 and bfloat16 are kept as they are. The graph, if it is given, must have as
        many entities; `metadata` tells how the vectors were made.
        """
        is_bfloat16 = isinstance(array, torch.Tensor) and array.dtype == torch.bfloat16
        array = _numpy(array) if isinstance(array, torch.Tensor) else np.asanyarray(array)
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
        finite = [np.isfinite(block).all(axis=1) for block in vectors._blocks()]
        if len(bad := np.flatnonzero(~np.concatenate([*finite, np.ones(0, bool)])).tolist()):
            shown = [f"{row} ({graph.key(row)})" if graph else str(row) for row in bad[:SHOWN]]
            raise ValueError(
                f"{source} has values that are not finite in {len(bad):,} rows: {', '.join(shown)}"
                f"{' …' * (len(bad) > SHOWN)}. They would make every loss NaN: set them to 0 or "
                "make the vectors again."
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
        """Create them from .npy, .safetensors, word2vec text, or a folder of saved vectors.

        Args:
            path: A `.npy` or `.safetensors` file, whose row i is entity i and which stays
                memory-mapped; text (`.txt`, `.vec`, also `.gz`) with a key and its vector on each
                line, with or without a first line of their numbers; or a folder.
            graph: Whose entities they are. Words of a text file are compared with the entities'
                keys, then with their labels (underscores may stand for spaces). Of a word that is
                there twice the first counts, and blank words are left out, with a warning.
            name: The tensor's name in a `.safetensors` file with several.
            missing: What to do with entities that a text file does not have: `"zero"` sets them
                to zeros and logs their number, `"error"` raises.

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
        if path.suffix.lower() == ".npy":
            reopen, is_bfloat16 = partial(read_npy, path.resolve()), False
        elif path.suffix.lower() == ".safetensors":
            is_bfloat16 = read_safetensors(path, name).dtype == torch.bfloat16
            reopen = partial(_tensor, path.resolve(), name)
        else:
            array, metadata["found"] = read_text(path, graph, missing)
            return cls._checked(array, graph, metadata, False, str(path))
        vectors = cls._checked(reopen(), graph, metadata, is_bfloat16, str(path))
        vectors._reopen = reopen
        return vectors

    @classmethod
    def train(cls, graph: KnowledgeGraph, model: str = "TransE", **options: Any) -> EntityVectors:
        """Learn vectors that predict the graph's own triples, with PyKEEN.

        Args:
            graph: The graph to learn.
            model: `"TransE"`, `"DistMult"`, `"ComplEx"` or `"RotatE"`.
            **options: dimension, num_epochs, learning_rate,
                batch_size, seed, device, evaluation …; the results are in `metadata`.
        """
        table, metadata = train_vectors(graph, model, **options)
        return cls.from_array(table, graph, **metadata)

    @classmethod
    def from_descriptions(
        cls, graph: KnowledgeGraph, model: torch.nn.Module, tokenizer: Any, **options: Any
    ) -> EntityVectors:
        """Encode "label: description" of each entity with the model itself.

        Args:
            graph: Whose entities they are.
            model: Any transformers model; it is left as it was.
            tokenizer: The model's own.
            **options: batch_size, max_length, pooling, device.
        """
        table, metadata = encode_descriptions(graph, model, tokenizer, **options)
        return cls.from_array(table, graph, **metadata)

    # ---- what they are used for ----

    def shuffled(self, seed: int = 0) -> EntityVectors:
        """Return the control: every entity has the vector of another one, drawn by the seed.

        What a model gains with these does not come from the graph's facts. The table is shared,
        not copied.
        """
        permutation = np.random.default_rng(seed).permutation(len(self))
        order = np.empty(len(self), np.int64)
        order[permutation] = np.roll(permutation, 1)  # one cycle through all the rows
        if self._order is not None:
            order = self._order[order]
        vectors = copy.copy(self)
        vectors._order, vectors.metadata = order, {**self.metadata, "shuffled": seed}
        vectors.__dict__.pop("fingerprint", None)
        return vectors

    def _blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        """All vectors, some at a time."""
        size = max(1, (1 << 22) // max(1, self.dimension * 4))
        for first in range(0, len(self), size):
            yield self._rows(np.arange(first, min(first + size, len(self))))

    # ---- on disk ----

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all vectors in the order of their entities."""
        return fingerprint(self._arrays())

    def _arrays(self) -> dict[str, Any]:
        table = np.ascontiguousarray(self._table, self._table.dtype.newbyteorder("="))
        flat = pa.array(table.reshape(-1))
        arrays = {"table": pa.FixedSizeListArray.from_arrays(flat, self.dimension)}
        return arrays if self._order is None else {**arrays, "order": pa.array(self._order)}

    def save(self, folder: str | Path) -> None:
        """Write them into a folder, created if missing, whose other files are left alone.

        Earlier vectors stay valid until these are complete.
        """
        about: dict[str, Any] = {"fingerprint": self.fingerprint, "metadata": self.metadata}
        about["is_bfloat16"] = self._is_bfloat16
        write_folder(folder, KIND, FORMAT, self._arrays(), about)

    @classmethod
    def load(cls, folder: str | Path, graph: KnowledgeGraph | None = None) -> EntityVectors:
        """Load saved vectors, memory-mapped, and check that they were made for this graph.

        Raises:
            FileNotFoundError: If the folder holds no vectors.
            ValueError: If it is damaged, has another format, or is of another graph.
        """
        about, arrays = read_folder(folder, KIND, FORMAT, MADE_BY)
        if "table" not in arrays or not {"metadata", "fingerprint"} <= set(about):
            raise ValueError(f"{folder} is damaged: its description is incomplete. Save again.")
        vectors = cls(
            _matrix(arrays["table"]),
            about["metadata"],
            is_bfloat16=bool(about.get("is_bfloat16")),
            order=arrays["order"].to_numpy() if "order" in arrays else None,
        )
        vectors._reopen = partial(_saved, Path(folder).resolve(), about["fingerprint"])
        vectors.__dict__["fingerprint"] = about["fingerprint"]
        check_size(len(vectors), graph, str(folder))
        made_for = vectors.metadata.get("graph")
        if graph is not None and made_for not in (None, graph.fingerprint):
            raise ValueError(
                f"{folder} holds vectors of another graph (fingerprint {made_for}) than this one "
                f"({graph.fingerprint}): entities would get each other's vectors. Make them again, "
                "or load the graph they were made for."
            )
        return vectors

    def __getstate__(self) -> dict[str, Any]:
        """Pickle a memory-mapped table as its path."""
        return {**self.__dict__, "_table": self._table if self._reopen is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._reopen is None:
            return
        try:
            self._table = self._reopen()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The file of the entity vectors is not as it was: {error} A process that gets "
                "the vectors opens the same file; keep it where it is while they are used."
            ) from error


def _numpy(tensor: torch.Tensor) -> Table:
    """The same memory; bfloat16, which numpy does not know, as uint16."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.uint16 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy()


def _tensor(path: Path, name: str | None) -> Table:
    return _numpy(read_safetensors(path, name))


def _saved(folder: Path, expected: str) -> Table:
    about, arrays = read_folder(folder, KIND, FORMAT, MADE_BY)
    if about["fingerprint"] != expected:
        raise ValueError(f"{folder} holds other vectors now.")
    return _matrix(arrays["table"])


def _matrix(array: Any) -> Table:
    """The rows of an Arrow array of lists of one size, not copied."""
    rows: Table = array.values.to_numpy().reshape(-1, array.type.list_size)
    return rows


def check_size(rows: int, graph: KnowledgeGraph | None, source: str) -> None:
    """Raise a ValueError if a table has not one row for each entity."""
    if graph is not None and rows != len(graph):
        raise ValueError(
            f"{source} has {rows:,} rows, and the graph {len(graph):,} entities: expected one row "
            "for each, in their order. Make the table for this graph, or load the graph it was "
            "made for; a word2vec text file is matched by names instead."
        )
