"""Metrics of an evaluation are the same in two processes and in one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.distributed import Job, assert_same, marks, results

pytestmark = marks
SCRIPT = "tests.evaluation.distributed_script"
JOBS = {head: Job(SCRIPT, {"head": head}) for head in ("sequence", "token")}


@pytest.mark.parametrize("head", JOBS)
def test_two_processes_are_one(
    head: str, two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    one = results(one_process(JOBS[head].alone(per_device=7)))
    assert one["eval_worst_group_accuracy"] < max(v for k, v in one.items() if "_group_" in k)
    for rank in (0, 1):
        assert_same(one, results(two_processes / head, rank), rtol=1e-4, atol=1e-5)
