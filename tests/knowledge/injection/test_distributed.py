"""Two gloo processes are one, with knowledge: DDP and FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import distributed
from tests.helpers.distributed import no_sharding, results
from tests.knowledge import distributed_script

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.xdist_group("distributed"),  # one launch at a time, and its fixtures made once
]

DDP = {
    "rows": "",
    "tokens": "model=bert_tokens,form=adapter",
    "language_model": "model=llama,form=gated,checkpointed=1",
    "seq2seq": "model=t5",
    "lora": "model=lora",
    "beside_others": "predicts=1,dann=1",
}
FSDP = {"rows": "fsdp=BertLayer", "language_model": "model=llama,fsdp=LlamaDecoderLayer"}


def launch(folder: Path, jobs: dict[str, str]) -> None:
    script = "tests.knowledge.distributed_script"
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


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """By norms for the injector, whose own Adam turns rounding of tiny gradients into steps."""
    injectors = [torch.cat([v.flatten() for k, v in each.items() if k.startswith("injector.")])
                 for each in (one, two)]  # fmt: skip
    assert (injectors[0] - injectors[1]).norm() < 1e-3 * injectors[0].norm()
    for name in set(two) - {k for k in two if k.startswith("injector.")}:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("job", DDP)
def test_two_ddp_processes_are_one(ddp: Path, job: str, tmp_path: Path) -> None:
    distributed_script.main(tmp_path, DDP[job], 8, 1)
    one, two = results(tmp_path), results(ddp / job)
    assert one.keys() == two.keys()
    difference = (one["gradient"] - two["gradient"]).norm()
    assert one["gradient"].norm() > 0 and difference / one["gradient"].norm() < 1e-5
    assert_same(one, two)
    other = results(ddp / job, 1)
    weights = [k for k in two if k.startswith(("model.", "injector."))]
    assert all(torch.equal(two[k], other[k]) for k in weights)


@no_sharding
@pytest.mark.parametrize("job", FSDP)
def test_two_fsdp2_processes_are_one(fsdp: Path, job: str, tmp_path: Path) -> None:
    plain = ",".join(part for part in FSDP[job].split(",") if not part.startswith("fsdp="))
    distributed_script.main(tmp_path, plain, 8, 1)
    one, two = results(tmp_path), results(fsdp / job)
    assert_same(one, two)
