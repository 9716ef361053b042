"""A run of eight steps, and which parameters moved in each."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_adapt.unfreezing import layer_groups
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments, weights

STEPS = 8
GROUPS = ["head", "layer.1", "layer.0", "embeddings"]  # of the tiny BERT, top first


def make(folder: Path, model: Any = None, **settings: Any) -> Trainer:
    """A Trainer of the tiny BERT."""
    labels = settings.pop("labels", "row")
    callbacks = settings.pop("callbacks", [])
    settings = {"max_steps": STEPS, **settings}
    return Trainer(
        model if model is not None else bert(),
        arguments(folder, **settings),
        train_dataset=rows(32, 1, labels),
        eval_dataset=rows(6, 9, labels),
        data_collator=collate,
        callbacks=callbacks,
    )


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """The parameters of each layer group."""
    return {group.name: list(group.parameters) for group in layer_groups(model)}


class Watch(TrainerCallback):
    """Which parameters moved in each optimizer step."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.rates: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = weights(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = weights(kwargs["model"])
        self.moved.append({k for k in now if not torch.equal(now[k], self.before[k])})
        self.before = now
