"""Checkpoints of a Trainer from which an interrupted run can go on."""

from __future__ import annotations

import re
from pathlib import Path

LAST_WRITTEN = "trainer_state.json"
OF_THE_OPTIMIZER = ("scheduler.pt", "latest")
"""Which come with its state; the second with DeepSpeed's."""


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint from which a run goes on as if it had not been interrupted.

    One that was cut off while it was written is passed over, as is one without the optimizer's
    state (`save_only_model`).

    Args:
        folder: The Trainer's `output_dir`; it need not exist.

    Returns:
        The checkpoint's folder; None if there is none.
    """
    steps = {
        int(name[1]): file
        for file in Path(folder).glob("checkpoint-*")
        if (name := re.fullmatch(r"checkpoint-(\d+)", file.name))
        and (file / LAST_WRITTEN).exists()
        and any((file / each).exists() for each in OF_THE_OPTIMIZER)
    }
    return str(steps[max(steps)]) if steps else None
