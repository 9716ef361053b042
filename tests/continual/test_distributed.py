"""A record that two processes keep together."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import Job, marks, results

pytestmark = marks
JOBS = {"record": Job("tests.continual.record_script")}


def test_two_processes_keep_one_record(
    two_processes: Path, one_process: Callable[[Job], Path]
) -> None:
    together, alone = two_processes / "record", one_process(JOBS["record"].alone())
    two, one = (json.loads((each / "record.json").read_text()) for each in (together, alone))
    assert list(two["rows"]) == list(one["rows"]) == ["movies", "tweets"]
    for task in ("movies", "tweets"):
        assert two["rows"][task] == pytest.approx(one["rows"][task], rel=1e-4)
    assert two["baseline"] == pytest.approx(one["baseline"])
    first, other = (results(together, rank) for rank in (0, 1))
    assert all(torch.equal(first[name], other[name]) for name in first)
