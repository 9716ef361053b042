"""Several tasks in one training: exact beside a hand-written loop, however the rows are cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    TrainerCallback,
)

from hf_adapt import AdaptationTrainer
from hf_adapt.multitask import MultiTask, TaskSpec, mix
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments

Rows = list[dict[str, Any]]


def tags(number: int, seed: int) -> Rows:
    return [{**row, "tags": row["labels"], "labels": None} for row in rows(number, seed, "token")]


def data(sizes: Sequence[int] = (8, 8, 8), **options: Any) -> Any:
    """Rows of three tasks: three classes, four tags, two classes."""
    spam = [{**row, "labels": row["labels"] % 2} for row in rows(sizes[2], 3, "row")]
    tagged = [
        {"tags" if k == "labels" else k: v for k, v in row.items()}
        for row in rows(sizes[1], 2, "token")
    ]
    return mix({"topic": rows(sizes[0], 1, "row"), "tags": tagged, "spam": spam}, **options)


def tasks(**options: Any) -> MultiTask:
    return MultiTask(
        {
            "topic": TaskSpec(),
            "tags": TaskSpec("tags", 4, head="token_classification", collator=collate),
            "spam": TaskSpec(num_labels=2),
        },
        **options,
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of the model and of the heads in each step."""

    def __init__(self, method: MultiTask) -> None:
        self.method, self.found = method, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = dict(kwargs["model"].named_parameters())
        if self.method.module is not None:
            named.update({f"own.{n}": p for n, p in self.method.module.named_parameters()})
        self.found.append(
            {n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None}
        )


def run(folder: Path, method: MultiTask, train: Any, model: Any = None, **settings: Any) -> Any:
    settings = {"max_grad_norm": 0.0, "optim": "sgd", "max_steps": 1, **settings}
    trainer = AdaptationTrainer(
        model=bert() if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=train,
        data_collator=collate,
        objectives=method,
    )
    seen = Gradients(method)
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.found


def by_hand(method: MultiTask, model: nn.Module, train: Any) -> dict[str, torch.Tensor]:
    """The gradient of the mean losses over all rows."""
    total: Any = 0.0
    for task in method.tasks:
        own = [dict(row) for row in train if row["task"] == task]
        for row in own:
            row.pop("task")
            row["labels"] = row.pop("tags", row.get("labels"))
        if not own:
            continue
        head = method.models[task].model if task in method.models else model
        head.eval()
        total = total + head(**collate(own)).loss
    named = dict(model.named_parameters())
    names = {
        f"own.heads.{t}/{n.replace('.', '/')}": p
        for t, m in method.models.items()
        for n, p in m.own.items()
    }
    named.update(names)
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("size, steps", [(24, 1), (8, 3), (1, 24), (5, 5)])
def test_the_gradient_is_that_of_all_rows(tmp_path: Path, size: int, steps: int) -> None:
    """Of ragged micro-batches, and of some without rows of a task."""
    train, method = data(), tasks()
    trainer, (found,) = run(
        tmp_path,
        method,
        train,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        learning_rate=0.0,
    )
    assert_close(by_hand(method, trainer.model, train), found)
    assert {f"multitask/{t}" for t in ("tags", "spam")} | {
        "loss/task"
    } <= trainer.state.log_history[0].keys()
