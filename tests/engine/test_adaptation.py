"""Writing your own: the hooks of an Adaptation, and the README's objective."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_adapt import Adaptation, Objective, adapt
from hf_adapt.engine.mixins import LearningRateControl
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import arguments, same_bits, weights


class Counting(Adaptation):
    """No term: a state of its own, a module, and every hook."""

    def __init__(self) -> None:
        self.forwards = self.set_up = 0
        self.logged: list[dict[str, float]] = []

    def setup(self, trainer: Trainer) -> None:
        self.set_up += 1

    def build_modules(self, batch: Any) -> nn.Module:
        return nn.Linear(3, batch.num_domains)

    @contextmanager
    def around_forward(self, inputs: Any) -> Iterator[None]:
        assert "domain" not in inputs
        self.forwards += torch.is_grad_enabled()
        yield

    def state_dict(self) -> dict[str, Any]:
        return {"forwards": self.forwards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forwards = state["forwards"]

    def on_log(self, metrics: Any, progress: float) -> None:
        self.logged.append({**metrics, "progress": progress})


def trainer_in(folder: Path, **settings: Any) -> Trainer:
    return Trainer(
        bert(dropout=True),
        arguments(folder, max_steps=4, **settings),
        train_dataset=rows(16, 1),
        eval_dataset=rows(4, 5),
        data_collator=collate,
    )


def test_every_hook_is_called_and_its_state_survives(tmp_path: Path) -> None:
    saving = dict(save_strategy="steps", save_steps=2)
    counting = Counting()
    first = adapt(trainer_in(tmp_path, **saving), counting)
    first.train()
    assert (counting.set_up, counting.forwards) == (1, 4)
    assert [entry["progress"] for entry in counting.logged] == [0.25, 0.5, 0.75, 1.0]
    assert all(entry["loss/task"] > 0 for entry in counting.logged)
    resumed = Counting()
    second = adapt(trainer_in(tmp_path, **saving), resumed)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.forwards == 4  # two from the checkpoint, two of its own
    assert same_bits(weights(first.model), weights(second.model))
    assert same_bits(weights(counting.module), weights(resumed.module))


def test_an_adaptation_without_a_term_does_not_change_the_model(tmp_path: Path) -> None:
    stock = trainer_in(tmp_path / "stock")
    stock.train()
    ours = trainer_in(tmp_path / "ours")  # made here: a Trainer seeds when it is made
    adapt(ours, Counting()).train()
    assert same_bits(weights(stock.model), weights(ours.model))


class Scheduling(LearningRateControl):
    """The hooks of a schedule over the model's parts."""

    freezes = True

    def __init__(self, half: bool = True) -> None:
        self.events: list[Any] = []
        self.half = half

    def begin(self, trainer: Trainer) -> None:
        assert trainer.optimizer is not None and trainer.state.max_steps == 4
        self.head = dict(trainer.model.named_parameters())["classifier.weight"]
        self.groups = trainer.optimizer.param_groups
        self.events.append("begin")

    def before_step(self, step: int) -> None:
        self.events.append(step)

    def lr_multipliers(self, step: int) -> dict[nn.Parameter, float]:
        return {self.head: 0.0 if step < 2 else 0.5} if self.half else {}

    def on_evaluate(self, metrics: Any, step: int) -> None:
        self.events.append(("evaluated", step, "eval_loss" in metrics))

    def on_log(self, logs: dict[str, float], progress: float) -> None:
        logs["scheduling/head"] = float(self.head.detach().abs().sum())

    def close(self) -> None:
        self.events.append("close")


def test_the_hooks_of_a_schedule(tmp_path: Path) -> None:
    scheduling = Scheduling()
    trainer = trainer_in(tmp_path, eval_strategy="steps", eval_steps=2)
    adapt(trainer, scheduling).train()
    evaluated = [("evaluated", step, True) for step in (2, 4)]
    assert scheduling.events == ["begin", 0, 1, evaluated[0], 2, 3, evaluated[1], "close"]
    log = trainer.state.log_history
    sizes = [entry["scheduling/head"] for entry in log if "scheduling/head" in entry]
    assert sizes[0] == sizes[1] and len(set(sizes)) == 3, "left out of the first two steps"
    assert trainer.optimizer.param_groups is not None and len(scheduling.groups) == 2


def test_a_factor_is_a_learning_rate(tmp_path: Path) -> None:
    """SGD, one step: the head moves half as far, everything else alike."""
    moved = []
    for half in (True, False):
        trainer = trainer_in(tmp_path, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0)
        trainer.args.max_steps = 4
        before = weights(trainer.model)
        scheduling = Scheduling(half)
        scheduling.lr_multipliers = lambda step, s=scheduling, h=half: {s.head: 0.5} if h else {}

        class Once(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = True

        trainer.add_callback(Once())
        adapt(trainer, scheduling).train()
        moved.append({k: v - before[k] for k, v in weights(trainer.model).items()})
    for name, whole in moved[1].items():
        factor = 0.5 if name == "classifier.weight" else 1.0
        torch.testing.assert_close(moved[0][name], factor * whole, rtol=1e-3, atol=1e-7)
    assert float(moved[1]["classifier.weight"].abs().max()) > 1e-5


class CentreDistance(Objective):
    """The README's example."""

    needs_streams = ("target",)

    def loss(self, batch: Any) -> torch.Tensor:
        features, domain = batch.features()
        source, target = features[domain == 0], features[domain > 0]
        return (source.mean(0) - target.mean(0)).square().sum()


def test_the_objective_of_the_readme(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, learning_rate=3e-3)
    adapt(trainer, CentreDistance(weight=1.0), target_dataset=rows(20, 2, None, low=34)).train()
    first, *_, last = [e["loss/centredistance"] for e in trainer.state.log_history[:-1]]
    assert 0 < last < first


def test_a_scheduled_weight_is_followed_and_logged(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    objective = CentreDistance(weight=lambda progress: 2 * progress)
    adapt(trainer, objective, target_dataset=rows(20, 2, None)).train()
    for entry, weight in zip(trainer.state.log_history, (0.0, 0.5, 1.0, 1.5), strict=False):
        assert entry["centredistance/weight"] == weight
        parts = entry["loss/task"] + weight * entry["loss/centredistance"]
        assert entry["loss"] == pytest.approx(parts, abs=1e-4)  # 4.57 rounds it
