"""Two gloo processes are one through every transition, under DDP and FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import distributed_script
from tests.helpers.distributed import assert_same, launch, logs, no_sharding, results
from tests.helpers.models import FIVE, bert
from tests.helpers.trainers import weights

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.xdist_group("distributed"),
]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    resume = f"unfreezing=gradual,resume={folder / 'gradual' / 'out' / 'checkpoint-2'}"
    launch(
        "tests.engine.distributed_script",
        folder,
        "gradual:unfreezing=gradual:4:1",
        *([f"resumed:{resume}:4:1"] if FIVE else []),
        "random:unfreezing=random:4:1",
        "checkpointing:unfreezing=gradual,checkpointing=1:4:1",
        "accumulated:unfreezing=gradual,head=token:2:2",
        "cached:unfreezing=cached,max_steps=20:4:1",
    )
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    resume = f"fsdp=1,unfreezing=gradual,resume={folder / 'gradual' / 'out' / 'checkpoint-2'}"
    launch(
        "tests.engine.distributed_script",
        folder,
        "gradual:fsdp=1,unfreezing=gradual:4:1",
        f"resumed:{resume}:4:1",
        "random:fsdp=1,unfreezing=random:4:1",
        "checkpointing:fsdp=1,unfreezing=gradual,checkpointing=1:4:1",
    )
    return folder


def assert_everything_was_trained(state: dict[str, torch.Tensor], head: str) -> None:
    """Transitions that do nothing would agree, too."""
    start = weights(bert(head))
    still = [k for k, v in start.items() if torch.equal(v, state[f"model.{k}"])]
    assert all("token_type" in k or "position" in k or "key.bias" in k for k in still), still


@pytest.mark.parametrize(
    ("job", "setting", "steps"),
    [
        ("gradual", "unfreezing=gradual", 1),
        ("random", "unfreezing=random", 1),
        ("checkpointing", "unfreezing=gradual", 1),
        ("accumulated", "unfreezing=gradual,head=token", 1),
        ("cached", "unfreezing=cached,max_steps=20", 1),
    ],
)
def test_two_ddp_processes_are_one(
    ddp: Path, job: str, setting: str, steps: int, tmp_path: Path
) -> None:
    distributed_script.main(tmp_path, setting, 8, steps)
    assert_same(results(tmp_path), results(ddp / job), rtol=1e-4, atol=1e-6)
    assert_same(results(ddp / job, 0), results(ddp / job, 1), rtol=0, atol=0)
    one, two = logs(tmp_path), logs(ddp / job)
    for key in ("unfreezing/phase", "learning_rate/layer.1", "unfreezing/trainable_parameters"):
        assert [e.get(key) for e in one] == [e.get(key) for e in two]
    if job == "gradual":
        assert [e["unfreezing/phase"] for e in two if "loss" in e] == [0, 1, 2, 3]
        assert_everything_was_trained(results(ddp / job), "sequence")


def test_the_cache_was_used_in_two_processes(ddp: Path) -> None:
    shares = [e["unfreezing/cached_share"] for e in logs(ddp / "cached") if "loss" in e]
    assert shares[0] == 0.0 and max(shares) == 1.0


@pytest.mark.skipif(not FIVE, reason="the plain Trainer of 4.57 cannot resume under DDP on a CPU")
def test_resume_under_ddp_is_bit_exact(ddp: Path) -> None:
    whole, resumed = results(ddp / "gradual"), results(ddp / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in set(whole) - {"gradient"})


@no_sharding
@pytest.mark.parametrize("job", ["gradual", "random", "checkpointing"])
def test_two_fsdp2_processes_are_one(fsdp: Path, job: str, tmp_path: Path) -> None:
    setting = "unfreezing=random" if job == "random" else "unfreezing=gradual"
    distributed_script.main(tmp_path, setting, 8, 1)
    assert_same(results(tmp_path), results(fsdp / job), rtol=1e-4, atol=1e-6)
    assert_same(results(fsdp / job, 0), results(fsdp / job, 1), rtol=0, atol=0)
    if job == "gradual":
        assert_everything_was_trained(results(fsdp / job), "sequence")


@no_sharding
def test_resume_under_fsdp2_is_exact(fsdp: Path) -> None:
    assert_same(results(fsdp / "gradual"), results(fsdp / "resumed"), rtol=0, atol=0)
