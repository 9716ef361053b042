"""Jobs in two processes on this machine, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer

from tests.helpers.models import FIVE

ROOT = Path(__file__).parents[2]
no_sharding = pytest.mark.skipif(not FIVE, reason="accelerate 1.10 shards on no CPU")


def launch(script: str, folder: Path, *jobs: str) -> None:
    """Run jobs of a script in two processes.

    Args:
        script: Its module, such as `tests.engine.distributed_script`.
        folder: Where it writes.
        jobs: Each is name:setting:rows:steps.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # As a module: the files beside it must not hide libraries of the same name.
    done = subprocess.run(
        [*command, "--module", script, str(folder), *jobs],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def results(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """What a process of a job saved."""
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def logs(folder: Path) -> list[dict[str, Any]]:
    """What the first process of a job logged."""
    return json.loads((folder / "logs.json").read_text())


def assert_same(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    """The same names with the same values, but for the gradient if one has none."""
    assert set(one) - {"gradient"} == set(other) - {"gradient"}
    for name in set(one) & set(other):
        torch.testing.assert_close(one[name], other[name], **tolerance)


def allow_fsdp_on_cpu() -> None:
    """accelerate refuses to shard on a CPU, though torch's fully_shard runs there over gloo."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            # Every new AcceleratorState takes the process group's own type over again.
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def full_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The whole weights, gathered where they are sharded."""
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {
        k: getattr(v, "full_tensor", lambda v=v: v)().detach().clone() for k, v in state.items()
    }
