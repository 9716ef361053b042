"""The training scripts of sentence-transformers, shortened: sts, nli, cross-encoder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import datasets
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from tests.helpers.data import words
from tests.helpers.models import SIZE
from tests.scripts.world import SPECIAL, VOCABULARY, WORDS, Script, quiet, seeded

ROWS = 12
losses = importlib.import_module("sentence_transformers.losses")
evaluation = importlib.import_module("sentence_transformers.evaluation")
cross_losses = importlib.import_module("sentence_transformers.cross_encoder.losses")


def _saved(folder: Path, seed: int, cls: Any, **config: Any) -> str:
    """A tiny BERT on disk, from where these libraries load."""
    path = folder.parent / f"{folder.name}-start-{seed}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    tokens = BertTokenizerFast(vocab_file=str(path / "vocab.txt"), model_max_length=32)
    tokens.save_pretrained(path)
    seeded(lambda: cls(BertConfig(vocab_size=VOCABULARY, **SIZE, **config)), seed).save_pretrained(
        path
    )
    return str(path)


def _encoder(folder: Path, seed: int = 0) -> Any:
    return SentenceTransformer(_saved(folder, seed, BertModel), device="cpu")


def _pairs(low: int, **columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "sentence1": [words(i, low, 2 + i % 5) for i in range(ROWS)],
            "sentence2": [words(i + 1, low, 3) for i in range(ROWS)],
            **columns,
        }
    )


def _train(folder: Path, loss: Any, train: Any, target: Any, **settings: Any) -> Script:
    model = _encoder(folder)
    texts = ["sentence1", "sentence2"] if "sentence1" in train.column_names else ["anchor"] * 2
    evaluator = evaluation.EmbeddingSimilarityEvaluator(
        train[texts[0]][:4], train[texts[1]][:4], [0.1, 0.9, 0.4, 0.6], name="sts-dev"
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**quiet(folder, **settings)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        loss=loss(model),
        evaluator=evaluator,
    )
    load = lambda saved: SentenceTransformer(saved, device="cpu")  # noqa: E731
    return Script(trainer, target, _encoder(folder, 1), load, tuple(texts))


def training_sts(folder: Path) -> Script:
    """Pairs with a score, compared by cosine."""
    train = _pairs(0, score=[(i % 5) / 4 for i in range(ROWS)])
    return _train(folder, losses.CosineSimilarityLoss, train, _pairs(30))


def _triplets(low: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"anchor": words(i, low, 2 + i), "positive": words(i + 1, low, 3),
             "negative": words(i + 2, low, 4)}
            for i in range(ROWS)
        ]
    )  # fmt: skip


def training_nli(folder: Path) -> Script:
    """Anchors, positives and hard negatives; no text twice in a batch."""
    return _train(
        folder,
        losses.MultipleNegativesRankingLoss,
        _triplets(0),
        _triplets(30),
        batch_sampler="no_duplicates",
    )


def training_nli_cached(folder: Path) -> Script:
    """The same with cached gradients, so that batches may be larger than memory."""

    def loss(model: Any) -> Any:
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)

    return _train(folder, loss, _triplets(0), _triplets(30))


def training_nli_streaming(folder: Path) -> Script:
    """Triplets from a stream."""
    script = _train(folder, losses.MultipleNegativesRankingLoss, _triplets(0), _triplets(30))
    script.trainer.train_dataset = _triplets(0).to_iterable_dataset()
    return script


def _cross(folder: Path, labels: list[Any], loss: Any, num_labels: int) -> Script:
    def model(seed: int) -> Any:
        saved = _saved(folder, seed, BertForSequenceClassification, num_labels=num_labels)
        return CrossEncoder(saved, num_labels=num_labels, device="cpu")

    own = model(0)
    train = _pairs(0, label=labels)
    trainer = CrossEncoderTrainer(
        model=own,
        args=CrossEncoderTrainingArguments(**quiet(folder)),
        train_dataset=train,
        eval_dataset=train.select(range(4)),
        loss=loss(own),
    )
    load = lambda saved: CrossEncoder(saved, device="cpu")  # noqa: E731
    return Script(trainer, _pairs(30), model(1), load, ("sentence1", "sentence2"))


def cross_encoder_sts(folder: Path) -> Script:
    """Pairs with a score between 0 and 1."""
    scores = [(i % 5) / 4 for i in range(ROWS)]
    return _cross(folder, scores, cross_losses.BinaryCrossEntropyLoss, 1)


def cross_encoder_nli(folder: Path) -> Script:
    """Pairs in three classes."""
    return _cross(folder, [i % 3 for i in range(ROWS)], cross_losses.CrossEntropyLoss, 3)
