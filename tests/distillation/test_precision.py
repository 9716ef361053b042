"""bf16 autocast, the fp16 scaler, and CUDA where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import CachedTeacher, HiddenStates
from tests.helpers.heads import CASES
from tests.helpers.trainers import (
    GradientRecorder,
    ScaledTrainer,
    arguments,
    cosine_and_ratio,
    same_bits,
    weights,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class ScaledDistillation(DistillationTrainer, ScaledTrainer):
    """With a real gradient scaler on a CPU."""


def run(folder: Path, name: str, cls: Any = DistillationTrainer, **settings: Any) -> Any:
    case, recorder = CASES[name], GradientRecorder()
    options = settings.pop("options", {})
    trainer = cls(
        model=case.model(0),
        teacher=settings.pop("teacher", None) or case.model(1),
        args=arguments(
            folder, **{"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, **settings}
        ),
        train_dataset=case.data(16),
        data_collator=case.collate,
        callbacks=[recorder],
        **options,
    )
    trainer.train()
    trainer.gradients = recorder.gradients
    return trainer


@pytest.mark.parametrize("name", ["sequence", "llama"])
def test_bf16_autocast(name: str, tmp_path: Path) -> None:
    full, half = run(tmp_path, name), run(tmp_path, name, bf16=True)
    cosine_ratio = cosine_and_ratio(full.gradients[0], half.gradients[0])
    assert cosine_ratio == pytest.approx((1.0, 1.0), abs=0.05)
    assert half.gradients[0].ne(full.gradients[0]).any()
    assert next(half.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "masked_lm", "seq2seq"])
def test_losses_without_whole_logits_under_autocast(name: str, tmp_path: Path) -> None:
    pieces = run(tmp_path, name, bf16=True)
    whole = run(tmp_path, name, bf16=True, options={"chunked": False})
    cosine_ratio = cosine_and_ratio(pieces.gradients[0], whole.gradients[0])
    assert cosine_ratio == pytest.approx((1.0, 1.0), abs=0.02)


@pytest.mark.parametrize("name", ["sequence", "llama"])
@pytest.mark.parametrize("chunked", [None, False])
def test_the_scaler_changes_nothing(name: str, chunked: bool | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"options": {"chunked": chunked, "features": [HiddenStates()]}}
    options["adam_epsilon"] = 1e-3  # Adam turns rounding of tiny gradients into whole steps
    plain = run(tmp_path, name, **options)
    scaled = run(tmp_path, name, ScaledDistillation, **options)
    assert scaled.accelerator.scaler.get_scale() > 1
    for a, b in zip(weights(plain.model).values(), weights(scaled.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sequence", "token"])
def test_a_cache_is_exact_under_autocast(
    name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[name]
    runs = [
        run(tmp_path, name, bf16=True, teacher=CachedTeacher(tmp_path / "cache", case.model(1)))
        for _ in range(2)
    ]
    assert same_bits(weights(runs[0].model), weights(runs[1].model))
    assert "mixed precision" not in caplog.text
    # transformers 4 takes the precision of the Trainer before from there.
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    run(tmp_path, name, teacher=CachedTeacher(tmp_path / "cache", case.model(1)))
    assert "were computed in bf16; this run's mixed precision is 'no'" in caplog.text


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_cuda(name: str, precision: str, tmp_path: Path) -> None:
    full = run(tmp_path, name, use_cpu=False)
    half = run(tmp_path, name, use_cpu=False, **{precision: True})
    assert half.args.device.type == "cuda"
    losses = [t.state.log_history[0]["loss/distillation"] for t in (full, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", CASES)
def test_cuda_equals_cpu(name: str, tmp_path: Path) -> None:
    here = run(tmp_path, name).gradients[0]
    there = run(tmp_path, name, use_cpu=False).gradients[0].cpu()
    assert cosine_and_ratio(here, there) == pytest.approx((1.0, 1.0), abs=1e-3)


@pytest.mark.cuda
@needs_cuda
def test_an_eight_bit_teacher_stays_where_it_is(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="8-bit weights need bitsandbytes")
    from transformers import BitsAndBytesConfig

    from hf_adapt.distillation import ModelTeacher

    CASES["llama"].model(1).save_pretrained(tmp_path / "teacher")
    teacher = ModelTeacher(
        str(tmp_path / "teacher"),
        device_map="cuda:0",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )
    trainer = run(tmp_path, "llama", teacher=teacher, use_cpu=False, options={"chunked": False})
    assert isinstance(trainer, Trainer)
    assert trainer.state.log_history[0]["loss/distillation"] > 0
