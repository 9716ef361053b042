"""Text files that appear complete or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or none, so that an interrupted run leaves nothing half-written.

    Args:
        path: Its folder is made if it is missing; an earlier file is replaced.
        text: The content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
