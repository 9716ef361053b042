"""Two gloo processes are one, with knowledge: DDP and FSDP2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import Job, marks, no_sharding, results
from tests.helpers.models import FIVE

pytestmark = marks


def job(**options: Any) -> Job:
    return Job("tests.knowledge.distributed_script", options, per_device=2, steps=2)


DDP = {
    "rows": job(),
    "tokens": job(model="bert_tokens", form="adapter"),
    "language_model": job(model="llama", form="gated", gradient_checkpointing=True),
    "seq2seq": job(model="t5"),
    "lora": job(model="lora"),
    "beside_others": job(beside_others=True),
}
FSDP = {
    "sharded_rows": job(fsdp="BertLayer"),
    "sharded_language_model": job(model="llama", fsdp="LlamaDecoderLayer"),
}
JOBS = {**DDP, **(FSDP if FIVE else {})}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """By norms for the injector, whose own Adam turns rounding of tiny gradients into steps."""
    injectors = [torch.cat([v.flatten() for k, v in each.items() if k.startswith("injector.")])
                 for each in (one, two)]  # fmt: skip
    assert (injectors[0] - injectors[1]).norm() < 1e-3 * injectors[0].norm()
    for name in set(two) - {k for k in two if k.startswith("injector.")}:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("job", DDP)
def test_two_ddp_processes_are_one(
    job: str, two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    one, two = results(one_process(JOBS[job].alone())), results(two_processes / job)
    assert one.keys() == two.keys()
    difference = (one["gradient"] - two["gradient"]).norm()
    assert one["gradient"].norm() > 0 and difference / one["gradient"].norm() < 1e-5
    assert_same(one, two)
    other = results(two_processes / job, 1)
    weights = [k for k in two if k.startswith(("model.", "injector."))]
    assert all(torch.equal(two[k], other[k]) for k in weights)


@no_sharding
@pytest.mark.parametrize("job", FSDP)
def test_two_fsdp2_processes_are_one(
    job: str, two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    assert_same(results(one_process(JOBS[job].alone())), results(two_processes / job))
