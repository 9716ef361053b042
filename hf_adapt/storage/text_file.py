"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or none, so that an interrupted run leaves nothing half-written.

    Args:
        path: Its folder is made if it is missing; an earlier file is replaced.
        text: The content.
    """
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_figure(path: str | Path, figure: Any, **options: Any) -> None:
    """Write a picture whole or not at all.

    Args:
        path: Its folder is made if it is missing; an earlier file is replaced.
        figure: A matplotlib figure.
        **options: Passed on to `savefig`.
    """
    with whole_file(path) as part:
        figure.savefig(part, **{"dpi": 150, "format": "png", **options})


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the context ends well.

    Args:
        path: Its folder is made if it is missing; an earlier file is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
