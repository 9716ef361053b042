"""Official scripts with one line added: each capability works there, or refuses by name.

The expected outcome of each is the table in docs/scripts.md, which `make script-table` makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")

from safetensors.torch import load_file

from tests.helpers.models import FIVE
from tests.scripts.resuming import NAME, state
from tests.scripts.table import PAGE, read, render
from tests.scripts.yardstick import CAPABILITIES, SCRIPTS, outcome, same, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:An input array is constant"),  # see `outcome`
]


TABLE = read(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_with_one_line_added(script: str, capability: str, tmp_path: Path) -> None:
    found = outcome(script, capability, tmp_path)
    if FIVE:  # the table was made with these versions; older ones word some refusals otherwise
        assert found == TABLE[script, capability], "run `make script-table` if this is meant"


def test_the_page_is_the_tables() -> None:
    assert render(TABLE) == PAGE.read_text(encoding="utf-8")


REPRESENTATIVE = [
    ("run_glue", "MMD and DANN"),
    ("run_glue", "Knowledge"),
    ("run_summarization", "Distillation"),
    ("sft_text_lora", "Gradual unfreezing"),
    ("cross_encoder_sts", "MMD and DANN"),
]


def test_resuming_in_a_new_process(tmp_path: Path) -> None:
    """What a process computes once (hashes, vectors, caches) must be found again in the next."""
    runs: list[Any] = []
    for number, (script, capability) in enumerate(REPRESENTATIVE):
        folder = tmp_path / str(number)
        whole, refusal = train(SCRIPTS[script], CAPABILITIES[capability][0], {}, folder)
        assert refusal is None
        runs.append((state(whole.trainer.model), folder))
    asked = [(*pair, str(folder)) for pair, (_, folder) in zip(REPRESENTATIVE, runs, strict=True)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-m", "tests.scripts.resuming", json.dumps(asked)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for (weights, folder), pair in zip(runs, REPRESENTATIVE, strict=True):
        assert same(load_file(folder / NAME), weights), pair
