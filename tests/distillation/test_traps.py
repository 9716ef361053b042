"""Silent faults that a first version had, each of which would have passed for a result."""

import copy
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    BartForConditionalGeneration,
    BartForSequenceClassification,
    DataCollatorForLanguageModeling,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_adapt import Distillation, DistillationTrainer
from hf_adapt.distillation import CachedTeacher, DistillationArguments, ModelTeacher, SelfTeacher
from hf_adapt.distillation.fingerprints import item_keys
from hf_adapt.engine.streams import Stream
from tests.helpers.data import collate, rows
from tests.helpers.distillation import make, tokenizer
from tests.helpers.heads import CASES
from tests.helpers.models import SIZE, VOCABULARY, bart_config, bert, llama
from tests.helpers.trainers import GradientRecorder, arguments, cosine_and_ratio, weights


def test_a_routers_loss_is_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is smaller than any tolerance, and only computed where the model sees labels."""

    def mixtral(seed: int) -> MixtralForCausalLM:
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            **SIZE,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=1e-3,
        )
        return MixtralForCausalLM(config)

    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        make(
            tmp_path,
            model=mixtral(0),
            teacher=mixtral(1),
            train_dataset=rows(8, 1, "lm"),
        ).train()
    assert "the model adds a loss of its own" in caplog.text


def bart(seed: int, cls: Any = BartForConditionalGeneration) -> Any:
    torch.manual_seed(seed)
    return cls(bart_config(encoder_layers=1, decoder_layers=1, num_labels=3))


@pytest.mark.parametrize("both", [True, False])
def test_a_bias_after_the_projection_is_not_overlooked(
    both: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BART's broadcasts what stands for the logits to their whole size."""
    case = CASES["seq2seq"]
    settings: dict[str, Any] = dict(
        model=bart(0) if both else case.model(0),
        teacher=bart(1),
        train_dataset=case.data(8),
        data_collator=case.collate,
    )
    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        make(tmp_path, **settings).train()
    assert "does more to its logits than project" in caplog.text
    assert "without whole logits" not in caplog.text


def test_tied_weights_are_averaged_once(tmp_path: Path) -> None:
    student, teacher = CASES["gpt2"].model(0), SelfTeacher(decay=0.9)
    teacher.setup(make(tmp_path), student)
    teacher.begin(make(tmp_path))
    teacher.before_step(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    before = weights(teacher.module)
    teacher.before_step(1)
    for name, value in teacher.module.named_parameters():
        torch.testing.assert_close(value - before[name], torch.full_like(value, 0.1))


def test_the_average_of_a_half_precision_student_moves(tmp_path: Path) -> None:
    student, teacher = bert(seed=0).bfloat16(), SelfTeacher(decay=0.999)
    teacher.setup(make(tmp_path), student)
    teacher.begin(make(tmp_path))
    teacher.before_step(0)
    start = weights(teacher.module)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    for step in range(1, 101):
        teacher.before_step(step)
    name = "bert.encoder.layer.0.output.dense.weight"
    moved = (weights(teacher.module)[name] - start[name]).norm() / (0.5 * start[name]).norm()
    assert moved.item() == pytest.approx(1 - 0.999**100, rel=0.05)


def test_the_teacher_sees_inputs_that_its_student_does_not_take(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3
    )
    student = DistilBertForSequenceClassification(config)
    made = [
        {**row, "token_type_ids": [i % 2 for i in range(len(row["input_ids"]))]}
        for row in rows(12, 1)
    ]
    seen: list[Any] = []

    def collated(features: Any) -> Any:
        batch = collate(features)
        if "token_type_ids" in features[0]:
            width = batch["input_ids"].shape[1]
            batch["token_type_ids"] = torch.tensor(
                [
                    [*f["token_type_ids"], *[0] * (width - len(f["token_type_ids"]))]
                    for f in features
                ]
            )
        return batch

    class Watching(DistillationTrainer):
        def teacher_forward(self, teacher: Any, inputs: Any) -> Any:
            seen.append(inputs.get("token_type_ids"))
            return super().teacher_forward(teacher, inputs)

    data = datasets.Dataset.from_list(made)
    trainer = make(
        tmp_path,
        Watching,
        model=student,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collated,
        evaluate_distillation=True,
        settings={"eval_strategy": "steps", "eval_steps": 2},
    )
    trainer.train()
    assert len(seen) > 4
    assert all(segments is not None and segments.any() for segments in seen)


def test_vectors_of_labels_are_yes_or_no_for_each_class(tmp_path: Path) -> None:
    """The model says `multi_label_classification` only after it has seen them."""
    case = CASES["several_labels"]
    gradients = []
    for problem in (None, "multi_label_classification"):
        recorder = GradientRecorder()
        student = bert(seed=0, problem_type=problem)
        trainer = make(
            tmp_path,
            model=student,
            teacher=bert(seed=1, problem_type=problem),
            train_dataset=case.data(8),
            data_collator=case.collate,
            eval_dataset=case.data(4),
            evaluate_distillation=True,
            callbacks=[recorder],
        )
        trainer.train()
        gradients.append(recorder.gradients[0])
        assert trainer.distillation.head.kind == "labels"
        trainer.evaluate()
    assert cosine_and_ratio(*gradients) == pytest.approx((1.0, 1.0), abs=1e-6)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_regression_has_no_distribution(outputs: int, tmp_path: Path) -> None:
    def one(seed: int) -> Any:
        kind = {} if outputs == 1 else {"problem_type": "regression"}
        return bert(seed=seed, num_labels=outputs, **kind)

    def labels(i: int) -> Any:
        return float(i) if outputs == 1 else [float(i), float(-i)]

    data = datasets.Dataset.from_list(
        [{**row, "labels": labels(i)} for i, row in enumerate(rows(8, 1))]
    )
    with pytest.raises(ValueError, match=r"is a regression .*divergence='mse'"):
        make(
            tmp_path, model=one(0), teacher=one(1), train_dataset=data, data_collator=padded
        ).train()
    student, teacher = one(0), one(1)
    with torch.no_grad():  # far from each other, where sigmoids are not
        student.classifier.bias += 50.0
        teacher.classifier.bias += 500.0
    trainer = make(
        tmp_path,
        model=student,
        teacher=teacher,
        train_dataset=data,
        eval_dataset=data,
        data_collator=padded,
        divergence="mse",
        evaluate_distillation=True,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] == pytest.approx(450.0**2, rel=0.1)
    # Numbers are no classes to agree on.
    assert "distillation/agreement" not in trainer.state.log_history[0]
    assert not {"eval_agreement", "eval_teacher_kl"} & set(trainer.evaluate())


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (None, "regression"),
        ("regression", "single_label_classification"),
        (None, "multi_label_classification"),
        ("single_label_classification", "multi_label_classification"),
        ("multi_label_classification", "single_label_classification"),
    ],
)
def test_student_and_teacher_predict_the_same_kind(
    own: str | None, theirs: str, tmp_path: Path
) -> None:
    """Numbers or yes and no were compared with one distribution over classes."""
    many = own in ("regression", "multi_label_classification")
    data = CASES["several_labels"].data(8) if many else rows(8, 1)
    options: dict[str, Any] = dict(
        model=bert(seed=0, problem_type=own),
        teacher=bert(seed=1, problem_type=theirs),
        train_dataset=data,
        data_collator=padded,
        divergence="mse",
    )
    trainer = make(tmp_path, **options)
    with pytest.raises(ValueError, match=r"The student is a .* and the teacher a .*same kind"):
        trainer.train()
    assert trainer.state.global_step == 0

    class Mapped(DistillationTrainer):
        def select_logits(self, outputs: Any, inputs: Any, mask: Any) -> Any:
            return outputs["logits"][mask]

    if own is None:
        args = arguments(tmp_path, max_steps=1)
        Mapped(args=args, **options).train()


def padded(features: Any) -> dict[str, torch.Tensor]:
    """Rows with labels of any shape."""
    labels = torch.tensor([f["labels"] for f in features])
    return {**collate([{**f, "labels": 0} for f in features]), "labels": labels}


def test_labels_seen_first_decide_what_a_cache_keeps(tmp_path: Path) -> None:
    """Without a problem_type only the first labels say that a row may have several."""
    data = datasets.Dataset.from_list(
        [{**row, "labels": [float(i % 2), 1.0, 0.0]} for i, row in enumerate(rows(8, 1))]
    )
    for _ in range(2):
        trainer = make(
            tmp_path,
            model=bert(seed=0),
            teacher=CachedTeacher(tmp_path / "cache", bert(seed=1)),
            train_dataset=data,
            data_collator=padded,
        )
        trainer.train()
        assert trainer.distillation.head.kind == "labels"
        assert trainer.state.log_history[0]["loss/distillation"] > 0


def test_a_class_that_is_ruled_out_keeps_its_place_in_a_cache(tmp_path: Path) -> None:
    def ruled_out(inputs: dict[str, Any]) -> torch.Tensor:
        return torch.tensor([[-torch.inf, 1.0, 2.0]]).repeat(len(inputs["input_ids"]), 1)

    cache = CachedTeacher(tmp_path / "cache", ruled_out)
    cache.open(None)
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.ones(2, dtype=torch.bool)
    inputs = {"input_ids": ids}
    for _ in range(2):
        signal = cache.signal(inputs, mask, [1, 1], lambda: ruled_out(inputs))
        assert torch.equal(signal, ruled_out(inputs))
    cache.close()


def test_which_rows_are_distilled_is_part_of_what_a_row_is_found_by(tmp_path: Path) -> None:
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    one, other = (item_keys(inputs, torch.tensor(mask)) for mask in ([True, False], [False, True]))
    assert one != other
    cache = CachedTeacher(tmp_path / "cache", lambda given: torch.zeros(2, 3))
    cache.open(None)
    mask = torch.ones(2, dtype=torch.bool)
    cache.signal(inputs, mask, [1, 1], lambda: torch.zeros(2, 3))
    with pytest.raises(ValueError, match="made with another item_mask"):
        cache.signal(inputs, mask, [2, 0], lambda: torch.zeros(2, 3))
    cache.close()


def test_a_cache_of_a_model_does_not_pass_for_a_functions(tmp_path: Path) -> None:
    make(tmp_path, teacher=CachedTeacher(tmp_path / "cache", bert(seed=1))).train()

    def function(inputs: dict[str, Any]) -> torch.Tensor:
        return torch.zeros(len(inputs["input_ids"]), 3)

    with pytest.raises(ValueError, match="made with another teacher"):
        make(tmp_path, teacher=CachedTeacher(tmp_path / "cache", function)).train()
    make(tmp_path, teacher=CachedTeacher(tmp_path / "other", function)).train()
    with pytest.raises(ValueError, match="made with another teacher"):
        other = CachedTeacher(tmp_path / "other", lambda inputs: function(inputs))
        make(tmp_path, teacher=other).train()
    with pytest.raises(ValueError, match="changes with every step"):
        CachedTeacher(tmp_path / "cache", SelfTeacher())


def test_weights_for_each_item_do_not_pass_by_an_overridden_loss(tmp_path: Path) -> None:
    class Own(DistillationTrainer):
        def distillation_loss(self, student: Any, teacher: Any, temperature: float) -> Any:
            return super().distillation_loss(student, teacher, temperature)

    with pytest.raises(ValueError, match="cannot weigh them one by one"):
        make(
            tmp_path,
            Own,
            teacher=[bert(seed=1), bert(seed=2)],
            teacher_weights=lambda inputs, logits: torch.ones(2, len(logits[0])),
        ).train()


def test_a_refused_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    student = bert(seed=0)
    with pytest.raises(ValueError, match="shares"):
        make(tmp_path, model=student, teacher=student).train()
    assert all(p.requires_grad for p in student.parameters())
    make(tmp_path, model=student, teacher=copy.deepcopy(student)).train()
    make(tmp_path, model=student, teacher=student, kd_weight=0.0).train()


def test_cached_answers_in_batches_that_are_padded_further(tmp_path: Path) -> None:
    case = CASES["spans"]

    def padded(features: Any) -> Any:
        batch = case.collate(features)
        more = 20 - batch["input_ids"].shape[1]
        for key in ("input_ids", "attention_mask"):
            batch[key] = torch.nn.functional.pad(batch[key], (0, more))
        return batch

    def run(teacher: Any) -> torch.Tensor:
        recorder = GradientRecorder()
        make(
            tmp_path,
            model=case.model(0),
            teacher=teacher,
            train_dataset=case.data(12),
            data_collator=padded,
            callbacks=[recorder],
        ).train()
        return recorder.gradients[0]

    cached = run(CachedTeacher(tmp_path / "cache", case.model(1)))
    assert cosine_and_ratio(cached, run(case.model(1))) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_classifiers_of_encoder_decoders(tmp_path: Path) -> None:
    made = [{**row, "input_ids": [*row["input_ids"][:-1], 2]} for row in rows(12, 1)]
    trainer = make(
        tmp_path,
        model=bart(0, BartForSequenceClassification),
        teacher=bart(1, BartForSequenceClassification),
        train_dataset=datasets.Dataset.from_list(made),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] > 0


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_padded_vocabulary_before_training_and_in_a_cache(
    top_k: int | None, tmp_path: Path
) -> None:
    words = tokenizer(bert_like=False)  # of 44 words, where the student has 64 and the teacher 72
    teacher = llama(1)
    teacher.resize_token_embeddings(72, mean_resizing=False)
    data = rows(12, 1, "lm", high=44)
    settings: dict[str, Any] = dict(
        model=llama(0),
        train_dataset=data,
        eval_dataset=data,
        processing_class=words,
    )
    found = make(tmp_path, teacher=teacher, evaluate_distillation=True, **settings).evaluate()
    assert found["eval_teacher_kl"] > 0
    options = {} if top_k is None else {"top_k": top_k, "temperature": 2.0}
    cache = CachedTeacher(tmp_path / "cache", teacher, **options)
    make(tmp_path, teacher=cache, **settings).train()
    trainer = make(tmp_path, teacher=CachedTeacher(tmp_path / "cache"), **settings)
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] > 0


def test_a_cache_alone_knows_its_labels(tmp_path: Path) -> None:
    def named(*names: str, seed: int = 0) -> Any:
        return bert(seed=seed, id2label=dict(enumerate(names)))

    teacher = named("neg", "neu", "pos", seed=1)
    cache = CachedTeacher(tmp_path / "cache", teacher)
    make(tmp_path, model=named("neg", "neu", "pos"), teacher=cache).train()
    with pytest.raises(ValueError, match="same labels in another order"):
        alone = CachedTeacher(tmp_path / "cache")
        make(tmp_path, model=named("pos", "neu", "neg"), teacher=alone).train()


def test_other_labels_are_fine_where_the_hook_maps_them(tmp_path: Path) -> None:
    class Mapped(DistillationTrainer):
        def select_logits(self, outputs: Any, inputs: Any, mask: Any) -> Any:
            return outputs.logits[mask][:, :3]

    trainer = make(tmp_path, Mapped, teacher=bert(seed=1, num_labels=5))
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] > 0


def test_metrics_that_see_inputs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def compute(prediction: Any) -> dict[str, float]:
        return {"rows": float(len(np.asarray(prediction.inputs)))}

    found = make(
        tmp_path,
        eval_dataset=rows(6, 3),
        evaluate_distillation=True,
        compute_metrics=compute,
        settings={"include_for_metrics": ["inputs"], "per_device_eval_batch_size": 6},
    ).evaluate()
    assert found["eval_rows"] == 6
    assert "eval_agreement" in found
    assert "share retained are not computed" in caplog.text


def test_what_cannot_be_had_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def lm(**options: Any) -> Any:
        given = {"model": llama(0), "teacher": llama(1), "train_dataset": rows(8, 1, "lm")}
        return make(tmp_path, **{**given, **options})

    with pytest.raises(ValueError, match="is not supported here: the teacher is not one"):
        lm(teacher=[llama(1), llama(2)], chunked=True).train()
    with pytest.raises(ValueError, match="label smoothing needs the logits"):
        lm(chunked=True, settings={"label_smoothing_factor": 0.1}).train()
    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        lm(teacher=[llama(1), llama(2)]).train()
    assert "computes whole logits: the teacher is not one model" in caplog.text
    with pytest.raises(ValueError, match=r"go through the model separately"):
        lm(chunked=True, target_dataset=Stream(rows(8, 2, "lm"), forward="separate")).train()
    with pytest.raises(ValueError, match="distillation and second cannot share"):
        lm(chunked=True, objectives=[Distillation(llama(2), name="second")]).train()
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        make(tmp_path, logits_weight=0.0)
    with pytest.raises(ValueError, match="name its folder with teacher_cache"):
        DistillationArguments(teacher_name_or_path="x", teacher_top_k=5).build_teacher()


def test_a_first_step_without_labels_does_not_cost_the_whole_logits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = rows(8, 1, "lm").map(lambda row: {"labels": [-100] * len(row["labels"])})
    with caplog.at_level(logging.INFO, logger="hf_adapt"):
        make(tmp_path, model=llama(0), teacher=llama(1), train_dataset=data, chunked=True).train()
    assert "computes its losses without whole logits" in caplog.text


def test_a_guessing_teacher_is_pointed_out_without_whole_logits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = CASES["llama"].model(1)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(30.0)  # sure of itself, and wrong
    make(
        tmp_path,
        model=llama(0),
        teacher=teacher,
        train_dataset=rows(16, 1, "lm"),
        chunked=True,
        settings={"max_steps": 5},
    ).train()
    assert "no better than guessing" in caplog.text


def test_a_random_mask_and_a_cache_do_not_go_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case, words = CASES["masked_lm"], tokenizer()
    words.mask_token = "[UNK]"
    trainer = make(
        tmp_path,
        model=case.model(0),
        teacher=CachedTeacher(tmp_path / "cache", case.model(1)),
        train_dataset=rows(8, 1, None, high=44),
        data_collator=DataCollatorForLanguageModeling(words),
    )
    trainer.train()
    assert "masks other tokens in each epoch" in caplog.text


def test_pixels_come_in_the_teachers_dtype(tmp_path: Path) -> None:
    case = CASES["image"]
    trainer = make(
        tmp_path,
        model=case.model(0),
        teacher=ModelTeacher(case.model(1).bfloat16()),
        train_dataset=case.data(8),
        data_collator=case.collate,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] > 0
