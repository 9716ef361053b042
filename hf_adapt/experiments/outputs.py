"""What a trained model gives for the rows of both domains, kept beside its result."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from hf_adapt.engine.item_outputs import ItemOutputs

OUTPUTS_FILE = "outputs.npz"
HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class RunOutputs:
    """The items of a run; None where there were no rows.

    Args:
        source_dev: Source rows that were not trained on.
        source_test: Test rows of the source.
        target_unlabelled: Training rows of the target, whose labels nothing has seen.
        target_test: Test rows of the target, with labels: for scores, never to choose.
    """

    source_dev: ItemOutputs | None
    source_test: ItemOutputs | None
    target_unlabelled: ItemOutputs | None
    target_test: ItemOutputs | None

    def save(self, folder: Path) -> None:
        """Write them to a run's folder, the features in half precision."""
        arrays = {}
        for each in fields(self):
            items: ItemOutputs | None = getattr(self, each.name)
            if items is not None:
                for column in fields(items):
                    value = getattr(items, column.name).numpy()
                    if column.name == "features":
                        value = value.clip(-HALF_MAX, HALF_MAX).astype(np.float16)
                    arrays[f"{each.name}.{column.name}"] = value
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / OUTPUTS_FILE, **arrays)

    @classmethod
    def load(cls, folder: Path) -> RunOutputs:
        """Read what `save` has written."""
        with (folder / OUTPUTS_FILE).open("rb") as file, np.load(file) as stored:
            found: dict[str, dict[str, torch.Tensor]] = {}
            for name in stored.files:
                split, column = name.split(".")
                value = torch.from_numpy(stored[name])
                value = value.float() if value.is_floating_point() else value
                found.setdefault(split, {})[column] = value
        splits = (each.name for each in fields(cls))
        return cls(**{s: ItemOutputs(**found[s]) if s in found else None for s in splits})
