"""The one line on other Trainers and other models: each phase moves what it says, no more."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
    ViTForImageClassification,
)

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.unfreezing import layer_groups
from tests.helpers.data import chats, collate, rows, texts
from tests.helpers.libraries import sentence_trainer, sft
from tests.helpers.models import bert, t5_config, vit_config
from tests.helpers.trainers import arguments
from tests.helpers.unfreezing import Watch, make


def assert_each_phase_moves_its_groups(trainer: Trainer, watch: Watch) -> None:
    """Two levels in four steps: what moves is what the log says has a learning rate."""
    holder = {n: g.name for g in layer_groups(trainer.model) for n in g.parameters}
    log = [entry for entry in trainer.state.log_history if "unfreezing/phase" in entry]
    assert len(log) == len(watch.moved) > 1
    assert log[0]["unfreezing/phase"] == 0 < log[-1]["unfreezing/phase"]
    for entry, moved in zip(log, watch.moved, strict=True):
        trains = {
            key.removeprefix("learning_rate/")
            for key, rate in entry.items()
            if key.startswith("learning_rate/") and rate > 0
        }
        assert {holder[name] for name in moved if name in holder} == trains


def test_seq2seq_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(t5_config(dropout_rate=0.1))
    watch = Watch()
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            max_steps=10,
            predict_with_generate=True,
            generation_max_length=4,
        ),
        train_dataset=rows(40, 1, "lm"),
        eval_dataset=rows(4, 2, "lm"),
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.add_callback(GradualUnfreezingCallback())
    trainer.train()
    assert_each_phase_moves_its_groups(trainer, watch)
    first = {key for key, rate in trainer.state.log_history[0].items()
             if key.startswith("learning_rate/") and rate > 0}  # fmt: skip
    assert first == {"learning_rate/decoder.layer.1", "learning_rate/decoder.norm"}
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer(lora: bool, checkpointing: bool, tmp_path: Path) -> None:
    data = chats(6) if lora else texts(6)
    trainer = sft(tmp_path, data, lora, gradient_checkpointing=checkpointing)
    trainer.args.max_steps = 4
    watch = Watch()
    trainer.add_callback(watch)
    trainer.add_callback(GradualUnfreezingCallback(layer_decay=0.5))
    trainer.train()
    assert_each_phase_moves_its_groups(trainer, watch)


def test_sentence_transformer_trainer(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    trainer = sentence_trainer(tmp_path, "MultipleNegativesRankingLoss", None)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.add_callback(GradualUnfreezingCallback(every_steps=2))
    trainer.train()
    assert_each_phase_moves_its_groups(trainer, watch)


def test_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config())
    generator = torch.Generator().manual_seed(0)
    data = [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3}
        for i in range(16)
    ]
    watch = Watch()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=8), train_dataset=data, callbacks=[watch]
    )
    trainer.add_callback(GradualUnfreezingCallback(cache_frozen_prefix=True))
    trainer.train()
    assert_each_phase_moves_its_groups(trainer, watch)


def test_a_stream(tmp_path: Path) -> None:
    watch = Watch()
    trainer = Trainer(
        bert(),
        arguments(tmp_path, max_steps=8),
        train_dataset=rows(40, 1).to_iterable_dataset(),
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.add_callback(GradualUnfreezingCallback())
    trainer.train()
    assert_each_phase_moves_its_groups(trainer, watch)
    trainer.add_callback(GradualUnfreezingCallback(every_epochs=1))
    trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks
                              if isinstance(c, GradualUnfreezingCallback)))  # fmt: skip
    with pytest.raises(ValueError, match="the training set has no length"):
        trainer.train()


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """In a frozen phase too: loading does not care what trains."""
    trainer = make(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.add_callback(GradualUnfreezingCallback())
    trainer.train()
    best = trainer.state.best_model_checkpoint
    loaded = type(trainer.model).from_pretrained(best)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_a_hyperparameter_search_starts_each_trial_anew(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    seen: list[list[Any]] = []

    def score(metrics: dict[str, float]) -> float:
        log = trainer.state.log_history
        seen.append([e["unfreezing/phase"] for e in log if "unfreezing/phase" in e])
        return metrics["eval_loss"]

    trainer = make(tmp_path, eval_strategy="steps", eval_steps=8)
    trainer.model_init = lambda trial=None: bert()
    trainer.add_callback(GradualUnfreezingCallback())
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        compute_objective=score,
        n_trials=2,
        backend="optuna",
    )
    assert seen[-1] == [0, 0, 1, 1, 2, 2, 3, 3] and len(seen) >= 2
