"""Every Python block of some pages runs as it stands."""

import logging
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer

from hf_adapt.evaluation import Candidate
from tests.helpers.models import bert
from tests.helpers.toy import rows, sentences, tokenizer
from tests.helpers.trainers import arguments

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = {
    f"{page}-{number}": textwrap.dedent(block)
    for page in (
        "adaptation",
        "choosing",
        "continual",
        "migration",
        "multitask",
        "quickstart",
        "using",
    )
    for number, block in enumerate(
        re.findall(
            r"^ *```python\n(.*?)^ *```", (DOCS / f"{page}.md").read_text("utf-8"), re.S | re.M
        )
    )
}


def labelled(number: int, seed: int) -> Any:
    """Rows of three classes, with their texts."""
    made = rows(number, seed).remove_columns(["labels"])
    return made.add_column("labels", [i % 3 for i in range(number)])


def tagged(number: int, seed: int) -> Any:
    """Rows with one of four tags for each token."""
    made = rows(number, seed, keep=()).remove_columns(["labels"])
    return made.map(lambda row: {"tags": [token % 4 for token in row["input_ids"]]})


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def make_trainer() -> Trainer:
        return Trainer(
            bert(seed=1),
            arguments("candidates", max_steps=2),
            train_dataset=labelled(24, 1),
            eval_dataset=labelled(60, 5),
            processing_class=own,
        )

    random = np.random.default_rng(0)
    scores = random.normal(size=(3, 50, 3))
    dev = random.normal(size=(60, 3))
    given = {
        "trainer": trainer,
        "target": target,
        "model": model,
        "tokenizer": own,
        "source": labelled(24, 1),
        "start": bert(seed=3),
        "teacher": bert(seed=3),
        "student": bert(seed=4),
        "args": trainer.args,
        "old": labelled(40, 6),
        "new": labelled(24, 1),
        "old_test": labelled(12, 7),
        "new_test": labelled(12, 8),
        "source_dev": labelled(60, 5),
        "make_trainer": make_trainer,
        "topics": labelled(24, 1),
        "mails": labelled(24, 2).map(lambda row: {"labels": row["labels"] % 2}),
        "tagged": tagged(24, 3),
        "few_target_labels": labelled(6, 9),
        "dev_labels": np.arange(60) % 3,
        "candidates": [
            Candidate.of(f"model {number}", dev, np.arange(60) % 3, each)
            for number, each in enumerate(scores)
        ],
        "ask_a_person": lambda row: row % 3,
        **{n: random.normal(size=(60, 3)) for n in ("dev_logits", "my_dev_logits")},
        **{n: random.normal(size=(50, 3)) for n in ("target_logits", "my_target_logits")},
        "features_before_training": random.normal(size=(50, 8)),
    }
    try:
        exec(compile(BLOCKS[name], name, "exec"), given)
    finally:
        logging.getLogger("hf_adapt.alignment").setLevel(logging.NOTSET)


def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for the model that it names."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.S)
    bert(num_labels=2).save_pretrained("model")
    tokenizer().save_pretrained("model")
    for name, label in (("source", ",label"), ("target", "")):
        lines = [
            f"{text}{',' + str(i % 2) if label else ''}" for i, text in enumerate(sentences(24, 1))
        ]
        Path(f"{name}.csv").write_text("\n".join([f"text{label}", *lines]))
    exec(block.replace("sentence-transformers/all-MiniLM-L6-v2", "model"), {})
    assert AutoModelForSequenceClassification.from_pretrained("adapted").config.num_labels == 2
