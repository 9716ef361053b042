"""Two gloo processes are one, for every kind of head and teacher: DDP and FSDP2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import Job, marks, no_sharding, results
from tests.helpers.models import FIVE

pytestmark = marks


def job(**options: Any) -> Job:
    return Job("tests.distillation.distributed_script", options, per_device=2, steps=2)


DDP = {
    "rows": job(),
    "tokens": job(head="token"),
    "spans": job(head="spans"),
    "masked_lm": job(head="masked_lm"),
    "causal_lm": job(head="llama"),
    "whole_logits": job(head="llama", chunked=False),
    "seq2seq": job(head="seq2seq"),
    "image": job(head="image"),
    "features": job(features=True),
    "average": job(teacher="average"),
    "cached": job(teacher="cached"),
}
FSDP = {
    "sharded_rows": job(fsdp="BertLayer"),
    "sharded_causal_lm": job(head="llama", fsdp="LlamaDecoderLayer"),
    "sharded_teacher": job(fsdp="BertLayer", teacher="sharded"),
    "sharded_lm_teacher": job(head="llama", fsdp="LlamaDecoderLayer", teacher="sharded"),
}
JOBS = {**DDP, **(FSDP if FIVE else {})}


@pytest.mark.parametrize("job", DDP)
def test_two_ddp_processes_are_one(
    job: str, two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    one, two = results(one_process(JOBS[job].alone())), results(two_processes / job)
    assert one["gradient"].abs().max() > 0
    difference = (one["gradient"] - two["gradient"]).norm()
    assert difference / one["gradient"].norm() < 1e-5
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    other = results(two_processes / job, 1)
    assert all(torch.equal(two[k], other[k]) for k in two if k.startswith("model."))


@no_sharding
@pytest.mark.parametrize("job", FSDP)
def test_two_fsdp2_processes_are_one(
    job: str, two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    one, two = results(one_process(JOBS[job].alone())), results(two_processes / job)
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
