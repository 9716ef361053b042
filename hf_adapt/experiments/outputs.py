"""What a trained model gives for the rows of both domains, kept beside its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_adapt.engine.item_outputs import ItemOutputs, load_items, save_items

OUTPUTS_FILE = "outputs.npz"


@dataclass(frozen=True)
class RunOutputs:
    """The items of a run; None where there were no rows.

    Args:
        source_dev: Source rows that were not trained on.
        source_test: Test rows of the source.
        target_unlabelled: Training rows of the target, whose labels nothing has seen.
        target_test: Test rows of the target, with labels: for scores, never to choose.
    """

    source_dev: ItemOutputs | None = None
    source_test: ItemOutputs | None = None
    target_unlabelled: ItemOutputs | None = None
    target_test: ItemOutputs | None = None

    def save(self, folder: Path) -> None:
        """Write them to a run's folder."""
        save_items(folder / OUTPUTS_FILE, vars(self))

    @classmethod
    def load(cls, folder: Path) -> RunOutputs:
        """Read what `save` has written."""
        return cls(**load_items(folder / OUTPUTS_FILE))
