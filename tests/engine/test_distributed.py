"""Two gloo processes are one: DDP and FSDP2, with discriminators in step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import distributed_script
from tests.helpers.distributed import assert_same, launch, logs, no_sharding, results
from tests.helpers.models import FIVE

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.xdist_group("distributed"),  # one launch at a time, and its fixtures made once
]
SCRIPT = "tests.engine.distributed_script"


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: Any) -> Path:
    """All DDP jobs in one launch: starting processes is what takes the time."""
    folder = tmp_path_factory.mktemp("ddp")
    resume = f"resume={folder / 'rows' / 'out' / 'checkpoint-2'}"
    launch(
        SCRIPT,
        folder,
        "rows::4:1",
        *([f"resumed:{resume}:4:1"] if FIVE else []),
        "tokens:head=token:4:1",
        "accumulated:head=token:2:2",
        "checkpointing:checkpointing=1:4:1",
        "coupled:mmd=1:4:1",
        "streamed:stream=1:4:1",
    )
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    resume = f"fsdp=1,resume={folder / 'rows' / 'out' / 'checkpoint-2'}"
    launch(SCRIPT, folder, "rows:fsdp=1:4:1", f"resumed:{resume}:4:1")
    return folder


@pytest.mark.parametrize(
    ("job", "setting", "per_device", "steps"),
    [
        ("rows", "", 8, 1),
        ("tokens", "head=token", 8, 1),
        ("accumulated", "head=token", 8, 1),
        ("checkpointing", "", 8, 1),
        ("streamed", "stream=1", 8, 1),
        ("coupled", "mmd=1", 4, 2),  # a coupled term is the mean over micro-batches and ranks
    ],
)
def test_two_ddp_processes_are_one(
    ddp: Path, job: str, setting: str, per_device: int, steps: int, tmp_path: Path
) -> None:
    distributed_script.main(tmp_path, setting, per_device, steps)
    one, two = results(tmp_path), results(ddp / job)
    assert one["gradient"].abs().max() > 0
    gradients = one["gradient"], two["gradient"]
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5
    assert_same(one, two, rtol=1e-4, atol=1e-6)
    for a, b in zip(logs(tmp_path), logs(ddp / job), strict=True):
        for key in ("loss", "loss/task", "loss/dann", "dann/domain_accuracy"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_discriminators_are_in_step(ddp: Path) -> None:
    for job in ("rows", "tokens", "coupled"):
        one, other = results(ddp / job, 0), results(ddp / job, 1)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(not FIVE, reason="the plain Trainer of 4.57 cannot resume under DDP on a CPU")
def test_resume_under_ddp_is_bit_exact(ddp: Path) -> None:
    whole, resumed = results(ddp / "rows"), results(ddp / "resumed")
    assert len(whole) > 10
    assert all(torch.equal(whole[name], resumed[name]) for name in set(whole) - {"gradient"})


@no_sharding
def test_two_fsdp2_processes_are_one(fsdp: Path, tmp_path: Path) -> None:
    distributed_script.main(tmp_path, "", 8, 1)
    assert (fsdp / "rows" / "out" / "checkpoint-2" / "pytorch_model_fsdp.bin").exists()
    assert_same(results(tmp_path), results(fsdp / "rows"), rtol=1e-4, atol=1e-6)
    assert_same(results(fsdp / "rows", 0), results(fsdp / "rows", 1), rtol=0, atol=0)


@no_sharding
def test_resume_under_fsdp2_is_exact(fsdp: Path) -> None:
    assert_same(results(fsdp / "rows"), results(fsdp / "resumed"), rtol=0, atol=0)


@no_sharding
def test_an_fsdp2_run_saves_a_plain_model(fsdp: Path) -> None:
    from transformers import BertForSequenceClassification

    model, info = BertForSequenceClassification.from_pretrained(
        fsdp / "rows" / "final", output_loading_info=True
    )
    assert not any(info.values()), info
    saved = {f"model.{k}": v for k, v in model.state_dict().items()}
    trained = {k: v for k, v in results(fsdp / "rows").items() if k.startswith("model.")}
    assert_same(saved, trained, rtol=0, atol=0)
