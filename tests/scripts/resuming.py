"""Resumes scripts in a process of its own: `python -m tests.scripts.resuming JSON`.

JSON is a list of (script, capability, folder of the whole run).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

NAME = "resumed.safetensors"


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's state, without shared memory."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    from tests.scripts.yardstick import CAPABILITIES, SCRIPTS, resume

    for script, capability, folder in json.loads(sys.argv[1]):
        resumed = resume(SCRIPTS[script], CAPABILITIES[capability][0], {}, Path(folder))
        save_file(state(resumed.model), Path(folder) / NAME)
