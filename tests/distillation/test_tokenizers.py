"""A teacher with another tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from hf_adapt import CachedTeacher, Contrastive, DistillationTrainer, HiddenStates
from hf_adapt.distillation.tokenizers import Retokenizer, universal_logit_distance
from tests.tiny import GradientRecorder, arguments, bert, cosine_and_ratio, llama

WORDS = [f"w{i}" for i in range(40)]


def tokenizer(reverse: bool = False, bert_like: bool = True) -> PreTrainedTokenizerFast:
    """Words to ids, in either order: two tokenizers that agree on no id."""
    words = WORDS[::-1] if reverse else WORDS
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if bert_like:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def texts(number: int) -> list[str]:
    return [" ".join(WORDS[(3 * i + j) % 40] for j in range(3 + i % 4)) for i in range(number)]


def classified(own: Any, keep_text: bool) -> Any:
    import datasets

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


def test_pairs_of_texts() -> None:
    own, other = tokenizer(), tokenizer(reverse=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    given = Retokenizer(own, other, "text").rows(
        {"input_ids": ids}, {"text": [("w0 w1", "w2"), ("w3", "w4 w5 w6")]}
    )
    expected = other(["w0 w1", "w3"], ["w2", "w4 w5 w6"], padding=True, return_tensors="pt")
    assert torch.equal(given["input_ids"], expected["input_ids"])


def spoken(own: Any) -> Any:
    import datasets

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
    from tests.tiny import collate

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
    from tests.tiny import collate

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
