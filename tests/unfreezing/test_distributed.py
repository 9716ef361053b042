"""Two gloo processes are one through every transition, under DDP and FSDP2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import Job, assert_same, logs, marks, no_sharding, results
from tests.helpers.models import FIVE, bert
from tests.helpers.trainers import weights

pytestmark = marks


def job(unfreezing: str, per_device: int = 4, steps: int = 1, **options: Any) -> Job:
    script = "tests.engine.distributed_script"
    return Job(script, {"unfreezing": unfreezing, **options}, per_device, steps)


LAYERS = {"fsdp": "BertLayer"}
JOBS = {
    "gradual": job("gradual"),
    **({"resumed": job("gradual", resume="gradual")} if FIVE else {}),
    "random": job("random"),
    "checkpointing": job("gradual", gradient_checkpointing=True),
    "accumulated": job("gradual", 2, 2, head="token"),
    "cached": job("cached", max_steps=20),
}
if FIVE:
    JOBS["sharded_gradual"] = job("gradual", **LAYERS)
    JOBS["sharded_resumed"] = job("gradual", resume="sharded_gradual", **LAYERS)
    JOBS["sharded_random"] = job("random", **LAYERS)
    JOBS["sharded_checkpointing"] = job("gradual", gradient_checkpointing=True, **LAYERS)


def assert_everything_was_trained(state: dict[str, torch.Tensor], head: str) -> None:
    """Transitions that do nothing would agree, too."""
    start = weights(bert(head))
    still = [k for k, v in start.items() if torch.equal(v, state[f"model.{k}"])]
    assert all("token_type" in k or "position" in k or "key.bias" in k for k in still), still


@pytest.mark.parametrize("job", ["gradual", "random", "checkpointing", "accumulated", "cached"])
def test_two_ddp_processes_are_one(
    job: str, two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    alone = one_process(JOBS["gradual" if job == "checkpointing" else job].alone())
    two = two_processes / job
    assert_same(results(alone), results(two), rtol=1e-4, atol=1e-6)
    assert_same(results(two, 0), results(two, 1), rtol=0, atol=0)
    for key in ("unfreezing/phase", "learning_rate/layer.1", "unfreezing/trainable_parameters"):
        assert [e.get(key) for e in logs(alone)] == [e.get(key) for e in logs(two)]
    if job == "gradual":
        assert [e["unfreezing/phase"] for e in logs(two) if "loss" in e] == [0, 1, 2, 3]
        assert_everything_was_trained(results(two), "sequence")


def test_the_cache_was_used_in_two_processes(two_processes: Path) -> None:
    shares = [e["unfreezing/cached_share"] for e in logs(two_processes / "cached") if "loss" in e]
    assert shares[0] == 0.0 and max(shares) == 1.0


@pytest.mark.skipif(not FIVE, reason="the plain Trainer of 4.57 cannot resume under DDP on a CPU")
def test_resume_under_ddp_is_bit_exact(two_processes: Path) -> None:
    whole, resumed = results(two_processes / "gradual"), results(two_processes / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in set(whole) - {"gradient"})


@no_sharding
@pytest.mark.parametrize("job", ["gradual", "random", "checkpointing"])
def test_two_fsdp2_processes_are_one(
    job: str, two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    alone = one_process(JOBS["random" if job == "random" else "gradual"].alone())
    two = two_processes / f"sharded_{job}"
    assert_same(results(alone), results(two), rtol=1e-4, atol=1e-6)
    assert_same(results(two, 0), results(two, 1), rtol=0, atol=0)
    if job == "gradual":
        assert_everything_was_trained(results(two), "sequence")


@no_sharding
def test_resume_under_fsdp2_is_exact(two_processes: Path) -> None:
    whole, resumed = (
        results(two_processes / name) for name in ("sharded_gradual", "sharded_resumed")
    )
    assert_same(whole, resumed, rtol=0, atol=0)
