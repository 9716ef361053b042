"""A teacher with another tokenizer."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import CachedTeacher, Contrastive, DistillationArguments, HiddenStates
from hf_adapt.distillation.checks import num_positions
from hf_adapt.distillation.texts import missing_cells
from hf_adapt.distillation.tokenizers import Retokenizer, universal_logit_distance
from tests.helpers.data import collate
from tests.helpers.distillation import WORDS, texts, tokenizer
from tests.helpers.heads import CASES
from tests.helpers.models import SIZE, bert, llama
from tests.helpers.trainers import GradientRecorder, arguments, cosine_and_ratio


def classified(own: Any, keep_text: bool) -> Any:
    made = [
        {**own(text), "labels": i % 3, **({"text": text} if keep_text else {})}
        for i, text in enumerate(texts(12))
    ]
    return datasets.Dataset.from_list(made)


def test_universal_logit_distance_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 6, generator=generator).requires_grad_()
    teacher = torch.randn(4, 9, generator=generator)
    values = universal_logit_distance(student, teacher, 2.0)
    for i in range(4):
        q = sorted((student[i] / 2).softmax(-1).tolist(), reverse=True) + [0.0] * 3
        p = sorted((teacher[i] / 2).softmax(-1).tolist(), reverse=True)
        expected = sum(abs(a - b) for a, b in zip(q, p, strict=True))
        assert values[i].item() == pytest.approx(expected, rel=1e-5)
    order = torch.randperm(6, generator=generator)
    assert universal_logit_distance(student, student[:, order]).abs().max() < 1e-6
    values.sum().backward()
    assert student.grad is not None and student.grad.norm() > 0


@pytest.mark.parametrize("text_column", ["text", None])
def test_each_classifier_gets_its_own_tokens(text_column: str | None, tmp_path: Path) -> None:
    own, other = tokenizer(), tokenizer(reverse=True)
    seen: list[list[list[int]]] = []
    teacher = bert(seed=1)

    def ask(inputs: dict[str, Any]) -> torch.Tensor:
        seen.append([row[row > 0].tolist() for row in inputs["input_ids"]])
        return teacher.eval()(**inputs).logits

    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=ask,
        args=arguments(tmp_path, max_steps=3),
        train_dataset=classified(own, keep_text=text_column is not None),
        data_collator=DataCollatorWithPadding(own),
        processing_class=own,
        teacher_processing_class=other,
        text_column=text_column,
    )
    trainer.train()
    expected = {tuple(other(text)["input_ids"]) for text in texts(12)}
    assert {tuple(row) for batch in seen for row in batch} == expected


def test_the_text_never_reaches_the_model_and_targets_bring_theirs(tmp_path: Path) -> None:
    own, other = tokenizer(), tokenizer(reverse=True)
    data = classified(own, keep_text=True)
    recorder = GradientRecorder()
    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=bert(seed=1),
        args=arguments(
            tmp_path, max_steps=2, dataloader_num_workers=0, eval_strategy="steps", eval_steps=1
        ),
        train_dataset=data,
        eval_dataset=data,
        target_dataset=data.select(range(5)).remove_columns("labels"),
        data_collator=DataCollatorWithPadding(own),
        processing_class=own,
        teacher_processing_class=other,
        text_column="text",
        evaluate_distillation=True,
        callbacks=[recorder],
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] > 0
    assert any("eval_agreement" in entry for entry in trainer.state.log_history)


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    own, other = tokenizer(), tokenizer(reverse=True)
    options: dict[str, Any] = dict(
        model=bert(seed=0),
        teacher=bert(seed=1),
        args=arguments(tmp_path),
        train_dataset=classified(own, keep_text=False),
        data_collator=DataCollatorWithPadding(own),
        teacher_processing_class=other,
    )
    with pytest.raises(ValueError, match=r"text_column='text' is missing"):
        DistillationTrainer(**options, processing_class=own, text_column="text").train()
    with pytest.raises(ValueError, match="needs the text"):
        DistillationTrainer(**options).train()


SHAPES: dict[str, tuple[Any, dict[str, list[Any]], list[Any]]] = {
    "texts": ("text", {"text": ["w0 w1", "w3"]}, [["w0 w1", "w3"]]),
    "words": ("text", {"text": [["w0", "w1"], ["w3"]]}, [["w0 w1", "w3"]]),
    "pairs": (
        ("premise", "hypothesis"),
        {"premise": ["w0 w1", "w3"], "hypothesis": ["w2", "w4 w5 w6"]},
        [["w0 w1", "w3"], ["w2", "w4 w5 w6"]],
    ),
    "pairs of words": (
        ["premise", "hypothesis"],
        {"premise": [["w0", "w1"], ["w3"]], "hypothesis": [["w2"], ["w4", "w5", "w6"]]},
        [["w0 w1", "w3"], ["w2", "w4 w5 w6"]],
    ),
    "an empty text": ("text", {"text": ["", "w3"]}, [["", "w3"]]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_words_and_pairs(shape: str, tmp_path: Path) -> None:
    text_column, columns, expected = SHAPES[shape]
    own, other = tokenizer(), tokenizer(reverse=True)
    seen: list[list[int]] = []
    teacher = bert(seed=1)

    def ask(inputs: dict[str, Any]) -> torch.Tensor:
        seen.extend(row[row > 0].tolist() for row in inputs["input_ids"])
        return teacher.eval()(**inputs).logits

    data = datasets.Dataset.from_dict(
        {**own(["w0 w1 w2", "w3 w4"]), "labels": [0, 1], **columns},
    )
    DistillationTrainer(
        model=bert(seed=0),
        teacher=ask,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(own),
        processing_class=own,
        teacher_processing_class=other,
        text_column=text_column,
    ).train()
    assert sorted(map(tuple, seen[:2])) == sorted(map(tuple, other(*expected)["input_ids"]))


def test_the_text_columns_of_a_command_line() -> None:
    (args,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(
        ["--text_column", "premise", "hypothesis"]
    )
    assert args.options()["text_column"] == ("premise", "hypothesis")


@pytest.mark.parametrize(
    ("cell", "where", "found"),
    [
        (None, "train_dataset", "no text"),
        (None, "target_dataset", "no text"),
        (float("nan"), "the batch", "no text"),
        (7, "the batch", "int 7"),
    ],
)
def test_a_missing_text_is_refused_with_its_place(
    cell: Any, where: str, found: str, tmp_path: Path
) -> None:
    own, other = tokenizer(), tokenizer(reverse=True)
    whole = classified(own, keep_text=True)
    rows = [{**row, "text": cell if i == 2 else row["text"]} for i, row in enumerate(whole)]
    given: Any = rows if where == "the batch" else datasets.Dataset.from_list(rows)
    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=bert(seed=1),
        args=arguments(tmp_path, per_device_train_batch_size=12),
        train_dataset=whole if where == "target_dataset" else given,
        **({"target_dataset": given} if where == "target_dataset" else {}),
        data_collator=DataCollatorWithPadding(own),
        processing_class=own,
        teacher_processing_class=other,
        text_column="text",
    )
    place = rf"row {'[0-9]+' if where == 'the batch' else 2} of {where}"
    with pytest.raises(ValueError, match=f"'text' must hold a text.*{place} has {found}"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["dataset", "list", "stream", "transform", "format"])
def test_the_name_of_a_text_column_that_is_not_there(kind: str, tmp_path: Path) -> None:
    own, other = tokenizer(), tokenizer(reverse=True)
    data = classified(own, keep_text=True)
    given: dict[str, Any] = {
        "dataset": data,
        "list": data.to_list(),
        "stream": data.to_iterable_dataset(),
        "transform": data.rename_column("text", "txt").with_transform(
            lambda rows: {"text" if key == "txt" else key: rows[key] for key in rows}
        ),
        "format": data.rename_column("text", "txt")
        .add_column("text", data["text"])
        .with_format(None, columns=["input_ids", "attention_mask", "labels", "text"]),
    }
    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=bert(seed=1),
        args=arguments(tmp_path),
        train_dataset=given[kind],
        data_collator=DataCollatorWithPadding(own),
        processing_class=own,
        teacher_processing_class=other,
        text_column="txt",
    )
    with pytest.raises(ValueError, match=r"'txt' is missing.*train_dataset.*mean 'text'"):
        trainer.train()


@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_set_without_the_text(several: bool, tmp_path: Path) -> None:
    own, other = tokenizer(), tokenizer(reverse=True)
    without = classified(own, keep_text=False)
    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=bert(seed=1),
        args=arguments(tmp_path),
        train_dataset=classified(own, keep_text=True),
        eval_dataset={"a": without} if several else without,
        data_collator=DataCollatorWithPadding(own),
        processing_class=own,
        teacher_processing_class=other,
        text_column="text",
        evaluate_distillation=True,
    )
    place = r"eval_dataset\['a'\]" if several else "eval_dataset"
    with pytest.raises(ValueError, match=f"'text' is missing.*in {place}, only"):
        trainer.train()


@pytest.mark.parametrize("model_max_length", [int(1e30), 9, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_a_teacher_with_fewer_positions_than_its_own_tokens(
    causal: bool, model_max_length: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tokenizer(bert_like=not causal)
    other = tokenizer(reverse=True, bert_like=not causal)
    other.model_max_length = model_max_length
    longest: list[int] = []

    class Watched(DistillationTrainer):
        def teacher_forward(self, teacher: Any, inputs: Any) -> Any:
            longest.append(inputs["input_ids"].shape[1])
            return super().teacher_forward(teacher, inputs)

    teacher: Any = CASES["gpt2"].model(1) if causal else bert(seed=1, max_position_embeddings=8)
    if causal:
        teacher = GPT2LMHeadModel(GPT2Config(**{**teacher.config.to_dict(), "n_positions": 8}))
    text = " ".join(WORDS[:20])
    ids = own(text)["input_ids"]
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "text": text}
    trainer = Watched(
        model=CASES["llama"].model(0) if causal else bert(seed=0),
        teacher=teacher,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=datasets.Dataset.from_list([{**row, "labels": ids if causal else 1}] * 8),
        data_collator=collate,
        processing_class=own,
        teacher_processing_class=other,
        text_column="text",
    )
    trainer.train()
    assert set(longest) == {min(8, model_max_length)}
    assert caplog.text.count("truncated there") == 1
    assert trainer.state.log_history[0]["loss/distillation"] > 0


def test_positions_of_robertas_family() -> None:
    config = RobertaConfig(vocab_size=64, max_position_embeddings=10, pad_token_id=1, **SIZE)
    model = RobertaForSequenceClassification(config).eval()
    assert num_positions(model) == 8
    model(input_ids=torch.full((1, 8), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 9), 5))


def spoken(own: Any) -> Any:
    made = []
    for text in texts(8):
        ids = own(text)["input_ids"]
        made.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100, *ids[1:]],
            }
        )
    return datasets.Dataset.from_list(made)


def test_completions_are_tokenised_apart() -> None:
    own, other = tokenizer(bert_like=False), tokenizer(reverse=True, bert_like=False)
    rows = own(["w1 w2 w3 w4", "w5 w6"], padding=True, return_tensors="pt")
    chosen = torch.tensor([[False, False, True, True], [False, True, False, False]])
    inputs, mask = Retokenizer(own, other).completions(dict(rows), chosen)
    for row, (text, items) in enumerate([("w1 w2 w3 w4", 2), ("w5 w6", 1)]):
        real = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][real].tolist() == other(text)["input_ids"]
        assert mask[row].sum() == items
        assert mask[row][real][-items:].all()


def test_language_models_with_other_vocabularies(tmp_path: Path) -> None:
    own, other = tokenizer(bert_like=False), tokenizer(reverse=True, bert_like=False)

    def run(size: int, steps: int) -> Any:
        recorder = GradientRecorder()
        teacher = llama(1)
        teacher.resize_token_embeddings(80, mean_resizing=False)
        trainer = DistillationTrainer(
            model=llama(0),
            teacher=teacher,
            args=arguments(
                tmp_path,
                max_steps=1,
                max_grad_norm=0.0,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
            ),
            train_dataset=spoken(own),
            data_collator=collate,
            processing_class=own,
            teacher_processing_class=other,
            callbacks=[recorder],
        )
        trainer.train()
        return recorder.gradients[0], trainer.state.log_history[0]

    cached = DistillationTrainer(
        model=llama(0),
        teacher=CachedTeacher(tmp_path / "cache", llama(1)),
        args=arguments(tmp_path),
        train_dataset=spoken(own),
        data_collator=collate,
        processing_class=own,
        teacher_processing_class=other,
    )
    with pytest.raises(ValueError, match="Pass the teacher itself"):
        cached.train()
    whole, log = run(8, 1)
    cut, _ = run(1, 8)
    assert 0 < log["loss/distillation"] < 2
    assert cosine_and_ratio(whole, cut) == pytest.approx((1.0, 1.0), abs=2e-5)


def test_layers_of_other_tokens_are_not_compared(tmp_path: Path) -> None:
    own, other = tokenizer(), tokenizer(reverse=True)

    def make(theirs: Any) -> DistillationTrainer:
        return DistillationTrainer(
            model=bert(seed=0),
            teacher=bert(seed=1),
            args=arguments(tmp_path, max_steps=1),
            train_dataset=classified(own, keep_text=True),
            data_collator=DataCollatorWithPadding(own),
            processing_class=own,
            teacher_processing_class=theirs,
            text_column="text",
            features=[HiddenStates(), Contrastive()],
        )

    with pytest.raises(ValueError, match="HiddenStates, Contrastive compare layers token by token"):
        make(other).train()
    make(tokenizer()).train()  # another one of the same words


def test_an_evaluation_across_tokenizers_says_that_it_compares_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = tokenizer(bert_like=False), tokenizer(reverse=True, bert_like=False)
    trainer = DistillationTrainer(
        model=llama(0),
        teacher=llama(1),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=spoken(own),
        eval_dataset=spoken(own),
        data_collator=collate,
        processing_class=own,
        teacher_processing_class=other,
        evaluate_distillation=True,
    )
    for _ in range(2):
        assert "eval_agreement" not in trainer.evaluate()
    assert caplog.text.count("nothing is compared") == 1


def test_a_word_that_is_missing_is_found_before_training() -> None:
    rows = datasets.Dataset.from_dict({"words": [["w1"], None, ["w2", None], []]})
    assert list(missing_cells(rows, ["words"])) == [("words", 1), ("words", 2)]
