"""A distillation; test_distributed.py starts it in two processes and in one."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_adapt import DistillationTrainer
from hf_adapt.distillation import CachedTeacher, HiddenStates, ModelTeacher, SelfTeacher
from tests.helpers.distributed import quiet_arguments, save_results
from tests.helpers.heads import CASES
from tests.helpers.trainers import GradientRecorder


def main(
    folder: Path,
    per_device: int,
    steps: int,
    head: str = "sequence",
    teacher: str = "model",
    fsdp: str | None = None,
    features: bool = False,
    chunked: bool | None = None,
) -> None:
    """Train and write the results of this process.

    Args:
        folder: Where to write.
        per_device: Rows per process in a micro-batch.
        steps: Micro-batches per optimizer step.
        head: One of `CASES`.
        teacher: A "model", "sharded" if the student is; the student's "average"; or "cached".
        fsdp: The layers to shard.
        features: Match hidden states, too.
        chunked: Whether the loss is computed without whole logits.
    """
    case = CASES[head]
    teachers: dict[str, Any] = {
        "model": lambda: case.model(1),
        "average": lambda: SelfTeacher(decay=0.5),
        "cached": lambda: CachedTeacher(folder / "cache", case.model(1)),
        "sharded": lambda: ModelTeacher(case.model(1), shard=bool(fsdp)),
    }
    recorder = GradientRecorder()
    callbacks: list[TrainerCallback] = [] if fsdp else [recorder]
    trainer = DistillationTrainer(
        model=case.model(0),
        teacher=teachers[teacher](),
        args=quiet_arguments(folder, per_device, steps, fsdp, seed=1),
        train_dataset=case.data(24),
        eval_dataset=case.data(13),
        data_collator=case.collate,
        callbacks=callbacks,
        # The models' own question-answering loss has the batch's padding among its classes.
        ce_weight=0.0 if head == "spans" else 0.5,
        features=[HiddenStates(project=True)] if features else [],
        evaluate_distillation=not fsdp,
        chunked=chunked,
    )
    assert trainer.is_fsdp_enabled == bool(fsdp)
    trainer.train()
    if teacher == "sharded":
        named = trainer.distillation.teachers[0].module.named_parameters()
        layers = [parameter for name, parameter in named if ".0." in name]
        assert all(isinstance(parameter, DTensor) == bool(fsdp) for parameter in layers)
    last = trainer.state.log_history
    more = {"logged": torch.tensor([e["loss/distillation"] for e in last if "loss" in e])}
    if not fsdp:
        for key, value in trainer.evaluate().items():
            if key in ("eval_agreement", "eval_teacher_kl", "eval_calibration_error"):
                more[key] = torch.tensor(value)
    save_results(folder, trainer, recorder, **more)
