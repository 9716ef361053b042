"""Accuracy by group, against independent formulas and hand counts."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from transformers import Trainer

from hf_adapt import AdaptationCallback, AdaptationTrainer
from hf_adapt.evaluation import WorstGroupAccuracy, group_accuracy
from tests.helpers.data import MapStyle, RowStream, collate, rows
from tests.helpers.models import FIVE, MODELS, bert, enlarged
from tests.helpers.trainers import arguments


def wilson(right: int, count: int) -> tuple[float, float]:
    """The interval as Wilson's paper has it."""
    z, p = 1.959963984540054, right / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_accuracies_and_intervals_are_their_definitions(kind: Any) -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(300, 3)), generator.integers(0, 3, 300)
    groups = generator.choice([4, 7, 9], 300, p=[0.6, 0.3, 0.1])
    labels[:20] = -100
    found = group_accuracy(kind(logits), kind(labels), kind(groups))
    assert [group.name for group in found.groups] == ["4", "7", "9"]
    for group in found.groups:
        own = (groups == int(group.name)) & (labels != -100)
        right = int((logits.argmax(1) == labels)[own].sum())
        assert (group.count, group.accuracy) == (own.sum(), right / own.sum())
        assert (group.low, group.high) == pytest.approx(wilson(right, own.sum()))
        assert group.is_uncertain == (own.sum() < 30)
    assert found.average == pytest.approx(accuracy_score(labels[20:], logits.argmax(1)[20:]))
    assert found.worst.accuracy == min(group.accuracy for group in found.groups)
    assert str(found) == str(group_accuracy(logits.argmax(1), labels, groups.tolist()))


@pytest.mark.parametrize(
    ("right", "doubt"),
    [
        ({"a": (90, 100), "b": (60, 100)}, None),
        ({"a": (90, 100), "b": (88, 100)}, "its interval contains the accuracy of the others"),
        ({"a": (90, 100), "b": (1, 2)}, "its interval contains the accuracy of the others"),
        ({"a": (90, 100), "b": (0, 9)}, "it has few items"),
        ({"b": (9, 10)}, "it is the only group"),
    ],
)
def test_a_group_is_not_called_worst_without_a_reason(
    right: dict[str, tuple[int, int]], doubt: str | None
) -> None:
    guess = np.concatenate([np.arange(count) >= yes for yes, count in right.values()])
    groups = [name for name, (_, count) in right.items() for _ in range(count)]
    found = group_accuracy(guess.astype(int), np.zeros(len(guess), int), groups)
    assert found.worst.name == "b"
    assert (found.doubt or "").startswith(doubt or "none") or found.doubt is doubt is None
    assert ("may not be the worst" in str(found)) == (doubt is not None)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"a label and a group of each; got \(2,\), \(3,\)"):
        group_accuracy([0, 1], [0, 1, 1], ["a", "b"])
    with pytest.raises(ValueError, match=r"no label. or None .no group. for all 2 items"):
        group_accuracy([0, 1], [-100, -100], ["a", "b"])


# ---- in the Trainer's evaluation ----


def grouped(number: int, labels: str = "row", column: str = "place") -> datasets.Dataset:
    made = rows(number, 3, labels)
    names = ["north", "south/east", None, 7]
    if labels == "row":
        made = made.map(lambda row, i: {"labels": -100 if i % 5 == 4 else row["labels"]}, True)
    return made.add_column(column, [str(names[i % 4] or "") or None for i in range(number)])


def trainer_in(folder: Path, observer: Any, head: str = "sequence", **settings: Any) -> Trainer:
    labels = "row" if head == "sequence" else "token"
    return Trainer(
        enlarged(bert(head), 5),
        arguments(folder, **settings),
        train_dataset=rows(12, 1, labels),
        data_collator=collate,
        eval_dataset=grouped(22, labels),
        callbacks=[AdaptationCallback(observer)],
    )


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("size", [8, 3])
def test_metrics_are_counted_by_hand(head: str, size: int, tmp_path: Path) -> None:
    observer = WorstGroupAccuracy(groups="place")
    trainer = trainer_in(tmp_path, observer, head, per_device_eval_batch_size=size)
    metrics = trainer.evaluate()
    model, count, right = trainer.model.eval(), {}, {}
    for row in trainer.eval_dataset:
        batch = {k: torch.tensor([row[k]]) for k in ("input_ids", "attention_mask")}
        guess, truth = model(**batch).logits[0].argmax(-1), torch.tensor(row["labels"])
        place = row["place"]
        count[place] = count.get(place, 0) + int((truth != -100).sum())
        right[place] = right.get(place, 0) + int((guess == truth).sum())
    names = {"north": "north", "south/east": "south_east", "7": "7"}
    expected = {f"eval_group_{own}_accuracy": right[n] / count[n] for n, own in names.items()}
    assert len(set(expected.values())) == 3
    expected["eval_worst_group_accuracy"] = min(expected.values())
    assert {k: v for k, v in metrics.items() if "group" in k} == pytest.approx(expected)
    assert observer.result is not None
    assert {g.name: g.count for g in observer.result.groups} == {n: count[n] for n in names}


def test_it_can_choose_a_checkpoint_and_sees_predictions(tmp_path: Path, caplog: Any) -> None:
    trainer = trainer_in(
        tmp_path,
        WorstGroupAccuracy(groups="place", max_groups=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_worst_group_accuracy",
    )
    trainer.train()
    logged = [e for e in trainer.state.log_history if "eval_worst_group_accuracy" in e]
    assert len(logged) == 3
    assert trainer.state.best_metric == max(e["eval_worst_group_accuracy"] for e in logged)
    assert sum(key.startswith("eval_group_") for key in logged[0]) == 1
    assert caplog.text.count("The worst group of 'place' is") == 1
    assert "test_worst_group_accuracy" in trainer.predict(trainer.eval_dataset).metrics
    unlabelled = trainer.eval_dataset.remove_columns("labels")
    assert "test_worst_group_accuracy" not in trainer.predict(unlabelled).metrics


def test_names_stay_apart_and_bounded(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, WorstGroupAccuracy(groups="place"))
    values = ["a b", "a/b", "a_b_2", "ä" * 90] * 5
    data = rows(20, 3).add_column("place", values)
    found = [key for key in trainer.evaluate(data) if key.startswith("eval_group_")]
    assert len(found) == 4 and max(map(len, found)) < 70


joins_text = pytest.mark.skipif(
    not FIVE, reason="accelerate 1.10 cannot join the batches of a stream with a column of text"
)


@pytest.mark.parametrize(
    "kind",
    [
        MapStyle,
        list,
        pytest.param(RowStream, marks=joins_text),
        pytest.param(lambda rows: rows.to_iterable_dataset(), marks=joins_text),
    ],
)
def test_rows_of_other_kinds(kind: Any, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, WorstGroupAccuracy(groups="place"))
    expected, data = trainer.evaluate(), trainer.eval_dataset
    trainer.eval_dataset = {"one": kind(data), "two": data}
    trainer.train()
    for prefix in ("eval_one", "eval_two"):
        found = trainer.evaluate(trainer.eval_dataset)
        keys = [key for key in expected if "group" in key]
        assert len(keys) == 4
        assert {f"{prefix}_{key.removeprefix('eval_')}" for key in keys} <= found.keys()


def test_a_missing_column_or_another_head_is_refused(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, WorstGroupAccuracy(groups="dialect"))
    with pytest.raises(
        ValueError, match=r"no column 'dialect' in the rows .* they have 'input_ids'"
    ):
        trainer.train()
    with pytest.raises(ValueError, match="no column 'dialect' in the rows that are evaluated"):
        trainer.evaluate()
    masked = AdaptationTrainer(
        MODELS["bert_masked"](),
        arguments(tmp_path),
        train_dataset=rows(12, 1, "lm"),
        eval_dataset=grouped(8, "lm"),
        data_collator=collate,
        objectives=WorstGroupAccuracy(groups="place"),
    )
    with pytest.raises(ValueError, match="WorstGroupAccuracy needs a head"):
        masked.train()
