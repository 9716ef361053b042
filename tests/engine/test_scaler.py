"""fp16: a real GradScaler, and what an overflow skips; the same on CUDA where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_adapt import DANN, adapt
from tests.helpers.data import collate, rows
from tests.helpers.models import bert
from tests.helpers.trainers import ScaledTrainer, arguments, needs_cuda, same_bits, weights


class Watch(TrainerCallback):
    """Overflows the model's gradient at one step; records who moved at each step."""

    def __init__(self, dann: DANN, model: torch.nn.Module, overflow_at: int | None) -> None:
        self.dann, self.model, self.overflow_at = dann, model, overflow_at
        self.moved: list[tuple[bool, bool]] = []
        self.before: Any = None
        if overflow_at is not None:
            next(model.parameters()).register_hook(self._poison)
        self.step = 0

    def _poison(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if self.step == self.overflow_at else gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        self.before = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = weights(self.model), weights(self.dann.module)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = weights(self.model), weights(self.dann.module)
        pairs = zip(self.before, after, strict=True)
        self.moved.append(tuple(not same_bits(old, new) for old, new in pairs))


def train(folder: Path, cls: type[Trainer], overflow_at: int | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    model, dann = bert(), DANN(ramp=None, hidden_sizes=(8,))
    watch = Watch(dann, model, overflow_at)
    trainer = cls(
        model,
        arguments(folder, max_steps=4, lr_scheduler_type="constant", **settings),
        train_dataset=rows(16, 1),
        data_collator=collate,
        callbacks=[watch],
    )
    adapt(trainer, dann, target_dataset=rows(13, 2, None, low=20)).train()
    return trainer, dann, watch


def test_scaling_changes_nothing(tmp_path: Path) -> None:
    plain, plain_dann, _ = train(tmp_path, Trainer)
    scaled, scaled_dann, _ = train(tmp_path, ScaledTrainer)
    assert scaled.accelerator.scaler.get_scale() > 1
    for one, other in ((plain.model, scaled.model), (plain_dann.module, scaled_dann.module)):
        for a, b in zip(weights(one).values(), weights(other).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    norms = [t.state.log_history[0]["dann/module_gradient_norm"] for t in (plain, scaled)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_overflowing_main_step_skips_the_auxiliary_step(
    optimizer: str, clip: float, tmp_path: Path
) -> None:
    _, _, watch = train(tmp_path, ScaledTrainer, overflow_at=2, optim=optimizer, max_grad_norm=clip)
    assert watch.moved == [(True, True), (True, True), (False, False), (True, True)]


def test_without_an_overflow_both_step(tmp_path: Path) -> None:
    _, _, watch = train(tmp_path, ScaledTrainer)
    assert watch.moved == [(True, True)] * 4


def test_an_overflowing_auxiliary_gradient_skips_only_its_step(tmp_path: Path) -> None:
    class Poisoned(ScaledTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1:
                module = self._adaptation_auxiliary.adaptations[0].module
                next(module.parameters()).grad.fill_(float("inf"))
            return loss

    _, dann, watch = train(tmp_path, Poisoned)
    assert watch.moved[1] == (True, False)
    assert all(torch.isfinite(p).all() for p in dann.module.parameters())
    assert watch.moved[2] == (True, True)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_cuda(precision: str, tmp_path: Path) -> None:
    trainer, dann, watch = train(tmp_path, Trainer, use_cpu=False, **{precision: True})
    assert trainer.args.device.type == "cuda"
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    assert watch.moved[-1] == (True, True)
    full, _, _ = train(tmp_path, Trainer, use_cpu=False)
    first = [t.state.log_history[0]["loss/dann"] for t in (trainer, full)]
    assert first[0] == pytest.approx(first[1], rel=2e-2)
    assert next(dann.module.parameters()).dtype == torch.float32


@pytest.mark.cuda
@needs_cuda
def test_an_overflow_on_cuda_skips_both(tmp_path: Path) -> None:
    _, _, watch = train(tmp_path, Trainer, overflow_at=2, use_cpu=False, fp16=True)
    assert watch.moved[2] == (False, False)


@pytest.mark.cuda
@needs_cuda
def test_cuda_equals_cpu(tmp_path: Path) -> None:
    here, _, _ = train(tmp_path, Trainer)
    there, _, _ = train(tmp_path, Trainer, use_cpu=False)
    for a, b in zip(weights(here.model).values(), weights(there.model).values(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-4)
