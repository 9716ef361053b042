"""What is stored beside the model, and how it is read back.

`adaptation.safetensors` (the auxiliary modules' weights) lies in every checkpoint and in the final
folder, `adaptation_optimizer.pt` (their optimizer and the adaptations' own state) in checkpoints.
The model's own files are not touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from hf_adapt.engine.adaptation import Adaptation
    from hf_adapt.engine.auxiliary import AuxiliaryOptimizer

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


def read_state(folder: str) -> dict[str, Any] | None:
    """What `save_state` wrote, or None if the folder has it not."""
    path = os.path.join(folder, STATE_FILE)
    if not os.path.isfile(path):
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_state(
    adaptations: Sequence[Adaptation], optimizer: AuxiliaryOptimizer | None, folder: str
) -> None:
    """Read back what `save_state` wrote, if the folder has it; the optimizer's if one is given."""
    state = read_state(folder)
    if state is None:
        return
    if optimizer is not None:
        optimizer.load_state_dict(state["auxiliary"])
    for adaptation in adaptations:
        if adaptation.name in state["adaptations"]:
            adaptation.load_state_dict(state["adaptations"][adaptation.name])
