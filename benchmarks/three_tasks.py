"""Three tasks on short English texts: their rows, and how they are scored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from domain_data import LICENCES, load_domain, write_domain
from sklearn.metrics import accuracy_score, f1_score

from hf_adapt.experiments.config import DomainFiles
from hf_adapt.experiments.data import load_domain as domain_rows
from hf_adapt.experiments.tasks import SequenceClassification, Task, TokenClassification

NAMES = ("sentiment", "spam", "tags")
SPLITS = ("train", "dev", "test")
ABOUT = "\n".join(LICENCES[name] for name in ("vader4", "spam2", "brown"))
SCORED = "Accuracy of sentiment, macro-F1 of spam, accuracy of the words' tags, in %"


@dataclass(frozen=True)
class LoadedTask:
    """Its tokenised rows, its classes, and what its head and its batches are.

    Attributes:
        train: Training rows; `dev` and `test` likewise.
        labels: The names of its classes.
        metrics: The Trainer's `compute_metrics`: one named `score`.
        kind: The class that loads a model with its head.
        collator: Makes a batch of its rows.
    """

    train: Dataset
    dev: Dataset
    test: Dataset
    labels: list[str]
    metrics: Callable[[Any], dict[str, float]]
    kind: Any
    collator: Any


def load_tasks(
    tokenizer: Any, num_train: dict[str, int], num_test: int, max_length: int
) -> dict[str, LoadedTask]:
    """Sentiment of movie reviews, spam in SMS, and the words' tags in newspapers."""
    words = TokenClassification()
    news = domain_rows(DomainFiles(str(write_domain("news"))), words)
    texts = SequenceClassification()
    return {
        name: _loaded(kind, domain, metrics, tokenizer, num_train[name], num_test, max_length)
        for name, kind, domain, metrics in (
            ("sentiment", texts, load_domain("movies"), accuracy),
            ("spam", texts, load_domain("sms"), f1),
            ("tags", words, news, accuracy),
        )
    }


def _loaded(
    kind: Task,
    domain: dict[str, list[tuple[Any, Any]]],
    metrics: Callable[[Any], dict[str, float]],
    tokenizer: Any,
    num_train: int,
    num_test: int,
    max_length: int,
) -> LoadedTask:
    labels = sorted({name for _, label in domain["train"] for name in kind.class_names(label)})

    def rows(split: str) -> Dataset:
        most = {"train": num_train, "dev": num_test // 2, "test": num_test}[split]
        chosen = domain[split][:most]
        cells, targets = zip(*chosen, strict=True)
        columns = {kind.input_column: cells, kind.label_column: targets}
        made = Dataset.from_dict(columns, features=kind.features(labels))
        return kind.prepared(made, tokenizer, max_length)

    train, dev, test = map(rows, SPLITS)
    collator = kind.collator(tokenizer)
    return LoadedTask(train, dev, test, labels, metrics, kind.model_class, collator)


# ---------------------------------------------------------------- scores
def accuracy(predicted: Any) -> dict[str, float]:
    """The share of rows, or of words, that are right."""
    return {"score": float(accuracy_score(*_labels_and_guesses(predicted)))}


def f1(predicted: Any) -> dict[str, float]:
    """The mean F1 of the classes, for rare ones."""
    labels, guesses = _labels_and_guesses(predicted)
    return {"score": float(f1_score(labels, guesses, average="macro", zero_division=0.0))}


def _labels_and_guesses(predicted: Any) -> tuple[np.ndarray, np.ndarray]:
    labels, guesses = predicted.label_ids, predicted.predictions.argmax(-1)
    counted = labels != -100
    return labels[counted], guesses[counted]
