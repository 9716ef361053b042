"""The scores of each task after each training, and what is made of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import EarlyStoppingCallback, Trainer

from hf_adapt import AdaptationCallback, adapt
from hf_adapt.continual import ContinualMetrics, continual_metrics
from tests.helpers.adaptation import losses
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import StopAt, arguments, same_bits, weights

MATRIX = [[0.9, 0.1, 0.2], [0.95, 0.8, 0.3], [0.6, 0.85, 0.85]]
EXPECTED = dict(
    average_accuracy=0.766667,
    learning_accuracy=0.85,
    incremental_accuracy=0.847222,
    bwt=-0.125,
    fwt=0.075,
    forgetting=0.15,
)
TASKS = {"movies": rows(6, 1), "tweets": rows(7, 2)}


# ---- the numbers ----


def test_the_oracle() -> None:
    before = [0.5, 0.1, 0.15]
    assert continual_metrics(MATRIX, before) == pytest.approx(EXPECTED, abs=1e-6)
    without = {k: v for k, v in EXPECTED.items() if k != "fwt"}
    assert continual_metrics(np.array(MATRIX)) == pytest.approx(without, abs=1e-6)
    together = continual_metrics(MATRIX, before, joint=[0.9, 0.9, 0.9])
    assert together["intransigence"] == pytest.approx(0.05)


def test_tasks_to_come_are_left_out() -> None:
    wide = [[*row, 0.3, math.nan] for row in MATRIX]
    found = continual_metrics(wide, [0.5, 0.1, 0.15, 0.2, 0.2])
    assert found == pytest.approx(EXPECTED, abs=1e-6)


def test_one_task_has_nothing_to_forget() -> None:
    found = continual_metrics([[0.9, 0.2]], [0.5, 0.5])
    levels = ("average_accuracy", "learning_accuracy", "incremental_accuracy")
    assert found == dict.fromkeys(levels, 0.9)


def test_a_task_that_is_trained_again() -> None:
    """First, second, first: forgotten is the second, and learnt the first's last score."""
    matrix = [[0.7, 0.2], [0.4, 0.9], [0.8, 0.6]]
    found = continual_metrics(matrix, [0.5, 0.1], trained=[0, 1, 0])
    assert found == pytest.approx(
        dict(
            average_accuracy=(0.8 + 0.6) / 2,
            learning_accuracy=(0.8 + 0.9) / 2,
            incremental_accuracy=(0.7 + (0.4 + 0.9) / 2 + (0.8 + 0.6) / 2) / 3,
            bwt=0.6 - 0.9,
            forgetting=0.9 - 0.6,
            fwt=0.2 - 0.1,
        )
    )
    assert continual_metrics(MATRIX, [0.5, 0.1, 0.15], trained=[0, 1, 2]) == pytest.approx(
        EXPECTED, abs=1e-6
    )
    backwards = [row[::-1] for row in MATRIX]
    found = continual_metrics(backwards, [0.15, 0.1, 0.5], trained=[2, 1, 0])
    assert found == pytest.approx(EXPECTED, abs=1e-6)


def test_what_was_not_evaluated_is_not_made_up() -> None:
    found = continual_metrics(
        [[0.9, math.nan, 0.1], [math.nan, 0.8, 0.2], [0.6, 0.7, 0.8]], [0] * 3
    )
    assert math.isnan(found["fwt"]) and math.isnan(found["incremental_accuracy"])
    assert found["forgetting"] == pytest.approx((0.3 + 0.1) / 2)


@pytest.mark.parametrize(
    ("matrix", "options", "expected"),
    [
        ([0.9], {}, r"shape \(1,\)"),
        ([], {}, r"shape \(0,\)"),
        ([[0.9], [0.8]], {}, r"2 rows and 1 columns .* trained=\[0, 1, 0\]"),
        (MATRIX, {"trained": [0, 1]}, r"got trained=\[0, 1\]"),
        (MATRIX, {"trained": [0, 1, 3]}, "from 0 to 2"),
        (MATRIX, {"trained": [0, 2, 0], "joint": [0.5] * 2}, "joint must have"),
        ([[0.9, 0.1], [0.8]], {}, "equally long"),
        (MATRIX, {"baseline": [0.5]}, r"baseline must have a score for each of the 3 tasks"),
        (MATRIX, {"joint": [[0.5] * 3]}, "joint must have"),
    ],
)
def test_wrong_shapes(matrix: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        continual_metrics(matrix, **options)


# ---- the record ----


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(
    folder: Path, model: Any = None, seed: int = 1, tasks: Any = TASKS, **settings: Any
) -> Trainer:
    options = {"compute_metrics": accuracy, "callbacks": None}
    options |= {name: settings.pop(name) for name in options if name in settings}
    return Trainer(
        bert() if model is None else model,
        arguments(folder, **{"learning_rate": 1e-2, **settings}),
        train_dataset=rows(12, seed),
        eval_dataset=tasks,
        data_collator=collate,
        **options,
    )


def scores(trainer: Trainer, metric: str = "accuracy") -> dict[str, float]:
    found = trainer.evaluate()
    return {task: found[f"eval_{task}_{metric}"] for task in TASKS}


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_row_for_each_training(metric: str, tmp_path: Path, capsys: Any) -> None:
    model, own = bert(), ContinualMetrics(metric=metric)
    expected: list[dict[str, float]] = [scores(trainer_of(tmp_path / "before", model), metric)]
    for seed, task in enumerate(TASKS):
        trainer = trainer_of(tmp_path / "runs" / task, model, seed)
        adapt(trainer, own).train()
        expected.append(scores(trainer, metric))
    file = tmp_path / "runs" / "continual_metrics.json"
    record = json.loads(file.read_text())
    assert [record["baseline"], *record["rows"].values()] == expected
    assert list(record["rows"]) == list(TASKS)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    sign = 1 if metric == "accuracy" else -1
    matrix = [[sign * row[task] for task in TASKS] for row in expected]
    found = continual_metrics(matrix[1:], matrix[0])
    assert losses(trainer, "continual/bwt") == [found["bwt"]]
    assert losses(trainer, "continual/average_accuracy") == [sign * found["average_accuracy"]]
    said = capsys.readouterr().out
    assert f"bwt {found['bwt']:.4f}" in said and f"learning {metric}" in said


def test_only_a_first_training_measures_the_baseline(tmp_path: Path) -> None:
    """Evaluations cost time; and weights that were resumed are no baseline."""
    first = trainer_of(tmp_path / "a", save_strategy="steps", save_steps=1, callbacks=[StopAt(1)])
    adapt(first, ContinualMetrics()).train()
    file = tmp_path / "continual_metrics.json"
    before = json.loads(file.read_text())["baseline"]
    again = trainer_of(tmp_path / "a")
    adapt(again, ContinualMetrics()).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-1"))
    record = json.loads(file.read_text())
    assert record["baseline"] == before, "a resumed run finds it in the file"
    assert list(record["rows"]) == ["movies"], "and goes on with the task of the checkpoint"
    assert record["rows"]["movies"] == scores(again)
    # The first is the baseline, which the checkpoint remembers, and the last is this test's.
    assert len(losses(again, "eval_movies_loss")) == 3

    file.unlink()
    again = trainer_of(tmp_path / "a")
    adapt(again, ContinualMetrics()).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-1"))
    assert json.loads(file.read_text())["baseline"] is None


def test_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    states = []
    for name in ("plain", "recorded"):
        trainer = trainer_of(tmp_path / name, bert(dropout=True))
        if name == "recorded":
            trainer.add_callback(AdaptationCallback(ContinualMetrics("tweets")))
        trainer.train()
        states.append(weights(trainer.model))
    assert same_bits(*states)


def test_the_weights_of_the_best_checkpoint_are_scored(tmp_path: Path) -> None:
    best = dict(eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1)
    best |= dict(load_best_model_at_end=True, metric_for_best_model="eval_movies_loss")
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = trainer_of(tmp_path / "a", learning_rate=0.3, max_steps=9, callbacks=[stop], **best)
    adapt(trainer, ContinualMetrics(path=tmp_path / "own" / "record.json")).train()
    assert trainer.state.global_step < 9
    record = json.loads((tmp_path / "own" / "record.json").read_text())
    assert record["rows"]["movies"] == scores(trainer)


def test_which_task_is_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "continual_metrics.json"

    def train(task: str | None, seed: int = 1, tasks: Any = TASKS) -> list[str]:
        adapt(trainer_of(tmp_path / "a", seed=seed, tasks=tasks), ContinualMetrics(task)).train()
        return list(json.loads(file.read_text())["rows"])

    assert train("tweets") == ["tweets"]
    first = file.read_text()
    assert train("tweets", seed=5) == ["tweets"], "a repeated training replaces its row"
    assert file.read_text() != first
    assert not caplog.records
    assert train(None) == ["tweets", "movies"]
    assert "has rows for tweets; the task trained now is movies" in caplog.text
    with pytest.raises(ValueError, match="a row for each task"):
        train(None)
    assert train("spam", tasks={**TASKS, "spam": rows(5, 9)}) == ["tweets", "movies", "spam"]
    with pytest.raises(ValueError, match="scores of spam, which eval_dataset lacks"):
        train("movies")


def test_a_task_is_trained_again_after_another(tmp_path: Path) -> None:
    file, model, seen = tmp_path / "continual_metrics.json", bert(), []
    for number, task in enumerate(["movies", "tweets", "movies"]):
        # The last is interrupted after its first step, and resumed.
        settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.05}
        if number == 2:
            settings |= {"save_strategy": "steps", "save_steps": 1, "callbacks": [StopAt(1)]}
        trainer = trainer_of(tmp_path / "a", model, number, **settings)
        adapt(trainer, ContinualMetrics(task, "loss")).train()
        seen.append(scores(trainer, "loss"))
    assert list(json.loads(file.read_text())["rows"]) == ["movies", "tweets", "movies (2)"]
    checkpoint = str(tmp_path / "a" / "checkpoint-1")
    trainer = trainer_of(tmp_path / "a", bert(), 2, max_steps=2, learning_rate=0.05)
    adapt(trainer, ContinualMetrics(metric="loss")).train(resume_from_checkpoint=checkpoint)
    seen[-1] = scores(trainer, "loss")
    record = json.loads(file.read_text())
    assert list(record["rows"]) == ["movies", "tweets", "movies (2)"]
    assert list(record["rows"].values()) == seen
    lost = seen[2]["tweets"] - seen[1]["tweets"]
    assert losses(trainer, "continual/bwt") == [pytest.approx(-lost)]
    with pytest.raises(ValueError, match=r"tweets \(2\) would be a further training .* another"):
        adapt(trainer_of(tmp_path / "b", bert(seed=5)), ContinualMetrics("tweets", "loss")).train()
    assert file.read_text() == json.dumps(record, indent=1) + "\n"


def test_another_model_than_the_last_training_left(tmp_path: Path, caplog: Any) -> None:
    """A loop over seeds that shares one file."""
    for seed, said in ((1, False), (9, True)):
        caplog.clear()
        trainer = trainer_of(tmp_path / str(seed), seed=seed, learning_rate=0.05)
        adapt(trainer, ContinualMetrics("movies" if seed == 1 else "tweets", "loss")).train()
        assert ("scores otherwise than after the last training" in caplog.text) == said


def test_what_is_known_already_can_be_forgotten(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "a", learning_rate=0.05)
    adapt(trainer, ContinualMetrics(known=["movies"])).train()
    record = json.loads((tmp_path / "continual_metrics.json").read_text())
    assert list(record["rows"]) == ["movies", "tweets"]
    assert record["rows"]["movies"] == record["baseline"]
    change = record["rows"]["tweets"]["movies"] - record["baseline"]["movies"]
    assert losses(trainer, "continual/bwt") == [pytest.approx(change)]
    with pytest.raises(ValueError, match="is trained now, or none of the tasks"):
        adapt(trainer_of(tmp_path / "b"), ContinualMetrics("movies", known="movies")).train()


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        ({}, {"tasks": rows(4, 1)}, "must be a dict of data sets by task, got Dataset"),
        ({}, {"tasks": None}, "got NoneType"),
        ({"task": "spam"}, {}, "no such task in eval_dataset, which has movies, tweets"),
        ({}, {"compute_metrics": None}, "the Trainer has no compute_metrics"),
        ({"metric": "f1"}, {}, r"no eval_movies_f1, eval_tweets_f1; it returned .*movies_accuracy"),
    ],
)
def test_refused_before_training(
    given: dict[str, Any], settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path / "a", **settings)
    with pytest.raises(ValueError, match=expected):
        adapt(trainer, ContinualMetrics(**given)).train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is no record of ContinualMetrics"),
        ("[]", "is no record of ContinualMetrics"),
        ('{"metric": "accuracy", "baseline": null, "rows": {"a": 1}}', "is no record"),
        ('{"metric": "f1", "baseline": null, "rows": {}}', "records f1, not accuracy"),
    ],
)
def test_another_file(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "continual_metrics.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        adapt(trainer_of(tmp_path / "a"), ContinualMetrics(path=tmp_path)).train()


def test_a_metric_that_is_missing_in_the_end_loses_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt(trainer_of(tmp_path / "a", max_steps=1), ContinualMetrics()).train()
    trainer = trainer_of(tmp_path / "b", max_steps=1)
    own = trainer.compute_metrics

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return own(prediction) if trainer.state.global_step == 0 else {"f1": 1.0}

    trainer.compute_metrics = compute_metrics
    adapt(trainer, ContinualMetrics("tweets")).train()
    assert "has no row for this training. The evaluation returned no eval_movies" in caplog.text
    assert list(json.loads((tmp_path / "continual_metrics.json").read_text())["rows"]) == ["movies"]
