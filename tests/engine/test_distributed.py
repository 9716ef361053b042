"""Two gloo processes are one: DDP and FSDP2, with discriminators in step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import Job, assert_same, logs, marks, no_sharding, results
from tests.helpers.models import FIVE

pytestmark = marks
SCRIPT = "tests.engine.distributed_script"
JOBS = {
    "rows": Job(SCRIPT),
    **({"resumed": Job(SCRIPT, {"resume": "rows"})} if FIVE else {}),
    "tokens": Job(SCRIPT, {"head": "token"}),
    "accumulated": Job(SCRIPT, {"head": "token"}, per_device=2, steps=2),
    "checkpointing": Job(SCRIPT, {"gradient_checkpointing": True}),
    "coupled": Job(SCRIPT, {"mmd": True}),
    "streamed": Job(SCRIPT, {"streamed": True}),
    # A process often has no row of such a stream, and must run the same forwards.
    "labelled": Job(SCRIPT, {"memory": "labelled"}, per_device=2, steps=2),
    "hidden": Job(SCRIPT, {"memory": "hidden", "head": "token"}, per_device=2, steps=2),
}
if FIVE:
    JOBS["sharded"] = Job(SCRIPT, {"fsdp": "BertLayer"})
    JOBS["sharded_resumed"] = Job(SCRIPT, {"fsdp": "BertLayer", "resume": "sharded"})


@pytest.mark.parametrize(
    ("job", "same", "per_device", "steps"),
    [
        ("rows", "rows", 8, 1),
        ("tokens", "tokens", 8, 1),
        ("accumulated", "tokens", 8, 1),
        ("checkpointing", "rows", 8, 1),
        ("streamed", "streamed", 8, 1),
        ("labelled", "labelled", 8, 1),
        ("hidden", "hidden", 8, 1),
        ("coupled", "coupled", 4, 2),  # a coupled term is the mean over micro-batches and ranks
    ],
)
def test_two_ddp_processes_are_one(
    job: str,
    same: str,
    per_device: int,
    steps: int,
    two_processes: Path,
    one_process: Callable[[Job], Path],
) -> None:
    alone = one_process(JOBS[same].alone(per_device, steps))
    one, two = results(alone), results(two_processes / job)
    assert one["gradient"].abs().max() > 0
    gradients = one["gradient"], two["gradient"]
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5
    assert_same(one, two, rtol=1e-4, atol=1e-6)
    for a, b in zip(logs(alone), logs(two_processes / job), strict=True):
        for key in ("loss", "loss/task", "loss/dann", "dann/domain_accuracy", "loss/memory"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_discriminators_are_in_step(two_processes: Path) -> None:
    for job in ("rows", "tokens", "coupled"):
        one, other = results(two_processes / job, 0), results(two_processes / job, 1)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(not FIVE, reason="the plain Trainer of 4.57 cannot resume under DDP on a CPU")
def test_resume_under_ddp_is_bit_exact(two_processes: Path) -> None:
    whole, resumed = results(two_processes / "rows"), results(two_processes / "resumed")
    assert len(whole) > 10
    assert all(torch.equal(whole[name], resumed[name]) for name in set(whole) - {"gradient"})


@no_sharding
def test_two_fsdp2_processes_are_one(
    two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    sharded = two_processes / "sharded"
    assert (sharded / "out" / "checkpoint-2" / "pytorch_model_fsdp.bin").exists()
    alone = results(one_process(JOBS["rows"].alone()))
    assert_same(alone, results(sharded), rtol=1e-4, atol=1e-6)
    assert_same(results(sharded, 0), results(sharded, 1), rtol=0, atol=0)


@no_sharding
def test_resume_under_fsdp2_is_exact(two_processes: Path) -> None:
    whole, resumed = results(two_processes / "sharded"), results(two_processes / "sharded_resumed")
    assert_same(whole, resumed, rtol=0, atol=0)


@no_sharding
def test_an_fsdp2_run_saves_a_plain_model(two_processes: Path) -> None:
    from transformers import BertForSequenceClassification

    model, info = BertForSequenceClassification.from_pretrained(
        two_processes / "sharded" / "final", output_loading_info=True
    )
    assert not any(info.values()), info
    saved = {f"model.{k}": v for k, v in model.state_dict().items()}
    whole = results(two_processes / "sharded")
    trained = {k: v for k, v in whole.items() if k.startswith("model.")}
    assert_same(saved, trained, rtol=0, atol=0)
