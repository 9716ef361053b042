"""Frozen is frozen with a real GradScaler, under autocast, and on CUDA where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_adapt import GradualUnfreezingCallback
from hf_adapt.unfreezing import FreezeOnly, RandomLayers
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import ScaledTrainer, arguments, needs_cuda, weights
from tests.helpers.unfreezing import Watch, names_of

STEPS = 8


def train(
    folder: Path, cls: type[Trainer] = Trainer, schedule: Any = None, **settings: Any
) -> tuple[Trainer, Watch]:
    watch = Watch()
    options = settings.pop("options", {})
    trainer = cls(
        bert(num_hidden_layers=3),
        arguments(folder, **{"max_steps": STEPS, "weight_decay": 0.1, **settings}),
        train_dataset=rows(32, 1),
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.add_callback(GradualUnfreezingCallback(schedule, **options))
    trainer.train()
    return trainer, watch


def random_layers() -> RandomLayers:
    return RandomLayers(num_layers=1, every_steps=1, always=["head"])


def assert_only_what_is_scheduled_moved(trainer: Trainer, watch: Watch) -> None:
    names = names_of(trainer.model)
    layers = []
    for moved in watch.moved:
        groups = {group for group, members in names.items() if moved & set(members)}
        assert "head" in groups and "embeddings" not in groups
        layers.append(groups - {"head"})
        assert len(layers[-1]) == 1
    assert len(set(map(frozenset, layers))) > 1, "no transition"


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_scaler_changes_nothing(optimizer: str, clip: float, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(optim=optimizer, max_grad_norm=clip)
    plain, _ = train(tmp_path, Trainer, random_layers(), **settings)
    scaled, watch = train(tmp_path, ScaledTrainer, random_layers(), **settings)
    assert scaled.accelerator.scaler.get_scale() > 1
    assert_only_what_is_scheduled_moved(scaled, watch)
    for a, b in zip(weights(plain.model).values(), weights(scaled.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_skipped_step_does_not_move_the_phases(tmp_path: Path) -> None:
    """The phase follows `global_step`, which counts skipped steps; the scheduler does not."""

    class Overflowing(ScaledTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1:
                next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(
                    float("inf")
                )
            return loss

    trainer, watch = train(tmp_path, Overflowing)
    assert watch.moved[1] == set() and all(watch.moved[i] for i in range(STEPS) if i != 1)
    phases = [entry["unfreezing/phase"] for entry in trainer.state.log_history[:STEPS]]
    plain, _ = train(tmp_path, Trainer)
    assert phases == [e["unfreezing/phase"] for e in plain.state.log_history[:STEPS]]


def test_bf16_autocast_with_a_cached_prefix(tmp_path: Path) -> None:
    schedule = FreezeOnly("embeddings", "layer.[01]")
    settings: dict[str, Any] = dict(bf16=True, max_steps=20)
    plain, _ = train(tmp_path, schedule=schedule, options={"frozen_dropout": False}, **settings)
    cached, _ = train(
        tmp_path, schedule=schedule, options={"cache_frozen_prefix": True}, **settings
    )
    shares = [e.get("unfreezing/cached_share") for e in cached.state.log_history]
    assert shares[0] == 0.0 and shares[-2] == 1.0
    for a, b in zip(weights(plain.model).values(), weights(cached.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adafactor"])
def test_frozen_is_frozen_on_cuda(precision: str, optimizer: str, tmp_path: Path) -> None:
    flags = {} if precision == "fp32" else {precision: True}
    trainer, watch = train(
        tmp_path, schedule=random_layers(), use_cpu=False, optim=optimizer, **flags
    )
    assert trainer.args.device.type == "cuda"
    assert_only_what_is_scheduled_moved(trainer, watch)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cached_prefix_on_cuda(checkpointing: bool, tmp_path: Path) -> None:
    schedule = FreezeOnly("embeddings", "layer.[01]")
    settings: dict[str, Any] = dict(use_cpu=False, max_steps=20)
    if checkpointing:
        settings["gradient_checkpointing"] = True
    plain, _ = train(tmp_path, schedule=schedule, options={"frozen_dropout": False}, **settings)
    cached, _ = train(
        tmp_path, schedule=schedule, options={"cache_frozen_prefix": True}, **settings
    )
    shares = [e.get("unfreezing/cached_share") for e in cached.state.log_history]
    assert shares[0] == 0.0 and shares[-2] == 1.0
    for a, b in zip(weights(plain.model).values(), weights(cached.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
