"""The folder on disk in which the output of frozen layers is stored."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_adapt.storage.row_store import RowStore, write_description
from hf_adapt.unfreezing.prefix.fingerprint import PrefixFingerprint

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

CACHE_FOLDER = "_frozen_prefix_cache"
"""In the output folder. Names that start with an underscore are not pushed to the Hub."""


class PrefixFolder:
    """Opens the stores of prefixes, each in a folder that is named by its fingerprint.

    Args:
        trainer: The Trainer of the run.
        root: Where the folders are; by default in the output folder, where they are removed when
            the run is complete.
    """

    def __init__(self, trainer: Trainer, root: str | os.PathLike[str] | None) -> None:
        self.trainer = trainer
        self.is_temporary = root is None
        self.root = Path(root or Path(str(trainer.args.output_dir)) / CACHE_FOLDER)
        self._opened: list[Path] = []

    def open_store(
        self,
        fingerprint: PrefixFingerprint,
        what: str,
        hidden: torch.Tensor,
        row_bytes: float,
        num_rows: int | None,
    ) -> RowStore:
        """Open the store of a prefix, and log how much of the disk it takes.

        Args:
            fingerprint: The fingerprint of the prefix.
            what: What is stored, for the log.
            hidden: A batch of it.
            row_bytes: The mean size of a row.
            num_rows: How many rows there will be, if that is known.

        Raises:
            OSError: If the disk has no room for the rows, or cannot be written to.
        """
        folder = self.root / fingerprint.digest
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        present = sum(f.stat().st_size for f in folder.glob("rows-*.bin"))
        if num_rows is None:
            size, needed = f"each row takes {_bytes(row_bytes)}", 0.0
        else:
            size = f"{num_rows:,} rows will take about {_bytes(row_bytes * num_rows)}"
            needed = max(0.0, row_bytes * num_rows - present)
        if present:
            size += f", {_bytes(present)} of which are there"
        if self.trainer.is_world_process_zero():  # a warning, so that it is seen before it is done
            message = "Frozen prefix: caching %s in %s: %s; %s are free."
            logger.warning(message, what, folder, size, _bytes(free))
        if needed > free:
            raise OSError(f"{_bytes(needed)} are needed in {self.root} and {_bytes(free)} are free")
        self._warn_of_others(folder)
        process = self.trainer.args.process_index
        store = RowStore(folder, process, hidden.dtype, tuple(hidden.shape[2:]))
        if process == 0:
            write_description(folder, fingerprint.description)
        self._opened.append(folder)
        return store

    def _warn_of_others(self, folder: Path) -> None:
        folders = (f for f in self.root.iterdir() if f.is_dir())
        others = sorted(f.name for f in folders if f not in (folder, *self._opened))
        if others:
            logger.warning(
                "%s holds rows of other prefixes (other weights, layers, precision or versions), "
                "which are not used: %s.",
                self.root,
                ", ".join(others),
            )

    def remove_if_complete(self) -> None:
        """Remove the stores of a run that is complete, unless they are in a chosen folder."""
        state, control = self.trainer.state, self.trainer.control
        finished = state.global_step >= state.max_steps or control.should_training_stop
        if self.is_temporary and finished and sys.exc_info()[0] is None:
            self.trainer.accelerator.wait_for_everyone()
            if self.trainer.is_local_process_zero():
                shutil.rmtree(self.root, ignore_errors=True)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
