"""Building Trainers, watching them, and comparing their weights and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

BATCH = 4
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
PLAIN_FILES = {
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}
"""What the plain Trainer writes in a checkpoint."""


def arguments(
    folder: Path | str, cls: type[TrainingArguments] = TrainingArguments, **settings: Any
) -> TrainingArguments:
    """Training arguments for a quiet, deterministic run on the CPU."""
    return cls(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": BATCH,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "dataloader_pin_memory": False,
            **settings,
        }
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class GradientRecorder(TrainerCallback):
    """Keeps the model's gradient of each optimizer step, before the optimizer uses it."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.model = model
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Flatten all gradients."""
        model = self.model if self.model is not None else kwargs["model"]
        self.gradients.append(flat_gradient(model))


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients of a model as one float64 vector."""
    return torch.cat(
        [
            (p.grad if p.grad is not None else torch.zeros_like(p)).detach().double().flatten()
            for p in model.parameters()
            if p.requires_grad
        ]
    ).clone()


def cosine_and_ratio(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Cosine similarity and ratio of norms of two gradients."""
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    return float(cosine), float(one.norm() / other.norm())


class StopAt(TrainerCallback):
    """Interrupts a run, as a killed job would be."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class ScaledTrainer(Trainer):
    """A Trainer whose accelerator scales gradients, on the CPU too."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        self.accelerator.state._mixed_precision = "fp16"

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate unscales before clipping only with native_amp. Set after the model is prepared,
        # it leaves the forward in float32, so that the numbers can be compared.
        self.accelerator.native_amp = True
        return super().training_step(*args, **kwargs)
