"""Rows of tensors on disk, found by the content they were computed from."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

RECORD = struct.Struct("<16sqiiI")
"""Key, offset in the data file, first position, number of positions, checksum."""


def row_keys(
    inputs: Mapping[str, torch.Tensor],
) -> tuple[list[bytes], list[tuple[int, int]] | None]:
    """A hash of each row's own content, and where it lies between its padding.

    Args:
        inputs: Tensors whose first dimension is the row, by name. With a 2-D `attention_mask` the
            padding on both sides of a row is left out of everything of its shape; the number of
            positions on the left stays in, for models with absolute positions.

    Returns:
        16 bytes for each row, and (first, past-the-last) real position of each, or None.
    """
    mask = inputs.get("attention_mask")
    size = len(next(iter(inputs.values())))
    spans = None
    if mask is not None and mask.ndim == 2:
        real = mask.bool().cpu()
        if bool(real.any(1).all()):
            first = real.int().argmax(1).tolist()
            last = real.flip(1).int().argmax(1).tolist()
            spans = [(lo, real.shape[1] - la) for lo, la in zip(first, last, strict=True)]
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(size)]
    for name in sorted(inputs):
        tensor = inputs[name].detach().cpu().contiguous()
        per_token = spans is not None and mask is not None and tensor.shape[:2] == mask.shape
        for row, digest in enumerate(hashes):
            part = tensor
            if len(tensor) == size:
                part = tensor[row]
                if per_token and spans is not None:
                    part = part[spans[row][0] : spans[row][1]]
            digest.update(f"{name}{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for row, digest in enumerate(hashes):
        if spans is not None:
            digest.update(str(spans[row][0]).encode())
    return [digest.digest() for digest in hashes], spans


class _Place(NamedTuple):
    file: str
    offset: int
    start: int
    length: int
    checksum: int | None  # None once it is known to be right


class RowStore:
    """Hidden states of rows, unpadded, in append-only files that are memory-mapped for reading.

    Each process writes files of its own and reads those of all. A record is written after the data
    that it points to, and its checksum is verified when a row from an earlier process is first
    read, so an interrupted write is never taken for a row.

    Args:
        folder: Where the files lie; made if missing.
        process: Number of this process, which names its files.
        dtype: Of the hidden states.
        tail: Shape of one position.
    """

    def __init__(
        self, folder: Path, process: int, dtype: torch.dtype, tail: tuple[int, ...]
    ) -> None:
        self.folder, self.dtype, self.tail = folder, dtype, tail
        self._position_bytes = int(np.prod(tail)) * torch.empty((), dtype=dtype).element_size()
        folder.mkdir(parents=True, exist_ok=True)
        self._own = f"{process}-{uuid.uuid4().hex[:12]}"  # no two writers share a file
        self._places: dict[bytes, _Place] = {}
        self._read_to: dict[str, int] = {}
        self._maps: dict[str, np.memmap[Any, Any]] = {}
        self.refresh()
        self._files: tuple[io.RawIOBase, io.RawIOBase] | None = None
        self._end = 0

    def _path(self, kind: str, process: str) -> Path:
        return self.folder / f"{kind}-{process}.bin"

    def _writable(self) -> tuple[io.RawIOBase, io.RawIOBase]:
        """The own data and index file, made when there is something to write."""
        if self._files is None:
            # Unbuffered: a write that fails has failed, and closing has nothing left to write.
            data = open(self._path("rows", self._own), "ab", buffering=0)
            self._files = data, open(self._path("index", self._own), "ab", buffering=0)
        return self._files

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Learn of the rows that other processes have written."""
        for path in sorted(self.folder.glob("index-*.bin")):
            process = path.stem.removeprefix("index-")
            with open(path, "rb") as file:
                file.seek(self._read_to.get(process, 0))
                content = file.read()
            data = self._path("rows", process)
            size = data.stat().st_size if data.exists() else 0
            whole = len(content) // RECORD.size * RECORD.size
            for record in RECORD.iter_unpack(content[:whole]):
                key, offset, start, length, checksum = record
                if offset + length * self._position_bytes <= size:
                    place = _Place(process, offset, start, length, checksum)
                    self._places.setdefault(key, place)
            self._read_to[process] = self._read_to.get(process, 0) + whole

    def add(self, key: bytes, hidden: torch.Tensor, start: int) -> None:
        """Keep one row.

        Args:
            key: What it is found by, 16 bytes.
            hidden: (positions, *tail), on the CPU.
            start: The position of its first real token in the padded batch.

        Raises:
            OSError: If the disk is full; rows that were kept before stay good.
        """
        if key in self._places:
            return
        content = hidden.contiguous().view(torch.uint8).numpy().tobytes()
        checksum = zlib.crc32(content)
        data, index = self._writable()
        _write(data, content)
        _write(index, RECORD.pack(key, self._end, start, len(hidden), checksum))
        self._places[key] = _Place(self._own, self._end, start, len(hidden), None)
        self._end += len(content)

    def row(self, key: bytes) -> tuple[torch.Tensor, int] | None:
        """One row and its first position, or None if it is damaged (it is forgotten)."""
        place = self._places[key]
        end = place.offset + place.length * self._position_bytes
        if place.file not in self._maps or end > len(self._maps[place.file]):
            path = self._path("rows", place.file)
            # Copy on write: torch wants memory that may be written, the file stays as it is.
            self._maps[place.file] = np.memmap(path, dtype=np.uint8, mode="c")
        content = self._maps[place.file][place.offset : end]
        if place.checksum is not None:
            if zlib.crc32(content.data) != place.checksum:
                del self._places[key]
                return None
            self._places[key] = place._replace(checksum=None)
        values = torch.from_numpy(np.asarray(content)).view(self.dtype)
        return values.view(place.length, *self.tail), place.start

    def batch(self, keys: Sequence[bytes], positions: int | None) -> torch.Tensor | None:
        """The rows of a batch.

        Args:
            keys: One per row, all of them in the store.
            positions: Padded length; None if the rows are whole and of one length.

        Returns:
            (rows, positions, *tail), zero where there is padding; None if a row is damaged (it is
            forgotten) or does not fit.
        """
        rows = [self.row(key) for key in keys]
        if any(row is None for row in rows):
            return None
        found = [row for row in rows if row is not None]
        if positions is None:
            positions = len(found[0][0])
            if any(len(values) != positions for values, _ in found):
                return None
        batch = torch.zeros(len(found), positions, *self.tail, dtype=self.dtype)
        for target, (values, start) in zip(batch, found, strict=True):
            target[start : start + len(values)] = values
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files or ():
            file.close()
        self._files = None
        self._maps.clear()


def _write(file: io.RawIOBase, content: bytes) -> None:
    """Write all of it: a raw file may take less than it was given."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) or 0 :]


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Say what a store holds, for a person who finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "description.json"
    half = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    half.write_text(json.dumps(description, indent=1), encoding="utf-8")
    half.replace(path)  # another process may be reading
