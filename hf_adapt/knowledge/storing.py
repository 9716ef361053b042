"""Arrays in a folder: written beside what is there and then named, memory-mapped when read."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_adapt.knowledge.graphs.content import Content
from hf_adapt.knowledge.strings import StringTable

Arrays = dict[str, npt.NDArray[Any]]

STRINGS = ("keys", "relations", "names", "descriptions")
NUMBERS = ("triples", "name_offsets", "priors")
ROWS = 1 << 16
"""Rows that are copied or checked at a time, so that no whole table is in memory."""


def to_arrays(content: Content) -> Arrays:
    """The arrays of a graph by name; those it does not have are left out."""
    arrays: Arrays = {}
    for name in STRINGS:
        table: StringTable | None = getattr(content, name)
        if table is not None:
            arrays[f"{name}.blob"], arrays[f"{name}.offsets"] = table.blob, table.offsets
    for name in NUMBERS:
        if (array := getattr(content, name)) is not None:
            arrays[name] = array
    return arrays


def from_arrays(arrays: Mapping[str, Any]) -> Content:
    """A graph's content from its arrays."""
    parts: dict[str, Any] = {name: arrays[name] for name in NUMBERS if name in arrays}
    for name in STRINGS:
        if f"{name}.blob" in arrays:
            parts[name] = StringTable(arrays[f"{name}.blob"], arrays[f"{name}.offsets"])
    return Content(**parts)


def fingerprint(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """A hash of arrays and their names, the same on every machine: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        little = array.dtype.newbyteorder("<")
        digest.update(f"{name} {little.str} {array.shape}\n".encode())
        for part in blocks(array):
            digest.update(np.ascontiguousarray(part, dtype=little).data)
    return digest.hexdigest()


def blocks(array: npt.NDArray[Any]) -> Iterable[npt.NDArray[Any]]:
    """Consecutive rows of an array, a few megabytes at a time."""
    rows = max(1, (ROWS * 64) // max(1, array.itemsize * int(np.prod(array.shape[1:]))))
    for first in range(0, len(array), rows):
        yield array[first : first + rows]


def write_folder(
    folder: str | Path, kind: str, version: int, arrays: Mapping[str, Any], about: dict[str, Any]
) -> None:
    """Write arrays and a description; what was there is good until all of the new is there.

    Args:
        folder: Made if missing; other files in it are left alone.
        kind: Names the description: `{kind}.json`.
        version: Of the format.
        arrays: By name; an iterable of blocks with `shape` and `dtype` is written block by block.
        about: Goes into the description.

    Raises:
        OSError: If the disk is full, or `folder` is a file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / f"{kind}.json"
    old = _read_json(description).get("arrays") if description.exists() else None
    data = folder / f"{kind}-{uuid.uuid4().hex[:12]}"
    data.mkdir()
    half = description.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        for name, array in arrays.items():
            _write_array(data / f"{name}.npy", array)
        shapes = {name: [list(a.shape), np.dtype(a.dtype).str] for name, a in arrays.items()}
        text = {"format": version, **about, "arrays": data.name, "shapes": shapes}
        half.write_text(json.dumps(text, indent=1, ensure_ascii=False), encoding="utf-8")
        half.replace(description)  # from here on the new one counts
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        half.unlink(missing_ok=True)
        raise
    if isinstance(old, str) and old.startswith(f"{kind}-") and "/" not in old:
        # Processes that have it mapped keep it; a system that forbids this leaves it lying.
        shutil.rmtree(folder / old, ignore_errors=True)


def _write_array(path: Path, array: npt.NDArray[Any]) -> None:
    with open(path, "wb") as file:
        little = np.dtype(array.dtype).newbyteorder("<")
        header = {"descr": little.str, "fortran_order": False, "shape": tuple(array.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in blocks(array):
            file.write(np.ascontiguousarray(part, dtype=little).data)


def read_folder(
    folder: str | Path, kind: str, version: int, made_by: str
) -> tuple[dict[str, Any], Arrays]:
    """The description and the arrays, memory-mapped, of a folder that was written.

    Args:
        folder: That was written.
        kind: As it was written.
        version: The newest format that is understood.
        made_by: What writes such a folder, for errors.

    Raises:
        FileNotFoundError: If the folder is not one.
        ValueError: If it is damaged or of a newer format.
    """
    folder = Path(folder)
    description = folder / f"{kind}.json"
    if not description.is_file():
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
        holds = "is no folder" if there is None else f"holds {', '.join(there[:8]) or 'nothing'}"
        raise FileNotFoundError(
            f"{folder} {holds}: expected {kind}.json, which {made_by} writes. Pass the folder that "
            "was saved to."
        )
    about = _read_json(description)
    if not isinstance(about.get("format"), int) or not isinstance(about.get("shapes"), dict):
        raise ValueError(f"{description} is damaged: it does not say what it holds. Save anew.")
    if about["format"] > version:
        raise ValueError(
            f"{folder} is of format {about['format']}, written by a newer hf_adapt; this one reads "
            f"formats up to {version}. Upgrade: pip install -U hf-adapt."
        )
    arrays = {
        name: _read_array(folder / str(about["arrays"]) / f"{name}.npy", shape, dtype)
        for name, (shape, dtype) in about["shapes"].items()
    }
    return about, arrays


def _read_array(path: Path, shape: list[int], dtype: str) -> npt.NDArray[Any]:
    try:
        # An empty file cannot be mapped.
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if np.prod(shape) else None)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}. Save the folder anew.") from error
    if list(array.shape) != shape or array.dtype != np.dtype(dtype):
        raise ValueError(
            f"{path} is damaged: expected {dtype} {shape}, got {array.dtype.str} "
            f"{list(array.shape)}. Save the folder anew."
        )
    return array


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(
            path.read_text(encoding="utf-8-sig")
        )  # an editor may have added a mark
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Save anew.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object. Save anew.")
    return content
