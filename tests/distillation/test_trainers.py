"""Distillation on Trainers of other libraries, and on a Trainer that runs twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from hf_adapt import AdaptationCallback, Distillation, DistillationTrainer, adapt
from tests.helpers.data import collate, rows
from tests.helpers.heads import CASES
from tests.helpers.libraries import SFT_DATA, sft
from tests.helpers.models import bert, llama
from tests.helpers.trainers import arguments, same_bits, weights


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["text", "completion-and-text"])
def test_sft_trainer(name: str, lora: bool, tmp_path: Path) -> None:
    source, target, settings = SFT_DATA[name]
    plain = sft(tmp_path / "plain", source, lora, **settings)
    plain.train()
    teacher = llama(7)
    trainer = sft(tmp_path / "distilled", source, lora, **settings)
    trainer.add_callback(AdaptationCallback(Distillation(teacher), target_dataset=target))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss/distillation"] > 0
    assert log["loss/task"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-3)


def test_seq2seq_trainer(tmp_path: Path) -> None:
    case = CASES["seq2seq"]
    trainer = Seq2SeqTrainer(
        model=case.model(0),
        args=arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True),
        train_dataset=case.data(12),
        eval_dataset=case.data(4),
        data_collator=case.collate,
    )
    adapt(trainer, Distillation(case.model(1)))
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=bert(seed=1),
        args=arguments(tmp_path),
        train_dataset=rows(12, 1),
        data_collator=collate,
    )
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert not same_bits(first, weights(trainer.model))


def test_a_lora_student_is_saved_as_a_plain_adapter(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = LoraConfig(task_type="SEQ_CLS", r=4)
    student: Any = get_peft_model(bert(seed=0), config)
    trainer = DistillationTrainer(
        model=student,
        teacher=bert(seed=1),
        args=arguments(tmp_path),
        train_dataset=rows(12, 1),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    files = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any("adaptation" in name or name == "model.safetensors" for name in files)


def test_the_saved_student_is_a_plain_model(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        model=bert(seed=0),
        teacher=bert(seed=1, num_hidden_layers=4),
        args=arguments(tmp_path, save_strategy="steps", save_steps=3),
        train_dataset=rows(12, 1),
        data_collator=collate,
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    model, info = BertForSequenceClassification.from_pretrained(
        checkpoint, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == 2
    plain = Trainer(
        model=model,
        args=arguments(tmp_path / "plain", max_steps=4),
        train_dataset=rows(12, 1),
        data_collator=collate,
    )
    plain.train(resume_from_checkpoint=str(checkpoint))
    assert plain.state.global_step == 4
