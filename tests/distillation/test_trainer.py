"""The Trainer as a person uses it: hooks, arguments, evaluation, checks before training."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_adapt import Distillation, DistillationTrainer, InformationMaximization
from hf_adapt.distillation import CachedTeacher, DistillationArguments
from tests.helpers.data import collate, rows
from tests.helpers.distillation import make
from tests.helpers.heads import CASES
from tests.helpers.models import bert, llama
from tests.helpers.trainers import (
    GradientRecorder,
    arguments,
    cosine_and_ratio,
    same_bits,
    weights,
)


def gradient(trainer: Any) -> torch.Tensor:
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.gradients[0]


# ---- the hooks ----


def test_each_hook_may_be_overridden_in_a_few_lines(tmp_path: Path) -> None:
    called: list[str] = []

    class Mine(DistillationTrainer):
        def item_mask(self, inputs: Any, domain: Any = None) -> Any:
            called.append("item_mask")
            return super().item_mask(inputs, domain)

        def teacher_inputs(self, inputs: Any, columns: Any) -> Any:
            called.append("teacher_inputs")
            return super().teacher_inputs(inputs, columns)

        def teacher_forward(self, teacher: Any, inputs: Any) -> Any:
            called.append("teacher_forward")
            return teacher.module(**inputs)

        def select_logits(self, outputs: Any, inputs: Any, mask: Any) -> Any:
            called.append("select_logits")
            return outputs.logits[mask]

        def divergence(self, student: Any, teacher: Any, temperature: float) -> Any:
            called.append("divergence")
            return (student - teacher).square().sum(-1)

        def distillation_loss(self, student: Any, teacher: Any, temperature: float) -> Any:
            called.append("distillation_loss")
            return self.divergence(student, teacher, temperature).sum(), len(student)

    mine = gradient(make(tmp_path, Mine))
    assert set(called) == {
        "item_mask",
        "teacher_inputs",
        "teacher_forward",
        "select_logits",
        "divergence",
        "distillation_loss",
    }
    given = make(tmp_path, divergence=lambda s, t, temperature: (s - t).square().sum(-1))
    assert cosine_and_ratio(mine, gradient(given)) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_a_subclass_stays_exact_under_accumulation(tmp_path: Path) -> None:
    """Only confident items are distilled: the base still counts over the whole step."""

    class Confident(DistillationTrainer):
        def item_mask(self, inputs: Any, domain: Any = None) -> Any:
            return super().item_mask(inputs, domain) & (inputs["input_ids"] % 3 > 0)

    case, found = CASES["token"], []
    for size, steps in ((8, 1), (1, 8)):
        trainer = make(
            tmp_path,
            Confident,
            model=case.model(0),
            teacher=case.model(1),
            train_dataset=case.data(8),
            settings=dict(
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                max_steps=1,
                max_grad_norm=0.0,
            ),
        )
        found.append(gradient(trainer))
    assert cosine_and_ratio(*found) == pytest.approx((1.0, 1.0), abs=2e-5)


def test_a_count_that_was_not_announced_is_refused(tmp_path: Path) -> None:
    class Wrong(DistillationTrainer):
        def distillation_loss(self, student: Any, teacher: Any, temperature: float) -> Any:
            return (student - teacher)[:2].square().sum(), 2

    with pytest.raises(ValueError, match=r"a count of 2 for 4 items.*override item_mask"):
        make(tmp_path, Wrong).train()


@pytest.mark.parametrize("hook", ["select_logits", "divergence", "distillation_loss"])
def test_overridden_hooks_are_used_by_language_models_too(hook: str, tmp_path: Path) -> None:
    called = []

    def overridden(self: Any, *given: Any) -> Any:
        called.append(hook)
        return getattr(DistillationTrainer, hook)(self, *given)

    mine = type("Mine", (DistillationTrainer,), {hook: overridden})
    trainer = make(tmp_path, mine, model=llama(0), teacher=llama(1), train_dataset=rows(8, 1, "lm"))
    trainer.train()
    assert len(called) >= 3


@pytest.mark.parametrize("way", ["assigned later", "assigned before", "patched"])
def test_a_hook_that_is_assigned_is_used(way: str, tmp_path: Path, monkeypatch: Any) -> None:
    called: list[str] = []

    def squares(*given: Any) -> Any:
        called.append(way)
        student, teacher, _ = given[-3:]
        return (student - teacher).square().mean(-1)

    class Before(DistillationTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.divergence = squares
            super().__init__(*args, **kwargs)

    if way == "patched":
        monkeypatch.setattr(DistillationTrainer, "divergence", squares)
    trainer = make(tmp_path, Before if way == "assigned before" else DistillationTrainer)
    if way == "assigned later":
        trainer.divergence = squares
    trainer.train()
    assert len(called) >= 3


# ---- when whole logits are computed ----


def language_model(folder: Path, **options: Any) -> Any:
    return make(
        folder,
        **{
            "model": llama(0),
            "teacher": llama(1),
            "train_dataset": rows(12, 1, "lm"),
            **options,
        },
    )


def test_it_says_whether_whole_logits_are_computed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(DistillationTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    class Scaled(type(llama())):  # type: ignore[misc]
        """A model that does more to its logits than project."""

        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            labels: Any = None,
            **kwargs: Any,
        ) -> Any:
            out = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
            logits, loss = 2.0 * out.logits, None
            if labels is not None:
                loss = self.loss_function(
                    logits, labels, self.config.vocab_size, kwargs.get("num_items_in_batch")
                )
            return CausalLMOutputWithPast(loss=loss, logits=logits)

    def said(**options: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="hf_adapt"):
            language_model(tmp_path, **options).train()
        return " ".join(r.message for r in caplog.records if "whole logits" in r.message)

    assert "without whole logits" in said()
    smooth = said(args=arguments(tmp_path, label_smoothing_factor=0.1))
    assert "label smoothing needs the logits" in smooth
    others = said(objectives=[InformationMaximization()], target_dataset=rows(5, 2, "lm"))
    assert "information_maximization may need the logits" in others
    torch.manual_seed(0)
    scaled = Scaled(llama().config)
    assert "from hidden states the losses are" in said(model=scaled)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        make(
            tmp_path,
            Own,
            model=llama(0),
            teacher=llama(1),
            train_dataset=rows(12, 1, "lm"),
        ).train()
    assert "Own has a compute_loss of its own" in caplog.text


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.is_language_model])
def test_every_language_model_can_do_without_whole_logits(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        make(
            tmp_path,
            model=case.model(0),
            teacher=case.model(1),
            train_dataset=case.data(8),
            data_collator=case.collate,
        ).train()
    assert "computes its losses without whole logits" in caplog.text


def test_whole_logits_of_a_batch_never_exist(tmp_path: Path) -> None:
    shapes: list[torch.Size] = []
    student, teacher = llama(0), llama(1)
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    trainer = language_model(
        tmp_path, model=student, teacher=teacher, settings={"per_device_train_batch_size": 4}
    )
    trainer.train()
    assert any(shape[-1] == 64 for shape in shapes)  # one row of the first batch, compared once
    assert all(shape[0] == 1 for shape in shapes if shape[-1] == 64)
    assert sum(shape[-1] == 1 for shape in shapes) >= 6


def test_losses_without_logits_under_gradient_checkpointing_and_lora(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def student() -> Any:
        model = llama(0)
        torch.manual_seed(5)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
        return get_peft_model(model, config)

    settings = {"gradient_checkpointing": True, "max_grad_norm": 0.0}
    settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    pieces = gradient(language_model(tmp_path, model=student(), settings=settings))
    whole = gradient(language_model(tmp_path, model=student(), settings=settings, chunked=False))
    assert whole.norm() > 0
    assert cosine_and_ratio(pieces, whole) == pytest.approx((1.0, 1.0), abs=2e-5)


# ---- arguments ----


def test_arguments_from_a_command_line(tmp_path: Path) -> None:
    bert(seed=1).save_pretrained(tmp_path / "teacher")
    (given,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(
        [
            *("--teacher_name_or_path", str(tmp_path / "teacher")),
            *("--temperature", "3", "--kd_weight", "0.7", "--ce_weight", "0.3"),
            *("--divergence", "jsd", "--jsd_beta", "0.9"),
            *("--teacher_cache", str(tmp_path / "cache"), "--evaluate_distillation"),
        ]
    )
    trainer = make(tmp_path, teacher=None, distillation_args=given)
    distillation = trainer.distillation
    assert isinstance(distillation.teachers[0], CachedTeacher)
    assert (distillation.temperature, distillation.weight, distillation.ce_weight) == (3, 0.7, 0.3)
    assert distillation.divergence_function.beta == 0.9
    assert trainer.distillation.evaluate
    trainer.train()
    assert (tmp_path / "cache" / "description.json").exists()
    with pytest.raises(ValueError, match="DistillationTrainer needs a teacher"):
        make(tmp_path, teacher=None)
    assert DistillationArguments().build_teacher() is None
    with pytest.raises(ValueError, match=r"temperature=7.0 and distillation_args with .*=3.0"):
        make(tmp_path, distillation_args=given, temperature=7.0)
    make(tmp_path, distillation_args=given, temperature=3.0)  # the same is no contradiction


# ---- evaluation ----


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    predicted, labels = np.asarray(prediction.predictions).argmax(-1), prediction.label_ids
    keep = labels != -100
    return {"accuracy": float((predicted[keep] == labels[keep]).mean())}


@pytest.mark.parametrize("name", ["sequence", "token"])
def test_evaluation_compares_with_the_teacher(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    student, teacher = case.model(0).eval(), case.model(1).eval()
    data = case.data(14)
    trainer = make(
        tmp_path,
        model=student,
        teacher=teacher,
        eval_dataset=data,
        evaluate_distillation=True,
        compute_metrics=accuracy,
        settings={"per_device_eval_batch_size": 4},
    )
    plain = Trainer(
        model=student,
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=data,
        data_collator=case.collate,
        compute_metrics=accuracy,
    ).evaluate()
    found = trainer.evaluate()
    assert found["eval_loss"] == plain["eval_loss"]
    assert found["eval_accuracy"] == plain["eval_accuracy"]
    batch = case.collate(list(data))
    labels = batch.pop("labels")
    with torch.no_grad():
        own, theirs = student(**batch).logits, teacher(**batch).logits
    keep = labels != -100
    own, theirs, labels = own[keep], theirs[keep], labels[keep]
    agreement = (own.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean()
    assert found["eval_agreement"] == pytest.approx(agreement)
    assert found["eval_teacher_kl"] == pytest.approx(kl.item(), rel=1e-4)
    teacher_accuracy = (theirs.argmax(-1) == labels).float().mean().item()
    assert found["eval_teacher_accuracy"] == pytest.approx(teacher_accuracy)
    if teacher_accuracy:
        share = found["eval_accuracy"] / teacher_accuracy
        assert found["eval_retained_accuracy"] == pytest.approx(share)
    confidence, predicted = own.softmax(-1).max(-1)
    error = 0.0
    for low in range(15):
        chosen = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if chosen.any():
            right = (predicted == labels)[chosen].float().mean()
            error += float((confidence[chosen].mean() - right).abs()) * int(chosen.sum())
    assert found["eval_calibration_error"] == pytest.approx(error / len(labels), rel=1e-4)


@pytest.mark.parametrize("name", ["spans", "llama", "seq2seq", "image", "masked_lm"])
def test_every_head_can_be_compared(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trainer = make(
        tmp_path,
        model=case.model(0),
        teacher=case.model(1),
        train_dataset=case.data(8),
        eval_dataset=case.data(6),
        data_collator=case.collate,
        evaluate_distillation=True,
        settings={"eval_strategy": "steps", "eval_steps": 2},
    )
    trainer.train()
    logged = next(e for e in trainer.state.log_history if "eval_loss" in e)
    assert 0 <= logged["eval_agreement"] <= 1
    assert 0 < logged["eval_teacher_kl"] < float("inf")
    same = make(
        tmp_path,
        model=case.model(0),
        teacher=case.model(0),
        eval_dataset=case.data(6),
        data_collator=case.collate,
        evaluate_distillation=True,
    ).evaluate()
    assert same["eval_agreement"] == 1.0
    assert same["eval_teacher_kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("item_by_item", [False, True])
def test_an_evaluation_weighs_teachers_as_the_training_does(
    item_by_item: bool, tmp_path: Path
) -> None:
    def weigh(inputs: Any, logits: list[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([[3.0], [1.0]]).expand(2, len(logits[0]))

    def found(teachers: list[Any], weights: Any) -> dict[str, float]:
        return make(
            tmp_path,
            model=CASES["sequence"].model(0),
            teacher=teachers,
            teacher_weights=weights,
            eval_dataset=rows(6, 3),
            evaluate_distillation=True,
        ).evaluate()

    same, other = CASES["sequence"].model(0), CASES["sequence"].model(1)
    ones = (lambda inputs, logits: torch.tensor([1.0, 0.0])) if item_by_item else [1.0, 0.0]
    only = found([same, other], ones)
    assert only["eval_agreement"] == 1
    assert only["eval_teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    batch = collate(list(rows(6, 3).remove_columns("labels")))
    with torch.no_grad():
        own, theirs = (model.eval()(**batch).logits.softmax(-1) for model in (same, other))
    mixture = 0.75 * own + 0.25 * theirs
    kl = (mixture * (mixture.log() - own.log())).sum(-1).mean().item()
    uneven = found([same, other], weigh if item_by_item else [3.0, 1.0])
    assert uneven["eval_teacher_kl"] == pytest.approx(kl, rel=1e-4)


def test_generated_texts_are_not_compared_as_logits(tmp_path: Path) -> None:
    class Generating(DistillationTrainer, Seq2SeqTrainer):
        pass

    args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True)
    with pytest.raises(ValueError, match="predict_with_generate=True an evaluation generates"):
        make(tmp_path, Generating, args=args, evaluate_distillation=True)
    make(tmp_path, Generating, args=args)


def test_evaluation_alone_asks_no_teacher(tmp_path: Path) -> None:
    def never(inputs: Any) -> Any:
        raise AssertionError("the teacher was asked")

    found = make(tmp_path, teacher=never, eval_dataset=rows(6, 3)).evaluate()
    assert "eval_agreement" not in found
    with pytest.raises(ValueError, match="has none behind it"):
        make(
            tmp_path,
            teacher=CachedTeacher(tmp_path / "nowhere"),
            eval_dataset=rows(6, 3),
            evaluate_distillation=True,
        ).evaluate()


# ---- what is checked before training ----


def test_labels_are_compared_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def named(*names: str, seed: int = 0) -> Any:
        return bert(
            seed=seed,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )

    with pytest.raises(ValueError, match="same labels in another order"):
        make(tmp_path, model=named("a", "b", "c"), teacher=named("b", "a", "c", seed=1)).train()
    with pytest.raises(ValueError, match=r"student has 3 labels .* and the teacher 4"):
        make(tmp_path, teacher=bert(seed=1, num_labels=4)).train()
    make(tmp_path, model=named("a", "b", "c"), teacher=named("A", "B", "C", seed=1)).train()
    make(tmp_path, model=named("a", "b", "c"), teacher=bert(seed=1)).train()
    assert "name their labels differently" not in caplog.text
    make(tmp_path, model=named("a", "b", "c"), teacher=named("x", "y", "z", seed=1)).train()
    assert "name their labels differently" in caplog.text


class Words:
    """As much of a tokenizer as has a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def save_pretrained(self, folder: str) -> None:
        pass


@pytest.mark.parametrize("chunked", [None, False])
def test_padded_vocabularies_are_trimmed_and_real_mismatches_refused(
    chunked: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def padded(size: int) -> Any:
        teacher = llama(1)
        teacher.resize_token_embeddings(size, mean_resizing=False)
        return teacher

    def run(teacher: Any, words: Any) -> torch.Tensor:
        return gradient(
            language_model(tmp_path, teacher=teacher, processing_class=words, chunked=chunked)
        )

    with caplog.at_level(logging.WARNING, logger="hf_adapt"):
        wider = run(padded(72), Words(60))
    assert "the first 64 entries are compared" in caplog.text
    assert cosine_and_ratio(wider, run(llama(1), Words(60))) == pytest.approx((1, 1), abs=1e-5)
    with pytest.raises(ValueError, match="tokenizer has 70 tokens, more than 64"):
        run(padded(72), Words(70))
    with pytest.raises(ValueError, match="no tokenizer to tell padding by"):
        run(padded(72), None)


def test_a_teacher_that_only_guesses_is_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(inputs: dict[str, Any]) -> torch.Tensor:
        return torch.tensor([[9.0, 0.0, 0.0]]).repeat(len(inputs["input_ids"]), 1)

    settings = {"max_steps": 6}
    make(tmp_path, teacher=wrong, settings=settings).train()
    assert "no better than guessing on the first 16 labelled items" in caplog.text
    caplog.clear()
    small = {"max_steps": 18, "per_device_train_batch_size": 2}
    make(tmp_path, teacher=wrong, settings=small, train_dataset=rows(20, 1)).train()
    assert "no better than guessing on the first 16 labelled items" in caplog.text
    caplog.clear()
    answers = {tuple(r["input_ids"]): r["labels"] for r in rows(12, 1)}

    def right(inputs: dict[str, Any]) -> torch.Tensor:
        real = [
            answers[tuple(row[mask.bool()].tolist())]
            for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return 3.0 * torch.nn.functional.one_hot(torch.tensor(real), 3).float()

    make(tmp_path, teacher=right, settings=settings).train()
    assert "guessing" not in caplog.text


def test_a_teacher_in_training_mode_is_set_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Meddling(DistillationTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            teacher.train()
            return super().training_step(*args, **kwargs)

    teacher = bert(seed=1, dropout=True)
    found = make(tmp_path, Meddling, teacher=teacher)
    found.train()
    assert "teacher was in training mode" in caplog.text
    quiet = make(tmp_path, teacher=bert(seed=1, dropout=True))
    quiet.train()
    assert same_bits(weights(found.model), weights(quiet.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": -1.0}, "must be positive"),
        ({"kd_weight": -1.0}, "must be a finite number >= 0"),
        ({"ce_weight": -1.0}, "ce_weight=-1.0"),
        ({"divergence": "kl"}, "'kl' is unknown"),
        ({"teacher": []}, "at least one teacher"),
        ({"text_column": "text"}, "teacher_processing_class= too"),
    ],
)
def test_bad_options_are_refused_at_once(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)
    with pytest.raises(TypeError, match="A teacher must be a model"):
        make(tmp_path, teacher=3)


def test_a_schedule_that_leaves_its_range_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schedule of the temperature gave -"):
        make(tmp_path, temperature=lambda progress: 1.0 - 2.0 * progress).train()


def test_a_student_reaches_its_teacher(tmp_path: Path) -> None:
    teacher = CASES["sequence"].model(1)
    trainer = make(
        tmp_path,
        teacher=teacher,
        ce_weight=0.0,
        kd_weight=1.0,
        train_dataset=rows(32, 1, None),
        settings=dict(max_steps=150, learning_rate=1e-2, per_device_train_batch_size=16),
    )
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["loss/distillation"] < 0.2 * first["loss/distillation"]
    assert last["distillation/agreement"] > 0.9


def test_distillation_is_an_objective_like_others() -> None:
    objective = Distillation(lambda inputs: inputs, kd_weight=0.0)
    assert not objective.is_active
    assert Distillation(lambda inputs: inputs).name == "distillation"
