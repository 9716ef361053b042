"""Training runs in two processes on this machine, and in this one to compare.

A test module lists its runs in `JOBS`. The fixture `two_processes` trains those of all selected
modules in one launch, as to start processes is what takes the time; `one_process` trains a run
here. A run's script has a function `main(folder, per_device, steps, **options)`.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from tests.helpers.models import FIVE
from tests.helpers.trainers import GradientRecorder, arguments

ROOT = Path(__file__).parents[2]
no_sharding = pytest.mark.skipif(not FIVE, reason="accelerate 1.10 shards on no CPU")
marks = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("distributed"),  # all in one worker: one launch
]


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        script: The module whose `main` trains.
        options: Further arguments of `main`; `fsdp` names the layers that are sharded.
        per_device: Rows per process in a micro-batch.
        steps: Micro-batches per optimizer step.
    """

    script: str
    options: dict[str, Any] = field(default_factory=dict)
    per_device: int = 4
    steps: int = 1

    def train(self, folder: Path) -> None:
        """Train, and write the results to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        importlib.import_module(self.script).main(
            folder, self.per_device, self.steps, **self.options
        )

    def alone(self, per_device: int = 8, steps: int = 1) -> "Job":
        """The same run for one process, with the same rows in each optimizer step."""
        options = {name: value for name, value in self.options.items() if name != "fsdp"}
        return replace(self, options=options, per_device=per_device, steps=steps)


def launch(folder: Path, jobs: Mapping[str, Job]) -> None:
    """Train runs in two processes, each in a folder of its name."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # As a module: the files beside it must not hide libraries of the same name.
    command += ["--module", "tests.helpers.distributed", str(folder)]
    (folder / "jobs.json").write_text(json.dumps({name: asdict(job) for name, job in jobs.items()}))
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=840, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


# ---- what scripts share ----


def quiet_arguments(
    folder: Path, per_device: int, steps: int, fsdp: str | None = None, **settings: Any
) -> TrainingArguments:
    """Arguments of a short run, sharded if `fsdp` names layers."""
    if fsdp is not None:
        allow_fsdp_on_cpu()
        config = {"version": 2, "transformer_layer_cls_to_wrap": [fsdp]}
        settings = dict(settings, fsdp=True, fsdp_config=config)
    defaults: dict[str, Any] = dict(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=steps,
        max_steps=4,
        max_grad_norm=0.5,
        optim="adamw_torch",
        adam_epsilon=1e-3,  # Adam turns rounding of tiny gradients into whole steps
    )
    return arguments(folder / "out", **{**defaults, **settings})


def allow_fsdp_on_cpu() -> None:
    """accelerate refuses to shard on a CPU, though torch's fully_shard runs there over gloo."""
    original = AcceleratorState.__init__
    if original.__name__ == "sharding_init":
        return

    def sharding_init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            # Every new AcceleratorState takes the process group's own type over again.
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = sharding_init


def save_results(
    folder: Path, trainer: Trainer, recorder: GradientRecorder, **tensors: torch.Tensor
) -> None:
    """Save what must agree: the model, the first gradient if it was recorded, the logs and more."""
    state = {f"model.{k}": v for k, v in full_state(trainer).items()}
    if recorder.gradients:
        state["gradient"] = recorder.gradients[0]
    torch.save({**state, **tensors}, folder / f"rank{trainer.args.process_index}.pt")
    if trainer.args.process_index == 0:
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))


def full_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The whole weights, gathered where they are sharded."""
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {
        k: getattr(v, "full_tensor", lambda v=v: v)().detach().clone() for k, v in state.items()
    }


# ---- what tests read ----


def results(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """What a process of a run saved."""
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def logs(folder: Path) -> list[dict[str, Any]]:
    """What the first process of a run logged."""
    return json.loads((folder / "logs.json").read_text())


def assert_same(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    """The same names with the same values, but for the gradient if one has none."""
    assert set(one) - {"gradient"} == set(other) - {"gradient"}
    for name in set(one) & set(other):
        torch.testing.assert_close(one[name], other[name], **tolerance)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    before = dict(os.environ)
    for name, job in json.loads((root / "jobs.json").read_text()).items():
        print(name, flush=True)  # the last one printed is the one that failed
        Job(**job).train(root / name)
        AcceleratorState._reset_state()  # of a sharded run, or of another precision
        os.environ.clear()
        os.environ.update(before)
    torch.distributed.barrier()  # none leaves while another still talks
    torch.distributed.destroy_process_group()
