"""Student and teacher are compared in evaluations, whatever way the objective came in."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from hf_adapt import AdaptationCallback, Distillation, DistillationTrainer, adapt
from tests.helpers.data import rows
from tests.helpers.distillation import texts, tokenizer
from tests.helpers.heads import CASES
from tests.helpers.models import bert
from tests.helpers.trainers import arguments


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    predicted, labels = np.asarray(prediction.predictions).argmax(-1), prediction.label_ids
    keep = labels != -100
    return {"accuracy": float((predicted[keep] == labels[keep]).mean())}


def plain(folder: Path, name: str = "token", cls: Any = Trainer, **options: Any) -> Any:
    case = CASES[name]
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    return cls(
        **{
            "model": case.model(0),
            "args": arguments(folder, **settings),
            "train_dataset": case.data(12),
            "eval_dataset": case.data(6),
            "data_collator": case.collate,
            "compute_metrics": accuracy,
            **options,
        }
    )


def evaluations(trainer: Any) -> list[dict[str, float]]:
    """What was evaluated during training, without times."""
    return [
        {k: v for k, v in entry.items() if "time" not in k and "per_second" not in k}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]


@pytest.mark.parametrize("name", ["sequence", "token"])
def test_a_callback_compares_as_the_trainer_does(name: str, tmp_path: Path) -> None:
    teacher = CASES[name].model(1)
    ours = plain(tmp_path, name, DistillationTrainer, teacher=teacher, evaluate_distillation=True)
    called = plain(tmp_path, name)
    called.add_callback(AdaptationCallback(Distillation(CASES[name].model(1), evaluate=True)))
    adapted = plain(tmp_path, name)
    adapt(adapted, Distillation(CASES[name].model(1), evaluate=True))
    before = adapted.evaluate()
    assert before["eval_agreement"] == ours.evaluate()["eval_agreement"]
    for trainer in (ours, called, adapted):
        trainer.train()
    expected = evaluations(ours)
    assert {"eval_agreement", "eval_teacher_kl", "eval_teacher_accuracy"} <= set(expected[0])
    assert evaluations(called) == evaluations(adapted) == expected
    predicted = called.predict(CASES[name].data(6)).metrics
    assert predicted["test_agreement"] == called.evaluate()["eval_agreement"]


def test_without_evaluate_no_teacher_is_asked(tmp_path: Path) -> None:
    asked = []

    def teacher(inputs: dict[str, Any]) -> Any:
        asked.append(len(inputs["input_ids"]))
        return model.eval()(**inputs).logits

    model = CASES["token"].model(1)
    trainer = plain(tmp_path)
    trainer.add_callback(AdaptationCallback(Distillation(teacher)))
    trainer.train()
    number = len(asked)
    assert number > 0 and "eval_agreement" not in trainer.evaluate()
    assert len(asked) == number


def test_the_text_comes_with_the_evaluation_of_a_callback(tmp_path: Path) -> None:
    own, other = tokenizer(), tokenizer(reverse=True)
    data = datasets.Dataset.from_dict(
        {**own(texts(8)), "text": texts(8), "labels": [i % 3 for i in range(8)]}
    )
    trainer = plain(
        tmp_path,
        model=bert(seed=0),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(own),
        processing_class=own,
    )
    distillation = Distillation(
        bert(seed=1), teacher_processing_class=other, text_column="text", evaluate=True
    )
    trainer.add_callback(AdaptationCallback(distillation))
    trainer.train()
    assert 0 < evaluations(trainer)[0]["eval_teacher_kl"] < float("inf")


def test_generated_texts_are_refused_before_training(tmp_path: Path) -> None:
    args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True)
    trainer = plain(tmp_path, "seq2seq", Seq2SeqTrainer, args=args, compute_metrics=None)
    trainer.add_callback(AdaptationCallback(Distillation(CASES["seq2seq"].model(1), evaluate=True)))
    with pytest.raises(ValueError, match="predict_with_generate=True an evaluation generates"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_items_are_chosen_once_for_each_micro_batch(tmp_path: Path) -> None:
    """Once where the items of the step are counted, and once for the teachers and the loss."""
    calls: list[int] = []

    class Counting(DistillationTrainer):
        def item_mask(self, inputs: Any, domain: Any = None) -> Any:
            calls.append(len(inputs["input_ids"]))
            return super().item_mask(inputs, domain)

    numbers = []
    for steps in (2, 3):
        calls.clear()
        Counting(
            model=bert(seed=0),
            teacher=[bert(seed=1), bert(seed=2)],
            args=arguments(tmp_path, max_steps=steps, gradient_accumulation_steps=2),
            train_dataset=rows(40, 1),
            data_collator=CASES["sequence"].collate,
        ).train()
        numbers.append(len(calls))
    assert numbers[1] - numbers[0] == 2 * 2


def test_two_distillations_are_compared_each(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    first, second = (CASES["token"].model(seed) for seed in (1, 2))
    adapt(
        trainer,
        Distillation(first, evaluate=True),
        Distillation(second, evaluate=True, name="second", ce_weight=1.0),
    )
    both = trainer.evaluate()
    alone = plain(tmp_path)
    adapt(alone, Distillation(second, evaluate=True))
    assert both["eval_second_teacher_kl"] == alone.evaluate()["eval_teacher_kl"]
    assert both["eval_second_teacher_kl"] != both["eval_teacher_kl"]
