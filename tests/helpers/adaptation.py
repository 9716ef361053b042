"""A source and a target that differ in their tokens, and what an adapted run must have logged."""

import math
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_adapt import DANN, MMD, InformationMaximization
from tests.helpers.data import collate, rows

SOURCE = rows(13, seed=0, low=5, high=34)
TARGET = rows(9, seed=1, labels=None, low=34)


class RecordingCollator:
    """Collates, and keeps the tokens of the rows of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, ...]]] = []

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.batches.append([tuple(map(int, row["input_ids"])) for row in features])
        return collate(features)

    def sources(self) -> list[list[tuple[int, ...]]]:
        """The source rows of each batch: their tokens lie below 34."""
        return [[row for row in batch if max(row) < 34] for batch in self.batches]

    def targets(self) -> list[list[tuple[int, ...]]]:
        """The target rows of each batch."""
        return [[row for row in batch if max(row) >= 34] for batch in self.batches]


class InputRecorder:
    """Keeps what a model was given in its training forwards."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.inputs: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            self.inputs.append(
                {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
            )


def losses(trainer: Trainer, key: str = "loss") -> list[float]:
    """What was logged under a name."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def terms() -> list[Any]:
    """Three objectives of domain adaptation."""
    return [DANN(ramp=None, hidden_sizes=(8,)), MMD(), InformationMaximization()]


def assert_adapted(trainer: Trainer, *names: str) -> None:
    """Every step logged the task's loss and each term, finite, and the terms reached the model."""
    for name in ("loss/task", "loss/dann", "dann/domain_accuracy", *names):
        values = losses(trainer, name)
        assert len(values) == trainer.state.global_step > 0, name
        assert all(map(math.isfinite, values)), name
    assert all(0 < ratio < 1 for ratio in losses(trainer, "dann/gradient_ratio"))


def length_grouping() -> dict[str, Any]:
    """`group_by_length`, which transformers 5 calls a sampling strategy."""
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}
