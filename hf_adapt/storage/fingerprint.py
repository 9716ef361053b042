"""A hash of Arrow arrays that depends on their content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def fingerprint(arrays: Mapping[str, Any]) -> str:
    """Hash Arrow arrays without nulls and their names, the same on every machine.

    Args:
        arrays: Arrow arrays of strings, numbers, or lists of these.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.type} {len(array)}\n".encode())
        for part in _buffers(array):
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def _buffers(array: Any) -> Iterator[npt.NDArray[Any]]:
    """The memory of an array, wherever it begins in its buffers."""
    if pa.types.is_fixed_size_list(array.type):
        yield from _buffers(array.flatten())
    elif pa.types.is_large_list(array.type):
        yield array.offsets.to_numpy() - array.offsets[0].as_py()
        yield from _buffers(array.flatten())
    elif pa.types.is_large_string(array.type):
        _, offsets, data = array.buffers()
        starts = np.frombuffer(offsets, np.int64)[array.offset :][: len(array) + 1]
        if len(array):
            yield starts - starts[0]
            yield np.frombuffer(data or b"", np.uint8)[starts[0] : starts[-1]]
    else:
        yield array.to_numpy(zero_copy_only=True)
