"""One process of a distributed distillation; started by test_distributed.py under torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_adapt import (
    CachedTeacher,
    DistillationTrainer,
    HiddenStates,
    ModelTeacher,
    SelfTeacher,
)
from tests.helpers.distributed import allow_fsdp_on_cpu, full_state
from tests.helpers.heads import CASES
from tests.helpers.trainers import GradientRecorder, arguments


def main(folder: Path, setting: str, per_device: int, steps: int) -> None:
    """Train and write the results of this process.

    Args:
        folder: Where to write.
        setting: Options as `key=value`, separated by commas.
        per_device: Rows per process in a micro-batch.
        steps: Micro-batches per optimizer step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(item.split("=") for item in setting.split(",") if item)
    case = CASES[options.get("head", "sequence")]
    fsdp: dict[str, Any] = {}
    if "fsdp" in options:
        allow_fsdp_on_cpu()
        layers = [options["fsdp"]]
        fsdp = dict(fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": layers})
    teacher: Any = case.model(1)
    if options.get("teacher") == "average":
        teacher = SelfTeacher(decay=0.5)
    elif options.get("teacher") == "cached":
        teacher = CachedTeacher(folder / "cache", teacher)
    elif options.get("teacher") == "sharded":
        teacher = ModelTeacher(teacher, shard=bool(fsdp))
    recorder = GradientRecorder()
    callbacks: list[TrainerCallback] = [] if fsdp else [recorder]
    trainer = DistillationTrainer(
        model=case.model(0),
        teacher=teacher,
        args=arguments(
            folder / "out",
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=steps,
            max_steps=4,
            max_grad_norm=0.5,
            optim="adamw_torch",
            adam_epsilon=1e-3,  # Adam turns rounding of tiny gradients into whole steps
            seed=1,
            **fsdp,
        ),
        train_dataset=case.data(24),
        eval_dataset=case.data(13),
        data_collator=case.collate,
        callbacks=callbacks,
        # The models' own question-answering loss has the batch's padding among its classes.
        ce_weight=0.0 if options.get("head") == "spans" else 0.5,
        features=[HiddenStates(project=True)] if "features" in options else [],
        evaluate_distillation="fsdp" not in options,
        chunked=False if "whole" in options else None,
    )
    assert trainer.is_fsdp_enabled == bool(fsdp)
    trainer.train()
    if options.get("teacher") == "sharded":
        named = trainer.distillation.teachers[0].module.named_parameters()
        layers = [parameter for name, parameter in named if ".0." in name]
        assert all(isinstance(parameter, DTensor) == bool(fsdp) for parameter in layers)
    state = {f"model.{k}": v for k, v in full_state(trainer).items()}
    if not fsdp:
        state["gradient"] = recorder.gradients[0]
        for key, value in trainer.evaluate().items():
            if key in ("eval_agreement", "eval_teacher_kl", "eval_calibration_error"):
                state[key] = torch.tensor(value)
    last = trainer.state.log_history
    state["logged"] = torch.tensor([e["loss/distillation"] for e in last if "loss" in e])
    torch.save(state, folder / f"rank{trainer.args.process_index}.pt")


if __name__ == "__main__":
    for job in sys.argv[2:]:
        name, setting, per_device, steps = job.split(":")
        main(Path(sys.argv[1]) / name, setting, int(per_device), int(steps))
    torch.distributed.barrier()  # none leaves while another still talks
    torch.distributed.destroy_process_group()
