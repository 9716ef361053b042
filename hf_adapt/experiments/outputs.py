"""What is kept of a run: the names of its files, and what its model gives for both domains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_adapt.engine.item_outputs import ItemOutputs, load_items, save_items

RESULT_FILE = "result.json"
"""In the folder of a run: its scores."""
OUTPUTS_FILE = "outputs.npz"
"""In the folder of a run: what the trained model gives for the rows of both domains."""
LOGS_FILE = "logs.json"
"""In the folder of a run: what its last stage has logged, as `TrainerState.log_history`."""
DIAGNOSTICS_FILE = "diagnostics.json"
"""In the folder of a run: distances of the domains per layer, accuracy per group."""
CHOICE_FILE = "choice.json"
"""In the folder of a pair: which method was chosen, and why."""


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
        """Read what `save` has written.

        Raises:
            ValueError: If its parts do not belong together.
        """
        found = load_items(folder / OUTPUTS_FILE)
        if len(classes := {items.logits.shape[1] for items in found.values()}) > 1:
            raise ValueError(f"its parts have different numbers of classes, {sorted(classes)}")
        return cls(**found)
