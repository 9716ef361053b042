"""Where the memory of an array is."""

from pathlib import Path
from typing import Any


def is_mapped(array: Any, name: str) -> bool:
    """Whether a numpy array lies in the memory map of a file of this name."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return Path(line.split(maxsplit=5)[-1]).name == name
    return False
