"""Every Python block of docs/adaptation.md runs as it stands."""

import logging
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from transformers import DataCollatorWithPadding, Trainer

from tests.helpers.models import bert
from tests.helpers.toy import rows, tokenizer
from tests.helpers.trainers import arguments

PAGE = Path(__file__).parents[1] / "docs" / "adaptation.md"
BLOCKS = [
    textwrap.dedent(block)
    for block in re.findall(r"^ *```python\n(.*?)^ *```", PAGE.read_text("utf-8"), re.S | re.M)
]


def labelled(number: int, seed: int) -> Any:
    """Rows of three classes, without their texts."""
    made = rows(number, seed, keep=()).remove_columns(["labels"])
    return made.add_column("labels", [i % 3 for i in range(number)])


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, own = bert(dropout=True), tokenizer()
    trainer = Trainer(
        model,
        arguments("out", max_steps=8),
        train_dataset=labelled(24, 1),
        eval_dataset=labelled(12, 5),
        data_collator=DataCollatorWithPadding(own),
        processing_class=own,
    )
    target = rows(20, 2, keep=(), low=20).remove_columns(["labels"])
    given = {"trainer": trainer, "target": target, "model": model, "tokenizer": own}
    try:
        exec(compile(block, str(PAGE), "exec"), given)
    finally:
        logging.getLogger("hf_adapt.alignment").setLevel(logging.NOTSET)
