"""Two tasks that a classifier learns one after the other: their rows, its head, and its scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from domain_data import load_domain
from experiment import DOMAINS, new_classifier, tokenized
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from hf_adapt.experiments.training import first_groups, freeze

TASKS = (*DOMAINS, "sms", "email")
"""The domains whose texts have a class."""


@dataclass(frozen=True)
class Task:
    """Its tokenised training and test rows, and the names of its classes."""

    train: Dataset
    test: Dataset
    labels: list[str]


def load_tasks(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_train: int,
    num_test: int,
    max_length: int,
) -> tuple[Task, Task, list[str]]:
    """The old and the new task, and the classes of both, the old ones first.

    A class has the same number in the rows of either task.
    """
    domains = [load_domain(name) for name in names]
    own = [sorted({label for _, label in domain["train"]}) for domain in domains]
    labels = list(dict.fromkeys([*own[0], *own[1]]))
    features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})

    def rows(domain: dict[str, list[tuple[str, str]]], split: str, most: int) -> Dataset:
        texts, classes = zip(*domain[split][:most], strict=True)
        made = Dataset.from_dict({"text": texts, "label": classes}, features=features)
        return tokenized(made, tokenizer, max_length)

    old, new = (
        Task(rows(domain, "train", num_train), rows(domain, "test", num_test), classes)
        for domain, classes in zip(domains, own, strict=True)
    )
    return old, new, labels


def grown(path: str | Path, labels: list[str]) -> PreTrainedModel:
    """A saved classifier whose head has further classes after its own, with new weights."""
    old = AutoModelForSequenceClassification.from_pretrained(path)
    model = new_classifier(str(path), labels, ignore_mismatched_sizes=True)
    model.load_state_dict(
        {
            name: torch.cat([weight, model.state_dict()[name][len(weight) :]])
            for name, weight in old.state_dict().items()
        }
    )
    return model


def task_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    rows: Dataset,
    freeze_layers: int,
) -> Trainer:
    """A Trainer of a classifier whose first layers are frozen."""
    freeze(model, first_groups(model, freeze_layers))
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def accuracies(trainer: Trainer, task: Task) -> tuple[float, float]:
    """The share of a task's test rows that are right, among all classes and the task's own."""
    found = trainer.predict(task.test)
    logits, truth = found.predictions, found.label_ids
    names = trainer.model.config.id2label
    others = [number for number, name in names.items() if name not in task.labels]
    own = logits.copy()
    own[:, others] = -np.inf
    return float(np.mean(logits.argmax(-1) == truth)), float(np.mean(own.argmax(-1) == truth))
