"""The one-line callback on Trainers of transformers, TRL and sentence-transformers."""

from __future__ import annotations

import math
import os
from typing import Any

import peft
import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
)

from hf_adapt import (
    DANN,
    MMD,
    AdaptationCallback,
    DomainAdversarialCallback,
    adapt,
)
from tests.helpers.adaptation import TARGET, InputRecorder, assert_adapted, losses
from tests.helpers.data import collate, rows, sentence_pairs, texts
from tests.helpers.libraries import BATCH, SFT_DATA, sentence_trainer, sft
from tests.helpers.models import llama, t5_config

# ---- Seq2SeqTrainer ----


def test_seq2seq_trainer_generates(tmp_path: Any) -> None:
    torch.manual_seed(0)
    generated: list[tuple[int, ...]] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        generated.append(prediction.predictions.shape)
        return {"rows": float(len(prediction.predictions))}

    trainer = Seq2SeqTrainer(
        model=T5ForConditionalGeneration(t5_config(num_layers=1)),
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            predict_with_generate=True,
            generation_max_length=4,
            max_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=BATCH,
        ),
        train_dataset=rows(13, seed=0, labels="lm", high=34),
        eval_dataset=rows(5, seed=3, labels="lm", high=34),
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    trainer.add_callback(AdaptationCallback(DANN(ramp=None), MMD(), target_dataset=TARGET))
    trainer.train()
    assert_adapted(trainer, "loss/mmd")
    assert losses(trainer, "eval_rows") == [5.0, 5.0]
    assert [shape[0] for shape in generated] == [5, 5], "tokens, not logits"
    assert all(len(shape) == 2 for shape in generated)
    assert isinstance(trainer, Seq2SeqTrainer) and type(trainer).__name__ == "Seq2SeqTrainer"


# ---- TRL's SFTTrainer ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SFT_DATA)
def test_sft_trainer(name: str, lora: bool, tmp_path: Any) -> None:
    """The target is raw text, tokenised by the Trainer; its tokens are never learnt."""
    source, target, settings = SFT_DATA[name]
    plain = sft(tmp_path / "plain", source, lora, **settings)
    plain.train()
    trainer = sft(tmp_path / "adapted", source, lora, **settings)
    recorder = InputRecorder(trainer.model)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    objectives = [DANN(ramp=None, hidden_sizes=(8,)), MMD()]
    trainer.add_callback(AdaptationCallback(*objectives, target_dataset=target))
    trainer.train()
    assert_adapted(trainer, "loss/mmd")
    assert losses(trainer, "loss/task")[0] == pytest.approx(losses(plain)[0], rel=1e-3)
    for inputs in recorder.inputs:
        assert len(inputs["input_ids"]) == 2 * BATCH
        learnt = inputs["labels"] != -100
        assert bool(learnt[:BATCH].any(1).all()) and not bool(learnt[BATCH:].any())
        if name != "text":  # prompts are read, not learnt
            real = inputs["attention_mask"][:BATCH].bool()
            assert bool((real & ~learnt[:BATCH]).any(1).all())
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and (not lora or all("lora_" in k for k in changed))
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    plain.save_model()
    files = set(os.listdir(tmp_path / "plain")) | {"adaptation.safetensors"}
    assert set(os.listdir(tmp_path / "adapted")) == files
    if lora:
        peft.PeftModel.from_pretrained(llama(), str(tmp_path / "adapted"))
    else:
        _, info = type(llama()).from_pretrained(tmp_path / "adapted", output_loading_info=True)
        assert not any(info.values())


def test_sft_metrics_are_the_plain_trainers(tmp_path: Any) -> None:
    """The first batch's probe leaves nothing in what TRL logs; the accuracy is the source's."""
    plain, trainer = (sft(tmp_path, texts(6), learning_rate=0.0) for _ in range(2))
    adapt(trainer, DANN(), target_dataset=texts(35))
    plain.train()
    trainer.train()
    expected, metrics = plain.evaluate(), trainer.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    first, other = plain.state.log_history[0], trainer.state.log_history[0]
    assert other["mean_token_accuracy"] == pytest.approx(first["mean_token_accuracy"])
    assert set(first) <= set(other)
    assert first["num_tokens"] < other["num_tokens"] <= 3 * first["num_tokens"]


@pytest.mark.filterwarnings("ignore:You are using packing:UserWarning")
@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True},
        {"padding_free": True, "max_length": None},
    ],
    ids=["wrapped", "packing", "padding_free"],
)
def test_sft_refuses_merged_rows(settings: dict[str, Any], tmp_path: Any) -> None:
    trainer = sft(tmp_path, texts(6), **settings)
    trainer.add_callback(DomainAdversarialCallback(texts(35)))
    with pytest.raises(ValueError, match="merges rows"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- sentence-transformers ----


@pytest.fixture
def sentence_transformers() -> Any:
    return pytest.importorskip("sentence_transformers")


def watch_loss(trainer: Any) -> list[torch.Tensor]:
    """The tokens of the first column that the author's loss is given in training."""
    seen: list[torch.Tensor] = []
    inner = trainer.loss.forward

    def forward(features: Any, labels: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(features[0]["input_ids"].clone())
        return inner(features, labels)

    trainer.loss.forward = forward
    return seen


@pytest.mark.parametrize(
    ("loss", "score", "settings"),
    [
        ("MultipleNegativesRankingLoss", None, {}),
        ("MultipleNegativesRankingLoss", None, {"batch_sampler": "no_duplicates"}),
        ("CosineSimilarityLoss", "score", {}),
        ("CosineSimilarityLoss", "label", {"batch_sampler": "group_by_label"}),
    ],
    ids=["ranking", "ranking-no-duplicates", "cosine-score", "cosine-by-label"],
)
def test_sentence_transformer_trainer(
    loss: str,
    score: str | None,
    settings: dict[str, Any],
    tmp_path: Any,
    sentence_transformers: Any,
) -> None:
    """In-batch negatives couple the rows: the loss sees source rows alone, without being told."""
    for name in ("plain", "adapted"):
        (tmp_path / name).mkdir()
    plain = sentence_trainer(tmp_path / "plain", loss, score, **settings)
    expected = watch_loss(plain)
    plain.train()
    trainer = sentence_trainer(tmp_path / "adapted", loss, score, **settings)
    seen = watch_loss(trainer)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    objectives = [DANN(ramp=None, hidden_sizes=(8,)), MMD()]
    trainer.add_callback(AdaptationCallback(*objectives, target_dataset=sentence_pairs(30)))
    trainer.train()
    assert_adapted(trainer, "loss/mmd")
    assert losses(trainer, "loss/task")[0] == pytest.approx(losses(plain)[0], rel=1e-3)
    assert trainer.state.global_step == plain.state.global_step == 3
    assert len(seen) == 3 and all(map(torch.equal, seen, expected))
    assert any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    plain.save_model()
    files = {n: set(os.listdir(tmp_path / n / "out")) for n in ("plain", "adapted")}
    assert files["adapted"] == files["plain"] | {"adaptation.safetensors"}
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "adapted" / "out"))
    vectors = [m.encode(["w1 w2 w3"]) for m in (again, trainer.model)]
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)


@pytest.mark.usefixtures("sentence_transformers")
def test_sentence_transformer_features_honour_the_mask(tmp_path: Any) -> None:
    """Each text column has a mask of its own; padding must not enter the mean."""
    trainer = sentence_trainer(tmp_path, "MultipleNegativesRankingLoss", None)
    seen: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    objective = DANN(ramp=None, hidden_sizes=(8,))
    original = objective.loss

    def loss(batch: Any) -> Any:
        seen.append(batch.features()[0].detach()[:BATCH])
        part = batch.parts[0].inputs
        ids, mask = part["anchor_input_ids"], part["anchor_attention_mask"]
        assert not bool(mask.all()), "the rows must differ in length"
        for row, real in zip(ids, mask.bool(), strict=True):
            one = {"input_ids": row[real][None], "attention_mask": torch.ones(1, int(real.sum()))}
            with torch.no_grad():
                expected.append(trainer.model[0](one)["token_embeddings"][0].mean(0))
        return original(batch)

    objective.loss = loss  # type: ignore[method-assign]
    adapt(trainer, objective, target_dataset=sentence_pairs(30)).train()
    torch.testing.assert_close(torch.cat(seen), torch.stack(expected), rtol=1e-4, atol=1e-5)
