"""Learning rates of the groups: logged, slanted, and by importance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_adapt import DANN, GradualUnfreezingCallback, adapt
from hf_adapt.engine.progress import slanted_triangular
from hf_adapt.unfreezing import LPFT, FreezeOnly, GradualUnfreezing, Surgical
from tests.helpers.data import collate, rows
from tests.helpers.models import FIVE, bert
from tests.helpers.trainers import (
    arguments,
)
from tests.helpers.unfreezing import GROUPS, STEPS, Watch, make, names_of


def test_the_rate_of_each_group_is_logged_and_the_auxiliary_one_is_untouched(
    tmp_path: Path,
) -> None:
    """The discriminator follows the run's own schedule, whatever rate a layer has."""
    trainer = make(tmp_path, learning_rate=1e-3, lr_scheduler_type="linear")
    dann = DANN(hidden_sizes=(4,), learning_rate=0.01)
    adapt(trainer, dann, target_dataset=rows(8, 2, None, low=20))
    adapt(trainer, GradualUnfreezing(LPFT("50%"), layer_decay=0.5))
    auxiliary = []

    class Read(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            optimizer = trainer._adaptation_auxiliary.optimizer.optimizer
            auxiliary.append(optimizer.param_groups[0]["lr"])

    trainer.add_callback(Read())
    trainer.train()
    for step in range(STEPS):
        base = 1 - step / STEPS
        entry = trainer.state.log_history[step]
        assert auxiliary[step] == pytest.approx(0.01 * base)
        for depth, group in enumerate(GROUPS):
            factor = 0.5**depth if depth == 0 or step >= STEPS // 2 else 0.0
            assert entry[f"learning_rate/{group}"] == pytest.approx(
                1e-3 * base * factor, rel=1e-3, abs=1e-12
            )
        assert "loss/dann" in entry and entry["unfreezing/phase"] == int(step >= STEPS // 2)


def test_the_slanted_triangle_takes_the_place_of_the_schedule(tmp_path: Path) -> None:
    rate = slanted_triangular(0.25)
    trainer = make(tmp_path, learning_rate=1e-3, warmup_steps=3, lr_scheduler_type="cosine")
    dann = DANN(hidden_sizes=(4,), learning_rate=0.01)
    adapt(trainer, dann, target_dataset=rows(8, 2, None, low=20))
    trainer.add_callback(GradualUnfreezingCallback(Surgical("layer.0"), lr_schedule=rate))
    trainer.train()
    for step in range(STEPS):
        entry = trainer.state.log_history[step]
        expected = pytest.approx(1e-3 * rate(step / STEPS), rel=1e-3)
        assert entry["learning_rate/layer.0"] == expected
        if FIVE:  # 4.57 logs the rate of the step to come
            assert entry["learning_rate"] == expected
    trainer.train()  # a second run makes its schedule anew
    assert trainer.state.log_history[0]["learning_rate/layer.0"] == pytest.approx(
        1e-3 * rate(0.0), rel=1e-3
    )


def test_two_schedules_are_refused(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(8, 1),
        data_collator=collate,
        optimizers=(optimizer, scheduler),
    )
    trainer.add_callback(GradualUnfreezingCallback(lr_schedule=slanted_triangular()))
    with pytest.raises(ValueError, match="a run has one"):
        trainer.train()


def test_importance_slows_a_group_down_and_1_freezes_it(tmp_path: Path) -> None:
    watch = Watch()
    trainer = make(tmp_path, callbacks=[watch], weight_decay=0.1)
    names = names_of(trainer.model)
    trainer.add_callback(
        GradualUnfreezingCallback(
            FreezeOnly("embeddings"),
            importance={"layer.0": 1.0, "layer.1": 0.75, "head": lambda progress: progress},
        )
    )
    trainer.train()
    assert not any(moved & set(names["layer.0"]) for moved in watch.moved)
    for step in range(STEPS):
        entry = trainer.state.log_history[step]
        base = entry["learning_rate/layer.1"] / 0.25
        assert entry["learning_rate/head"] == pytest.approx(base * (1 - step / STEPS), rel=1e-3)
