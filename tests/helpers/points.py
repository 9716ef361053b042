"""Models of one number or a few, whose trainings can be followed with pen and paper."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from tests.helpers.trainers import arguments


class Point(nn.Module):
    """Weights θ with the loss Σ (θ - 1)², whatever the rows are."""

    def __init__(self, *start: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start or (0.0,)))

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        """The loss."""
        return {"loss": (self.theta - 1).square().sum() + 0 * x.sum()}


class Linear(nn.Module):
    """Logits W x, and the cross-entropy of a label if there is one."""

    def __init__(self, weight: Sequence[Sequence[float]], **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.config = SimpleNamespace(**config)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits."""
        return {"logits": x @ self.weight.T}


def descent(model: nn.Module, folder: Path, steps: int, **settings: Any) -> Trainer:
    """A Trainer of plain gradient descent at the rate 0.01."""
    chosen = dict(
        max_steps=steps,
        optim="sgd",
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=steps,
        per_device_train_batch_size=1,
    )
    rows = [{"x": 0.0, "labels": 0}] * 4
    return Trainer(model, arguments(folder, **{**chosen, **settings}), train_dataset=rows)
