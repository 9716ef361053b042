"""Two gloo processes are one, for every kind of head and teacher: DDP and FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distillation import distributed_script
from tests.helpers import distributed
from tests.helpers.distributed import no_sharding, results

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.xdist_group("distributed"),  # one launch at a time, and its fixtures made once
]

DDP = {
    "rows": "",
    "tokens": "head=token",
    "spans": "head=spans",
    "masked_lm": "head=masked_lm",
    "causal_lm": "head=llama",
    "whole_logits": "head=llama,whole=1",
    "seq2seq": "head=seq2seq",
    "image": "head=image",
    "features": "features=1",
    "average": "teacher=average",
    "cached": "teacher=cached",
}
FSDP = {
    "rows": "fsdp=BertLayer",
    "causal_lm": "head=llama,fsdp=LlamaDecoderLayer",
    "sharded": "fsdp=BertLayer,teacher=sharded",
    "sharded_lm": "head=llama,fsdp=LlamaDecoderLayer,teacher=sharded",
}


def launch(folder: Path, jobs: dict[str, str]) -> None:
    script = "tests.distillation.distributed_script"
    distributed.launch(script, folder, *(f"{name}:{jobs[name]}:2:2" for name in jobs))


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: Any) -> Path:
    """All DDP jobs in one launch: starting processes is what takes the time."""
    folder = tmp_path_factory.mktemp("ddp")
    launch(folder, DDP)
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    launch(folder, FSDP)
    return folder


@pytest.mark.parametrize("job", DDP)
def test_two_ddp_processes_are_one(ddp: Path, job: str, tmp_path: Path) -> None:
    distributed_script.main(tmp_path, DDP[job], 8, 1)
    one, two = results(tmp_path), results(ddp / job)
    assert one["gradient"].abs().max() > 0
    difference = (one["gradient"] - two["gradient"]).norm()
    assert difference / one["gradient"].norm() < 1e-5
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    other = results(ddp / job, 1)
    assert all(torch.equal(two[k], other[k]) for k in two if k.startswith("model."))


@no_sharding
@pytest.mark.parametrize("job", FSDP)
def test_two_fsdp2_processes_are_one(fsdp: Path, job: str, tmp_path: Path) -> None:
    plain = ",".join(part for part in FSDP[job].split(",") if not part.startswith("fsdp="))
    distributed_script.main(tmp_path, plain, 8, 1)
    one, two = results(tmp_path), results(fsdp / job)
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
