"""What tasks do to each other: two that agree help, two that conflict are pointed out."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import Trainer

from hf_adapt import AdaptationCallback
from hf_adapt.multitask import MultiTask, TaskSpec, mix
from tests.helpers.data import collate
from tests.helpers.models import bert
from tests.helpers.trainers import arguments


def parity(number: int, seed: int, flipped: bool = False, few: int = 8) -> datasets.Dataset:
    """Rows of one token among others whose class says whether it is one of the first few."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        tokens = torch.randint(5, 21, (4,), generator=generator).tolist()
        label = int(tokens[0] < 5 + few) ^ int(flipped)
        made.append({"input_ids": tokens, "attention_mask": [1] * 4, "labels": label})
    return datasets.Dataset.from_list(made)


def train(folder: Path, data: Any, method: MultiTask | None, **settings: Any) -> Trainer:
    trainer = Trainer(
        bert(num_labels=2),
        arguments(folder, **{"learning_rate": 3e-3, "max_steps": 60, **settings}),
        train_dataset=data,
        data_collator=collate,
        callbacks=[] if method is None else [AdaptationCallback(method)],
    )
    trainer.train()
    return trainer


def test_a_task_that_agrees_helps_where_labels_are_few(tmp_path: Path) -> None:
    """Twelve labels alone, and with two hundred of another task on the same question."""
    few, many, test = parity(12, 1), parity(200, 2, flipped=True), parity(300, 3)

    def accuracy(trainer: Trainer) -> float:
        logits, labels, _ = trainer.predict(test)  # type: ignore[misc]  # a named tuple
        return float((logits.argmax(-1) == labels).mean())

    settings = {"per_device_train_batch_size": 16, "max_steps": 150}
    alone = accuracy(train(tmp_path, few, None, **settings))
    method = MultiTask({"few": None, "many": TaskSpec(num_labels=2)}, diagnose_every=10)
    mixture = mix({"few": few, "many": many}, sampling="equal")
    together = accuracy(train(tmp_path, mixture, method, **settings))
    assert together > alone + 0.05
    assert method.diagnosis is not None and not method.diagnosis.harms()


def test_tasks_that_conflict_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same rows with opposite labels, learnt by one head."""
    rows = {"one": parity(40, 1), "other": parity(40, 1, flipped=True)}
    shared = MultiTask({"one": None, "other": TaskSpec(head="shared")}, diagnose_every=1)
    with caplog.at_level(logging.WARNING, "hf_adapt"):
        trainer = train(tmp_path, mix(rows), shared, per_device_train_batch_size=16)
    assert re.search(r"lowers the loss of 'one' by .* raises that of 'other'", caplog.text)
    found = json.loads((tmp_path / "task_affinity.json").read_text())
    assert found["tasks"] == ["one", "other"]
    own, other = found["affinity"][0]
    assert other < 0 and own == pytest.approx(0.01, rel=0.2)  # whatever the learning rate
    assert found["cosines"]["all"][0][1] < 0
    assert {"all", "embeddings", "layer.0"} <= found["cosines"].keys()
    assert (tmp_path / "task_affinity.png").stat().st_size > 5_000
    (last,) = [
        entry for entry in trainer.state.log_history if entry["step"] == 60 and "loss" in entry
    ]
    assert last["multitask/affinity/one->other"] == pytest.approx(found["affinity"][0][1])


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_lowers_its_own_loss_by_a_hundredth(bf16: bool, tmp_path: Path) -> None:
    """To first order, whatever the learning rate and the precision."""
    method = MultiTask({"one": None, "other": TaskSpec(num_labels=2)}, diagnose_every=1)
    rows = {"one": parity(40, 1), "other": parity(40, 2)}
    train(tmp_path, mix(rows), method, max_steps=6, per_device_train_batch_size=16, bf16=bf16)
    assert method.diagnosis is not None
    own = method.diagnosis.affinity.diagonal().tolist()
    assert own == pytest.approx([0.01, 0.01], rel=0.4)


def test_looking_changes_no_weight(tmp_path: Path) -> None:
    rows = {"one": parity(40, 1), "other": parity(40, 2)}
    weights = []
    for every in (0, 3):
        method = MultiTask({"one": None, "other": TaskSpec(num_labels=2)}, diagnose_every=every)
        trainer = train(tmp_path, mix(rows), method, max_steps=7, gradient_accumulation_steps=2)
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
