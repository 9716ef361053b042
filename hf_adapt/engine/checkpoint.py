"""What is stored beside the model, and how it is read back.

`adaptation.safetensors` (the auxiliary modules' weights) lies in every checkpoint and in the final
folder, `adaptation_optimizer.pt` (their optimizer and the adaptations' own state) in checkpoints.
The model's own files are not touched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_adapt.engine.auxiliary import AuxiliaryOptimizer

if TYPE_CHECKING:
    from hf_adapt.engine.adaptation import Adaptation

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adaptation.safetensors"
STATE_FILE = "adaptation_optimizer.pt"


def save_weights(adaptations: Sequence[Adaptation], folder: str) -> None:
    """Write the auxiliary modules' weights; nothing is written where there are none."""
    tensors = {
        f"{adaptation.name}.{key}": value.detach().cpu().contiguous()
        for adaptation in adaptations
        if adaptation.module is not None
        for key, value in adaptation.module.state_dict().items()
    }
    if tensors:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, WEIGHTS_FILE)
        save_file(tensors, path + ".tmp", metadata={"format": "pt"})
        os.replace(path + ".tmp", path)


def load_weights(adaptations: Sequence[Adaptation], folder: str) -> bool:
    """Read the auxiliary modules' weights back.

    Returns:
        False if the folder has none.

    Raises:
        ValueError: If the file's weights are not those of these modules.
    """
    path = os.path.join(folder, WEIGHTS_FILE)
    if not os.path.isfile(path):
        return False
    tensors = load_file(path)
    for adaptation in adaptations:
        if adaptation.module is None:
            continue
        prefix = f"{adaptation.name}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            adaptation.module.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit the modules of {adaptation.name!r}: {error}. Resume with "
                "the same adaptations and sizes, or start from the model's weights alone."
            ) from error
    return True


def save_state(
    adaptations: Sequence[Adaptation], optimizer: AuxiliaryOptimizer, folder: str
) -> None:
    """Write the auxiliary optimizer and the adaptations' own state."""
    own = {a.name: state for a in adaptations if (state := a.state_dict())}
    if optimizer.optimizer is not None or own:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, STATE_FILE)
        torch.save({"auxiliary": optimizer.state_dict(), "adaptations": own}, path + ".tmp")
        os.replace(path + ".tmp", path)


class SavedState:
    """What a checkpoint holds of the adaptations, read once.

    Args:
        folder: The checkpoint, or None for a run that starts from the beginning.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder

    @cached_property
    def content(self) -> dict[str, Any] | None:
        """What `save_state` wrote, or None if the folder has it not."""
        path = os.path.join(self.folder or "", STATE_FILE)
        if self.folder is None or not os.path.isfile(path):
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def release(self) -> None:
        """Drop what was read."""
        self.__dict__.pop("content", None)

    def of(self, adaptation: Adaptation) -> dict[str, Any]:
        """What the adaptation's `state_dict` returned; empty if nothing was saved."""
        own: dict[str, Any] = (self.content or {}).get("adaptations", {}).get(adaptation.name, {})
        return own


class AuxiliaryState:
    """The auxiliary modules and their optimizer: they belong to a model and outlive a run.

    Args:
        model: The unwrapped model.
        adaptations: The active adaptations, whose modules are still to be built.
    """

    def __init__(self, model: nn.Module, adaptations: Sequence[Adaptation]) -> None:
        self.model = model
        self.adaptations = list(adaptations)
        self.optimizer: AuxiliaryOptimizer | None = None
        for adaptation in adaptations:
            adaptation.module = None

    def make_optimizer(self) -> None:
        """Make the optimizer of the modules, once they are built."""
        if self.optimizer is None:
            self.optimizer = AuxiliaryOptimizer(self.adaptations)

    def save_weights(self, folder: str) -> None:
        """Write the auxiliary modules beside the model."""
        save_weights(self.adaptations, folder)
        for adaptation in self.adaptations:
            adaptation.save(folder)

    def load_weights(self, folder: str) -> None:
        """Read the auxiliary modules' weights from a folder with a saved model."""
        load_weights(self.adaptations, folder)

    def save_state(self, folder: str) -> None:
        """Write the auxiliary optimizer beside the Trainer's."""
        if self.optimizer is not None:
            save_state(self.adaptations, self.optimizer, folder)

    def restore(self, saved: SavedState, done: Adaptation | None = None) -> None:
        """Restore modules, their optimizer and the adaptations' own state from a checkpoint.

        Args:
            saved: What the checkpoint holds.
            done: The adaptation whose own state has been restored already.
        """
        assert saved.folder is not None and self.optimizer is not None
        built = [a for a in self.adaptations if a.module is not None]
        found = load_weights(self.adaptations, saved.folder)
        if not found and built:
            logger.warning(
                "%s holds no auxiliary modules (it was saved by a plain Trainer): %s start from "
                "the beginning.",
                saved.folder,
                ", ".join(a.name for a in built),
            )
        if saved.content is None:
            return
        if found:
            self.optimizer.load_state_dict(saved.content["auxiliary"])
        for adaptation in self.adaptations:
            if adaptation is not done and adaptation.name in saved.content["adaptations"]:
                adaptation.load_state_dict(saved.of(adaptation))
        saved.release()

    def belongs_to(self, model: nn.Module, adaptations: Sequence[Adaptation]) -> bool:
        """Whether these modules were built for this model and these adaptations."""
        return self.model is model and self.adaptations == list(adaptations)
