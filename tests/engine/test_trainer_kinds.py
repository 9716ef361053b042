"""Trainers whose batches are not one sequence a row: multiple choice, sentences, preferences."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from hf_adapt import (
    DANN,
    MMD,
    AdaptationCallback,
    Distillation,
    GradualUnfreezingCallback,
    InformationMaximization,
    adapt,
)
from hf_adapt.continual import KeepPredictions, Replay, ReplayMemory
from tests.helpers.data import sentence_pairs, words
from tests.helpers.libraries import encoder
from tests.helpers.models import bert_config
from tests.helpers.trainers import GradientRecorder, arguments, cosine_and_ratio

BATCH = 4


def history(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class InOrder(Trainer):
    """Rows come in the order of the dataset."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if dataset is None else dataset)


# ---- multiple choice: each choice is a row of features ----


def choices(number: int, seed: int, low: int, labels: bool = True) -> datasets.Dataset:
    """Rows of three choices of ragged length."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(number):
        lengths = [4 + (i + j) % 4 for j in range(3)]
        ids = [
            torch.randint(low, low + 25, (size,), generator=generator).tolist() for size in lengths
        ]
        row = {"input_ids": ids, "attention_mask": [[1] * size for size in lengths]}
        made.append({**row, "labels": i % 3} if labels else row)
    return datasets.Dataset.from_list(made)


def collate_choices(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    def padded(key: str) -> torch.Tensor:
        return torch.tensor([[[*c, *[0] * (8 - len(c))] for c in row[key]] for row in rows])

    batch = {"input_ids": padded("input_ids"), "attention_mask": padded("attention_mask")}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def chooser(folder: Path, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = BertForMultipleChoice(bert_config())
    return InOrder(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=choices(8, 0, 5),
        data_collator=collate_choices,
    )


@pytest.mark.parametrize("pooling", ["mean", "cls", "tokens"])
def test_each_choice_is_a_row_of_features(pooling: Any, tmp_path: Path) -> None:
    """The reference is the base model run on one choice after another, without padding."""
    trainer = chooser(tmp_path, max_steps=1)
    objective = DANN(ramp=None, hidden_sizes=(8,), pooling=pooling)
    original, seen = objective.loss, []

    def loss(batch: Any) -> Any:
        features, domain = batch.features()
        assert int(batch.num_features()) == len(features) == len(domain)
        assert int(batch.num_features(target_only=True)) == int((domain > 0).sum())
        expected, domains = [], []
        part = batch.parts[0]
        for ids, mask, of in zip(
            part.inputs["input_ids"], part.inputs["attention_mask"].bool(), part.domain, strict=True
        ):
            for one, real in zip(ids, mask, strict=True):
                with torch.no_grad():
                    hidden = trainer.model.bert(one[real][None]).last_hidden_state[0]
                pooled = {"mean": hidden.mean(0)[None], "cls": hidden[:1], "tokens": hidden}
                expected.append(pooled[pooling])
                domains += [int(of)] * len(expected[-1])
        torch.testing.assert_close(features, torch.cat(expected), rtol=1e-4, atol=1e-5)
        assert domain.tolist() == domains
        seen.append(len(features))
        return original(batch)

    objective.loss = loss  # type: ignore[method-assign]
    adapt(trainer, objective, target_dataset=choices(5, 1, 35, labels=False)).train()
    assert seen and (pooling == "tokens" or set(seen) == {2 * BATCH * 3})
    assert 0 < history(trainer, "dann/gradient_ratio")[0] < 1


def test_accumulation_of_choices_is_exact(tmp_path: Path) -> None:
    """Eight micro-batches of one row of choices are one batch of eight."""
    gradients = []
    for size in (1, 8):
        trainer = chooser(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_grad_norm=0.0,
        )
        recorder = GradientRecorder()
        trainer.add_callback(recorder)
        objectives = [
            DANN(ramp=None, hidden_sizes=(8,)),
            InformationMaximization(diversity_weight=0),
        ]
        adapt(trainer, *objectives, target_dataset=choices(8, 1, 35, labels=False)).train()
        gradients += recorder.gradients
    assert cosine_and_ratio(*gradients) == pytest.approx((1.0, 1.0), abs=1e-4)


# ---- sentence-transformers ----

library = pytest.importorskip("sentence_transformers")
losses_of = importlib.import_module("sentence_transformers.losses")
cross_losses_of = importlib.import_module("sentence_transformers.cross_encoder.losses")


def sentences(folder: Path, make_loss: Any, train: Any, **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    model = encoder(folder)
    return library.SentenceTransformerTrainer(
        model=model,
        args=arguments(folder / "out", library.SentenceTransformerTrainingArguments, **settings),
        train_dataset=train,
        loss=make_loss(model),
    )


def first_gradient(trainer: Any, *objectives: Any, target: Any) -> torch.Tensor:
    recorder = GradientRecorder(trainer.model)
    trainer.add_callback(recorder)
    adapt(trainer, *objectives, target_dataset=target).train()
    return recorder.gradients[0]


@pytest.mark.parametrize("mini_batch_size", [3, 32])
def test_cached_losses_train_as_the_plain_ones(
    mini_batch_size: int, tmp_path: Path, caplog: Any
) -> None:
    """Features of a loss that runs the model without gradients, which costs a forward."""

    def cached(model: Any) -> Any:
        return losses_of.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)

    gradients = []
    for name, loss in (("plain", losses_of.MultipleNegativesRankingLoss), ("cached", cached)):
        trainer = sentences(tmp_path / name, loss, sentence_pairs(0), max_grad_norm=0.0)
        objectives = [MMD(), DANN(ramp=None, hidden_sizes=(8,))]
        gradients.append(first_gradient(trainer, *objectives, target=sentence_pairs(30)))
        assert all(0 < share < 1 for share in history(trainer, "mmd/gradient_ratio"))
        assert len(history(trainer, "mmd/gradient_ratio")) == 3
        assert caplog.text.count("computed by one more forward") == (name == "cached")
    assert cosine_and_ratio(*gradients) == pytest.approx((1.0, 1.0), abs=1e-4)


@pytest.mark.parametrize("target", ["stream", "map"])
def test_a_stream_of_sentences_is_paired(target: str, tmp_path: Path) -> None:
    own = sentence_pairs(30)
    trainer = sentences(
        tmp_path / "run",
        losses_of.MultipleNegativesRankingLoss,
        sentence_pairs(0).to_iterable_dataset(),
    )
    given = own.to_iterable_dataset() if target == "stream" else own
    adapt(trainer, MMD(), target_dataset=given).train()
    assert trainer.state.global_step == len(history(trainer, "loss/mmd")) == 3


def cross_encoder(folder: Path, num_labels: int = 1) -> Any:
    from transformers import BertForSequenceClassification

    encoder(folder)
    config = BertConfig.from_pretrained(folder / "encoder", num_labels=num_labels)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "encoder")
    return library.CrossEncoder(str(folder / "encoder"), num_labels=num_labels, device="cpu")


def ranker(folder: Path, make_loss: Any, train: Any, num_labels: int = 1) -> Any:
    cross = importlib.import_module("sentence_transformers.cross_encoder")
    model = cross_encoder(folder, num_labels)
    return cross.CrossEncoderTrainer(
        model=model,
        args=arguments(folder / "out", cross.CrossEncoderTrainingArguments),
        train_dataset=train,
        loss=make_loss(model),
    )


def many_negatives(model: Any) -> Any:
    return cross_losses_of.MultipleNegativesRankingLoss(model, num_negatives=2)


def cached_negatives(model: Any) -> Any:
    return cross_losses_of.CachedMultipleNegativesRankingLoss(
        model, num_negatives=2, mini_batch_size=2
    )


@pytest.mark.parametrize(
    ("make_loss", "label", "num_labels"),
    [
        (cross_losses_of.BinaryCrossEntropyLoss, [0.0, 0.5, 1.0], 1),
        (cross_losses_of.CrossEntropyLoss, [0, 1, 2], 3),
        (many_negatives, None, 1),
        (cached_negatives, None, 1),
    ],
    ids=["scores", "classes", "negatives", "cached"],
)
def test_cross_encoders(make_loss: Any, label: Any, num_labels: int, tmp_path: Path) -> None:
    """The features are those of the pairs, whatever the loss makes of the texts."""
    train = sentence_pairs(0)
    if label is not None:
        train = train.add_column("label", label * 4)
    trainer = ranker(tmp_path, make_loss, train, num_labels)
    objective = DANN(ramp=None, hidden_sizes=(8,))
    original, sizes = objective.loss, []

    def loss(batch: Any) -> Any:
        features, domain = batch.features()
        sizes.append((features.shape, domain.tolist()))
        for part in batch.parts:
            texts = [part.inputs[name] for name in ("anchor", "positive")]
            one = trainer.processing_class(texts[0][0], texts[1][0], return_tensors="pt")
            with torch.no_grad():
                expected = trainer.model.model.base_model(**one).last_hidden_state[0].mean(0)
            mine = features[domain == int(part.domain[0])][0]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        return original(batch)

    objective.loss = loss  # type: ignore[method-assign]
    objectives = [objective, MMD()]
    if num_labels > 1:
        objectives.append(InformationMaximization())
    adapt(trainer, *objectives, target_dataset=sentence_pairs(30)).train()
    assert set(map(str, sizes)) == {str((torch.Size([8, 16]), [0] * 4 + [1] * 4))}
    assert all(0 < share < 1 for share in history(trainer, "dann/gradient_ratio"))
    assert len(history(trainer, "loss/mmd")) == 3


def test_lists_of_documents_are_refused(tmp_path: Path) -> None:
    rows = [
        {"query": words(i, 0, 3), "docs": [words(i, 0, 2), words(i + 1, 0, 3)], "labels": [1, 0]}
        for i in range(8)
    ]
    trainer = ranker(tmp_path, cross_losses_of.LambdaLoss, datasets.Dataset.from_list(rows))
    target = datasets.Dataset.from_list(rows).remove_columns("labels")
    with pytest.raises(ValueError, match="Use a dataset of pairs"):
        adapt(trainer, MMD(), target_dataset=target).train()
    assert trainer.state.global_step == 0


def test_distillation_is_refused_by_name(tmp_path: Path) -> None:
    def mse(model: Any) -> Any:
        return losses_of.MSELoss(model)

    sentence = sentences(tmp_path / "sentences", mse, sentence_pairs(0))
    (tmp_path / "pairs").mkdir()
    pairs = sentence_pairs(0).add_column("label", [0.0, 1.0] * 6)
    cross = ranker(tmp_path / "pairs", cross_losses_of.BinaryCrossEntropyLoss, pairs)
    for trainer in (sentence, cross):
        trainer.add_callback(AdaptationCallback(Distillation(next(trainer.model.children()))))
        with pytest.raises(ValueError, match=f"is not supported with {type(trainer).__name__}"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_the_advice_for_distillation_works(tmp_path: Path) -> None:
    """The teacher's embeddings as labels, with MMD beside them."""
    rows = sentence_pairs(0).remove_columns("positive")
    generator = torch.Generator().manual_seed(0)
    rows = rows.add_column("label", torch.randn(12, 16, generator=generator).tolist())
    trainer = sentences(tmp_path / "run", losses_of.MSELoss, rows)
    target = sentence_pairs(30).remove_columns("positive")
    adapt(trainer, MMD(), target_dataset=target).train()
    assert len(history(trainer, "loss/mmd")) == 3


# ---- TRL: preferences and rewards ----


def test_trainers_that_compare_answers_are_refused_by_name(tmp_path: Path) -> None:
    """DPO and reward training are in tests/scripts; these write or pair rows themselves."""
    from tests.scripts.trl_scripts import llama
    from tests.scripts.world import quiet, tokenizer

    settings = quiet(tmp_path, bf16=False, gradient_checkpointing=False)
    rows = [
        {"prompt": words(i, 0, 3), "completion": " " + words(i, 5, 3), "label": bool(i % 2)}
        for i in range(8)
    ]
    data = datasets.Dataset.from_list(rows)
    kto = KTOTrainer(
        model=llama(),
        ref_model=llama(),
        args=KTOConfig(**settings),
        train_dataset=data,
        processing_class=tokenizer(causal=True),
    )
    grpo = GRPOTrainer(
        model=llama(),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=GRPOConfig(**settings, num_generations=2, max_completion_length=4),
        train_dataset=data.select_columns("prompt"),
        processing_class=tokenizer(causal=True),
    )
    one_sequence_a_row = int(trl.__version__.split(".")[0]) >= 1  # TRL 0.24's KTO has several
    for trainer in (kto, grpo):
        callback = AdaptationCallback(MMD(), target_dataset=data)
        trainer.add_callback(callback)
        with pytest.raises(ValueError, match=f"{type(trainer).__name__} compares answers"):
            trainer.train()
        assert trainer.state.global_step == 0
        trainer.remove_callback(callback)
        trainer.add_callback(GradualUnfreezingCallback())  # as advised
        if trainer is kto and one_sequence_a_row:
            trainer.add_callback(AdaptationCallback(Distillation(llama(1))))
        trainer.train()
        assert trainer.state.global_step == len(history(trainer, "unfreezing/phase")) == 4
    assert all(history(kto, "loss/distillation")) and one_sequence_a_row == bool(
        history(kto, "loss/distillation")
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_without_logits_trains_as_the_plain_trainer(accumulation: int, tmp_path: Path) -> None:
    """TRL computes a language model's loss in tiles; the terms and the gradient are the same."""
    from tests.scripts.trl_scripts import llama
    from tests.scripts.world import quiet, tokenizer

    causal = tokenizer(causal=True)
    new, old = (
        datasets.Dataset.from_list(
            [
                {**(row := dict(causal(words(i, low, 3 + i % 4)))), "labels": row["input_ids"]}
                for i in range(8)
            ]
        )
        for low in (0, 20)
    )
    settings = quiet(
        tmp_path,
        max_steps=2,
        bf16=False,
        gradient_checkpointing=False,
        gradient_accumulation_steps=accumulation,
    )
    logs = []
    for kind in (Trainer, trl.SFTTrainer):
        model = llama()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        given = TrainingArguments if kind is Trainer else trl.SFTConfig
        pads = DataCollatorForSeq2Seq(causal)
        collator = {"data_collator": pads} if kind is Trainer else {"processing_class": causal}
        trainer = kind(model, given(**settings), train_dataset=new, **collator)
        memory = ReplayMemory.from_dataset(old, size=8)
        keep = KeepPredictions(1.0, on="replay")
        trainer.add_callback(AdaptationCallback(Replay(memory, 0.5), keep))
        trainer.train()
        logs.append(trainer.state.log_history[:2])
    for plain, tiled in zip(*logs, strict=True):
        for key in ("loss", "loss/task", "loss/replay", "loss/keep_predictions", "grad_norm"):
            assert tiled[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-7), key
    assert logs[0][1]["loss/keep_predictions"] > 0
