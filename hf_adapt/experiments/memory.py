"""The highest memory that a process or a device has used."""

from __future__ import annotations

from pathlib import Path

import torch


def resident() -> int:
    """Bytes that this process holds in memory. Linux only."""
    return _status("VmRSS")


def restarted_peak(device: str) -> int | None:
    """Forget the highest memory so far; return the bytes held now, or None if that is unknown."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is held now
    except OSError:
        return None
    return peak(device)


def peak(device: str) -> int:
    """The highest number of bytes held since `restarted_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
